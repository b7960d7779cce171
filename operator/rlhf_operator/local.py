"""Runs a chain on this machine: observe, plan, apply, with one subprocess for each stage.

Nothing is kept in memory that the run's folder and the store do not hold, so a run that was killed continues when it
is run again.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Final

from rlhf_api.errors import UserError
from rlhf_api.run import Phase, RLHFRun, RunStatus, Section
from rlhf_api.stage import StoreConfig
from rlhf_operator.fingerprints import fingerprints
from rlhf_operator.forks import forked
from rlhf_operator.plan import Attempt, Observed, Plan, Start, Stop, plan, shortened
from rlhf_operator.processes import Process
from rlhf_operator.run_folder import RunFolder
from rlhf_operator.stages import STAGES, Link, chain
from rlhf_store.artifacts import Artifacts, open_artifacts

PIPELINE: Final = (sys.executable, "-m", "rlhf_pipeline")
POLL_SECONDS: Final = 0.4
ENDED: Final[frozenset[Phase]] = frozenset({"Succeeded", "Failed", "Suspended"})

Show = Callable[[RunStatus, Observed], None]


@dataclass(frozen=True)
class Home:
    """The folder `.rlhf`: the runs of this working folder, and their artifacts unless another store is named."""

    path: Path

    def run_folder(self, name: str) -> RunFolder:
        """The folder of one run."""
        return RunFolder(self.path / "runs" / name)

    def run_names(self) -> list[str]:
        """The runs that ever began here."""
        return sorted(path.parent.name for path in self.path.glob("runs/*/run.json"))

    @property
    def fingerprint_cache(self) -> Path:
        return self.path / "fingerprints.json"

    def forked(self, run: RLHFRun) -> RLHFRun:
        """The run with what it takes over from another one of this folder. Raises UserError if that is not there."""
        if run.spec.fork_from is None:
            return run
        found, hold = forked(run, self.run_folder(run.spec.fork_from.run).status())
        if hold is not None:
            raise UserError(hold.message)
        return found

    def default_store(self) -> StoreConfig:
        """The store below this folder."""
        return StoreConfig(url=(self.path / "store").absolute().as_uri())


def observe_store(links: Sequence[Link], artifacts: Artifacts) -> dict[str, dict[str, float]]:
    """kind/digest -> figures, of those of the chain's artifacts that are committed."""
    found = {}
    for link in links:
        if link.skipped is None and (manifest := artifacts.find(link.output)):
            found[str(link.output)] = figures(manifest.metadata)
    return found


def figures(metadata: dict[str, Any]) -> dict[str, float]:
    """The metrics in an artifact's metadata."""
    metrics = metadata.get("metrics", {})
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}


