"""The folder of one local run: what was asked, each attempt of each stage, the status, and who is at work.

run.lock                     held by the process that drives the run
run.json, store.json         what was asked, and where the artifacts are
status.json                  the last status
{stage}/work                 the stage's working folder, kept between attempts at one artifact
{stage}/{number}/            stage.json, attempt.json, result.json, stage.log, and process.lock, held by the process
"""

import fcntl
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

from pydantic import TypeAdapter, ValidationError

from rlhf_api.errors import UserError
from rlhf_api.names import PROGRESS_FILE, STAGE_CONFIG_FILE, STAGE_RESULT_FILE
from rlhf_api.run import RLHFRun, RunStatus, Section
from rlhf_api.stage import Progress, StageConfig, StageResult, StoreConfig
from rlhf_operator.plan import Attempt

LOG_FILE = "stage.log"
ORPHAN_GRACE_SECONDS = 60.0
_ATTEMPT = TypeAdapter(Attempt)


class RunFolder:
    """Reads and writes one run's folder. Every document is replaced atomically."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only process that drives this run. Raises UserError if another one does."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "run.lock").open("a+") as lock:
            deadline = time.monotonic() + 0.5  # `active` holds it for a moment
            while not (free := _try_lock(lock)) and time.monotonic() < deadline:
                time.sleep(0.02)
            if not free:
                lock.seek(0)
                raise UserError(
                    f"{self.path.name}: process {lock.read().strip() or 'unknown'} is running this run already; "
                    "wait for it, stop it with Ctrl-C, or give this run another metadata.name"
                )
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    @property
    def active(self) -> bool:
        """Whether some process drives the run now."""
        try:
            with (self.path / "run.lock").open("a+") as lock:
                return not _try_lock(lock)
        except FileNotFoundError:
            return False

    def write_request(self, run: RLHFRun, store: StoreConfig) -> None:
        """Keep what was asked for `rlhf status`, `report` and `generate`."""
        _replace(self.path / "run.json", run.model_dump_json(by_alias=True, exclude_none=True, indent=1))
        _write(self.path / "store.json", store)

    def store(self) -> StoreConfig:
        """The store of the last `rlhf run`. Raises UserError if there was none."""
        return self._need("store.json", StoreConfig)

    def write_status(self, status: RunStatus) -> None:
        """Publish the status."""
        _write(self.path / "status.json", status)

    def status(self) -> RunStatus | None:
        """The status last published."""
        return _read(self.path / "status.json", RunStatus)

    def need_status(self) -> RunStatus:
        """The status last published. Raises UserError if the run never began."""
        return self._need("status.json", RunStatus)

    def work(self, stage: str) -> Path:
        """The working folder of a stage."""
        return self.path / stage / "work"

    def attempt_path(self, stage: str, number: int) -> Path:
        """The folder of one attempt."""
        return self.path / stage / str(number)

    def attempts(self, stage: str) -> list[Attempt]:
        """The attempts of a stage, oldest first, as last recorded; a running one with its present progress."""
        numbers = sorted(int(path.name) for path in (self.path / stage).glob("[0-9]*") if path.name.isdigit())
        found = []
        for number in numbers:
            try:
                attempt = _ATTEMPT.validate_json((self.attempt_path(stage, number) / "attempt.json").read_bytes())
            except (OSError, ValidationError):  # its writer died before it wrote: no process was started
                continue
            if attempt.finished is None:
                attempt = replace(attempt, progress=self._progress(stage))
            found.append(attempt)
        return found

    def open_attempt(self, config: StageConfig, number: int, now: float) -> tuple[Path, IO[str]]:
        """Make the folder of a new attempt and record it as running.

        Returns the folder and its lock, held: the process inherits it, so that it is free when nothing of it is left.
        """
        path = self.attempt_path(config.stage, number)
        path.mkdir(parents=True)
        _replace(path / STAGE_CONFIG_FILE, config.model_dump_json(by_alias=True, exclude_none=True, indent=1))
        self._prepare_work(config)
        lock = (path / "process.lock").open("w+")
        _try_lock(lock)
        attempt = Attempt(number=number, digest=config.output.digest, started=now)
        _replace(path / "attempt.json", _ATTEMPT.dump_json(attempt).decode())
        return path, lock

    def close_attempt(self, stage: str, attempt: Attempt, now: float, exit_code: int | None) -> None:
        """Record how an attempt ended. `exit_code` is None if nobody saw it end."""
        result = _read(self.attempt_path(stage, attempt.number) / STAGE_RESULT_FILE, StageResult)
        progress = self._progress(stage)
        closed = replace(attempt, finished=now, exit_code=exit_code, result=result, progress=progress)
        self.rewrite_attempt(stage, closed)
        if result is not None and result.artifact is not None:
            shutil.rmtree(self.work(stage), ignore_errors=True)

    def rewrite_attempt(self, stage: str, attempt: Attempt) -> None:
        """Record an attempt anew."""
        path = self.attempt_path(stage, attempt.number) / "attempt.json"
        _replace(path, _ATTEMPT.dump_json(attempt).decode())

    def end_orphans(self, stage: str, now: float) -> None:
        """Close the attempts that a dead driver left open; what still runs of them is stopped first."""
        for attempt in self.attempts(stage):
            if attempt.finished is None:
                _end_holder(self.attempt_path(stage, attempt.number) / "process.lock")
                self.close_attempt(stage, attempt, now, None)

    def _prepare_work(self, config: StageConfig) -> None:
        """Empty the working folder if it served another artifact; drop what the last attempt said of its progress."""
        work = self.work(config.stage)
        owner = work / "artifact"
        if work.exists() and (not owner.exists() or owner.read_text() != str(config.output)):
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        owner.write_text(str(config.output))
        (work / PROGRESS_FILE).unlink(missing_ok=True)

    def _progress(self, stage: str) -> Progress | None:
        return _read(self.work(stage) / PROGRESS_FILE, Progress)

    def _need[T: Section](self, name: str, kind: type[T]) -> T:
        if (document := _read(self.path / name, kind)) is None:
            beside = sorted(path.name for path in self.path.parent.glob("*") if path.is_dir())
            there = f"there are: {', '.join(beside)}" if beside else "no run began in this folder"
            raise UserError(f"run {self.path.name!r} is not in {self.path.parent}; {there}")
        return document


def _end_holder(lock_file: Path) -> None:
    """Stop the process group whose id is in the lock file, if any of it still holds the lock."""
    try:
        lock = lock_file.open("r+")
    except FileNotFoundError:
        return
    with lock:
        began = time.monotonic()
        signals = [(0.0, signal.SIGTERM), (ORPHAN_GRACE_SECONDS, signal.SIGKILL)]
        while not _try_lock(lock):
            lock.seek(0)
            group = lock.read().strip()
            if group and signals and time.monotonic() - began >= signals[0][0]:
                signal_group(int(group), signals.pop(0)[1])
            time.sleep(0.05)


def signal_group(group: int, number: signal.Signals) -> None:
    """Send a signal to every process of a group; one that has ended already is no error."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return


def _try_lock(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read[T: Section](path: Path, kind: type[T]) -> T | None:
    """The document, or None if there is none or its writer died half way."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _write(path: Path, document: Section) -> None:
    _replace(path, document.model_dump_json(by_alias=True, exclude_none=True, indent=1))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    temporary.replace(path)
