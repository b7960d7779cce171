"""Weight files between the store and this machine, one at a time."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from rlhf_pipeline.sources import WEIGHTS
from rlhf_pipeline.stage_process import Stage


class InputFiles:
    """The files of one input of a stage. Without `keep`, a weight file goes when the next one is fetched."""

    def __init__(self, stage: Stage, name: str, keep: bool) -> None:
        self._stage, self._name, self._keep = stage, name, keep
        self._manifest = stage.input_manifest(name)
        self._here: dict[str, Path] = {}
        self.version: str | None = None
        self.sizes = {path: entry.size for path, entry in self._manifest.files.items()}

    def fetch(self, name: str, into: Path) -> Path:  # noqa: ARG002 - inputs have a folder of their own
        """The file, verified, in the input's folder."""
        if name not in self._here:
            path = self._stage.input(self._name, [name]) / name
            if name.endswith(WEIGHTS):
                self._let_go()
            self._here[name] = path
        return self._here[name]

    def read(self, name: str, start: int, length: int) -> bytes:
        """The bytes [start, start + length) of one file, read from the store and not verified."""
        return self._stage.artifacts.read_range(self._manifest, name, start, length)

    def _let_go(self) -> None:
        if not self._keep:
            for name in [name for name in self._here if name.endswith(WEIGHTS)]:
                self._here.pop(name).unlink()


class Shipping:
    """Sends finished weight files to the stage's artifact while the next is written. Without `keep` they go then."""

    def __init__(self, stage: Stage, keep: bool) -> None:
        self._stage, self._keep = stage, keep
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def send(self, path: Path) -> None:
        """Begin to send one file, once the one before has arrived. Raises StoreError if that one could not be sent."""
        if self._last:
            self._last.result()
        self._last = self._pool.submit(self._send, path)

    def _send(self, path: Path) -> None:
        self._stage.writer.add_file(path.relative_to(self._stage.output).as_posix(), path, settled=True)
        if not self._keep:
            path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if self._last and kind is None:
            self._last.result()