class LocalRunner:
    """Drives one run to its end. `command` is what runs a stage; `clock` gives Unix time."""

    def __init__(
        self,
        run: RLHFRun,
        store: StoreConfig,
        home: Home,
        command: Sequence[str] = PIPELINE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.run_resource, self.store, self.command, self.clock = run, store, command, clock
        self.folder = home.run_folder(run.metadata.name)
        self._home = home
        self._artifacts = open_artifacts(store)
        self._processes: dict[str, Process] = {}
        self._found: dict[str, dict[str, float]] = {}
        self._unknown: set[str] = {stage.name for stage in STAGES}
        """Stages whose artifact may have appeared since the store was last asked."""
        self._lengths: list[Section] = []
        self._fingerprints: dict[str, str] = {}
        self._asked_at = 0.0
        self._signals = 0

    def run(self, show: Show) -> RunStatus:
        """Drive the run until it succeeded, failed or was suspended; returns its last status.

        `show` is given every status and what it was decided from. A first SIGINT, SIGTERM or SIGHUP suspends the run:
        its stages save a checkpoint; a second one kills them. Raises UserError if another process drives this run or
        a source is missing, StoreError if the store fails; the stages have ended by then.
        """
        with self.folder.locked(), self._handled_signals():
            self._begin()
            try:
                while True:
                    observed = self.observe()
                    decided = plan(self.run_resource, observed, self.clock())
                    self.folder.write_status(decided.status)
                    show(decided.status, observed)
                    if decided.status.phase in ENDED:
                        return decided.status
                    self.apply(decided)
                    time.sleep(POLL_SECONDS)
            finally:
                self._end_processes()

    def observe(self) -> Observed:
        """What is true now: processes that ended are recorded, then the store is asked about what they made."""
        for stage, process in list(self._processes.items()):
            if (code := process.poll()) is not None:
                self._close(stage, process, code)
        attempts = {stage.name: self.folder.attempts(stage.name) for stage in STAGES}
        status = self.folder.status()
        run = shortened(self.run_resource, self._fingerprints, attempts, self._asked_at, status)
        if (lengths := [run.spec.sft, run.spec.reward, run.spec.ppo]) != self._lengths:  # so are the addresses
            self._lengths, self._unknown = lengths, {stage.name for stage in STAGES}
        links = [link for link in chain(run, self._fingerprints) if link.name in self._unknown]
        self._found |= observe_store(links, self._artifacts)
        self._unknown.clear()
        return Observed(
            fingerprints=self._fingerprints,
            artifacts=dict(self._found),
            attempts=attempts,
            asked_at=self._asked_at,
            status=status,
        )

    def apply(self, decided: Plan) -> None:
        """Stop and start processes. A start that this machine has no room for is left to the next plan."""
        for action in decided.actions:
            if isinstance(action, Stop) and action.stage in self._processes:
                self._processes[action.stage].stop()
        starts = [action for action in decided.actions if isinstance(action, Start)]
        room = self._room(starts)
        for action in room:
            config = action.link.config(
                self.run_resource, self.store, f"{self.run_resource.metadata.name}-{action.number}"
            )
            path, lock = self.folder.open_attempt(config, action.number, self.clock())
            threads = max(1, _cores() // max(1, len(room) + len(self._processes)))
            work = self.folder.work(action.link.name)
            gpu = config.gpu.count > 0
            self._processes[action.link.name] = Process(self.command, path, work, lock, action.number, threads, gpu)

    def _room(self, starts: Sequence[Start]) -> list[Start]:
        """Training has the machine to itself; other stages share it, at most one a core."""
        training = {stage.name for stage in STAGES if stage.gpu}
        if training & self._processes.keys():
            return []
        if light := [start for start in starts if start.link.name not in training]:
            return light[: max(0, _cores() - len(self._processes))]
        return [] if self._processes else list(starts[:1])

    def _begin(self) -> None:
        self._asked_at = self.clock()
        for stage in STAGES:
            self.folder.end_orphans(stage.name, self.clock())
        self.run_resource = self._home.forked(self.run_resource)
        self._fingerprints = fingerprints(self.run_resource, self._home.fingerprint_cache)
        self.folder.write_request(self.run_resource, self.store)

    def _close(self, stage: str, process: Process, code: int) -> None:
        del self._processes[stage]
        self._unknown.add(stage)
        attempt = next(a for a in self.folder.attempts(stage) if a.number == process.number)
        self.folder.close_attempt(stage, attempt, self.clock(), process.exit_code(code))
        closed = next(a for a in self.folder.attempts(stage) if a.number == process.number)
        if closed.result is None and not closed.interrupted:
            self.folder.rewrite_attempt(stage, _with_reason(closed, stage, process))

    def _end_processes(self) -> None:
        for process in self._processes.values():
            process.stop()
        while self._processes:
            for stage, process in list(self._processes.items()):
                if (code := process.poll()) is not None:
                    self._close(stage, process, code)
            time.sleep(0.02)

    @contextmanager
    def _handled_signals(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._signals += 1
        spec = self.run_resource.spec.model_copy(update={"suspend": True})
        self.run_resource = self.run_resource.model_copy(update={"spec": spec})
        if self._signals > 1:
            for process in self._processes.values():
                process.kill()


def _with_reason(attempt: Attempt, stage: str, process: Process) -> Attempt:
    return replace(attempt, result=process.failed_result(stage, attempt.exit_code or 1))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
