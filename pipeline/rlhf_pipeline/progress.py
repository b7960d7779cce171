"""How far a stage is: in a small file that a watcher can read at any time, and in lines of the stage's log."""

import math
import time
from collections.abc import Callable
from pathlib import Path

from rlhf_api.canonical import canonical_json
from rlhf_api.stage import Progress

INTERVAL = 0.5  # seconds between writes, at least, while nothing but the step changes
LINE_INTERVAL = 30.0  # the same between lines of the log


class ProgressFile:
    """Writes Progress documents, each replacing the last in one step, and says on standard output what it is doing."""

    def __init__(self, path: Path, stage: str, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock
        now = clock()
        self._progress = Progress(stage=stage, started_at=now, updated_at=now)
        self._first = (now, 0)  # time and step at which this phase's steps began
        self._write()
        self._say()

    def update(
        self, step: int | None = None, total: int | None = None, phase: str | None = None, **metrics: float
    ) -> None:
        """Say how far the stage is; what is not given stays. Metrics that are not finite are left out.

        The time left is extrapolated from the steps seen in this phase.
        """
        old, now = self._progress, self._clock()
        new_phase = phase is not None and phase != old.phase
        step = old.step if step is None else step
        total = old.total if total is None else total
        if new_phase or total != old.total or step < self._first[1]:
            self._first = (now, step)
        self._progress = old.model_copy(
            update={
                "phase": old.phase if phase is None else phase,
                "step": step,
                "total": total,
                "metrics": old.metrics | {name: float(v) for name, v in metrics.items() if math.isfinite(v)},
                "updated_at": now,
                "eta_seconds": self._eta(step, total, now),
            }
        )
        if new_phase or step == total or now - self._written >= INTERVAL:
            self._write()
        if new_phase or now - self._said >= LINE_INTERVAL:
            self._say()

    @property
    def now(self) -> Progress:
        """How far the stage is, newer than the file by up to INTERVAL. Safe to read from another thread."""
        return self._progress

    def _eta(self, step: int, total: int, now: float) -> float | None:
        since, first = self._first
        if step <= first or total < step:
            return None
        return round((now - since) / (step - first) * (total - step), 1)

    def _write(self) -> None:
        temporary = self._path.with_name(f".{self._path.name}.new")
        temporary.write_bytes(canonical_json(self._progress.model_dump(mode="json", by_alias=True)))
        temporary.replace(self._path)
        self._written = self._clock()

    def _say(self) -> None:
        now = self._progress
        parts = [f"{now.stage}: {now.phase or 'begun'}"]
        if now.total:
            parts.append(f"step {now.step} of {now.total}")
        if now.eta_seconds:
            parts.append(f"{now.eta_seconds:.0f} s left")
        print(", ".join([*parts, *(f"{name} {value:.4g}" for name, value in now.metrics.items())]), flush=True)
        self._said = self._clock()
