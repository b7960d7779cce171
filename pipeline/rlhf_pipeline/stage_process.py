"""What every stage program is given: its settings, its inputs, a folder for its output, and its surroundings."""

import os
import platform
import resource
import secrets
import shutil
import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf_api.names import PROGRESS_FILE
from rlhf_api.stage import StageConfig, StageSettings
from rlhf_pipeline.checkpoints import Checkpoints
from rlhf_pipeline.progress import ProgressFile
from rlhf_pipeline.rank_processes import rank_folder
from rlhf_pipeline.ranks import ALONE, Ranks
from rlhf_pipeline.tracking import Tracking
from rlhf_store.artifacts import Artifacts, ArtifactWriter, Manifest

PACKAGES = ("rlhf-operator", "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")


class Interrupted(Exception):
    """The process was asked to stop. Raised by a program after it saved its checkpoint."""


class Stage:
    """One run of one stage.

    config, settings: what to do. work: a folder for anything; output: the folder that becomes the artifact.
    writer: sends a large file to the artifact early. progress, checkpoints, artifacts: see their classes.
    ranks: the processes that do it together. They share `work`; what others than the first put out is nobody's.
    """

    def __init__(self, config: StageConfig, artifacts: Artifacts, work: Path, ranks: Ranks = ALONE) -> None:
        self.config, self.artifacts, self.work, self.ranks = config, artifacts, work, ranks
        self.settings: StageSettings = config.settings
        own = work if ranks.first else rank_folder(work, ranks.rank)
        self.output = own / "output"
        shutil.rmtree(self.output, ignore_errors=True)  # of a process that died here
        self.output.mkdir(parents=True)
        # Two runs of one file may share an artifact and an attempt's number, but never a folder.
        attempt = f"{config.attempt}-{secrets.token_hex(4)}"
        self.writer: ArtifactWriter = artifacts.writer(config.output, attempt)
        self.progress = ProgressFile(own / PROGRESS_FILE, config.stage)
        self.logged: dict[str, float] = {}  # the newest record of log(); replaced, never changed
        self._tracking = Tracking(config, self.output / "logs")
        self.checkpoints = Checkpoints(artifacts, config.output, attempt, work, self.output, self._tracking, ranks)
        self._stop_requested = False
        self._polls = False

    def has(self, name: str) -> bool:
        """Whether the stage was given this input."""
        return name in self.config.inputs

    def input(self, name: str, include: Sequence[str] | None = None) -> Path:
        """Local folder of an input's files, or of those that match a pattern: fetched and verified. Read only.

        Raises KeyError if the stage has no such input, IntegrityError if its bytes are damaged.
        """
        ref = self.config.inputs[name]
        folder = self.work / "inputs" / f"{name}-{ref.digest[:12]}"
        # Of a stage with several ranks all inputs were fetched before the ranks began.
        return folder if self.ranks.size > 1 else self.artifacts.fetch(ref, folder, include)

    def input_manifest(self, name: str) -> Manifest:
        """Manifest of an input: its files, and its metrics in the metadata."""
        return self.artifacts.need(self.config.inputs[name])

    def log(self, step: int, **metrics: float) -> None:
        """Record metrics of a step: logs/metrics.jsonl, TensorBoard and the trackers of the run."""
        if self.ranks.first:
            self._tracking.log(step, metrics)
        self.logged = metrics

    def close(self) -> None:
        """Flush the logs to the output folder."""
        self._tracking.close()

    @property
    def stopping(self) -> bool:
        """Whether the process was asked to stop: then save a checkpoint and raise Interrupted.

        The first reading takes over: from then on a first SIGTERM or SIGINT only sets this, and a second one
        raises Interrupted wherever the program is. Before it, the first one does.
        """
        self._polls = True
        return self._stop_requested

    def all_stopping(self) -> bool:
        """Whether some rank was asked to stop: the same answer for all, which all must ask for."""
        if not self.ranks.any(self.stopping):
            return False
        self._stop_requested = True  # of a rank that the signal has not reached yet
        return True

    @property
    def stop_requested(self) -> bool:
        """Whether a signal has come, asked without taking over."""
        return self._stop_requested

    def handle_signals(self) -> None:
        """Let SIGTERM and SIGINT set `stopping`. Of the main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        again, self._stop_requested = self._stop_requested, True
        if again or not self._polls:
            raise Interrupted(f"stopped by {signal.Signals(number).name}")


def surroundings() -> dict[str, Any]:
    """Versions, device and peak memory in bytes of this process, for an artifact's metadata."""
    found: dict[str, Any] = {
        "device": _processor(),
        "cpus": os.cpu_count(),
        "versions": {"python": platform.python_version()},
    }
    for package in PACKAGES:
        try:
            found["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["peakHostBytes"] = peak_host_bytes()
    if (peak := peak_gpu_bytes()) is not None:
        found["device"] = sys.modules["torch"].cuda.get_device_name()
        found["peakGpuBytes"] = peak
    return found


def peak_gpu_bytes() -> int | None:
    """Most bytes that this process has held on any one GPU; None while it uses none."""
    torch = sys.modules.get("torch")  # not imported for the asking: it takes seconds
    if not torch or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return max(int(torch.cuda.max_memory_reserved(i)) for i in range(torch.cuda.device_count()))


def peak_host_bytes() -> int:
    """Most bytes of memory that this process has held at a time."""
    # Not getrusage: across a fork its maximum is that of the process that started this one.
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
