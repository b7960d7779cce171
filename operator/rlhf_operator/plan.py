"""What to do next for one run, decided from what is observed alone: no I/O, no clock, no memory between calls.

Whoever drives a run (a process on one machine, an operator in a cluster) observes, calls `plan`, applies the actions
and observes again. Because nothing else is remembered, a crash at any point loses nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from rlhf_api.budget import ModelShape
from rlhf_api.errors import RETRIED, FailureClass
from rlhf_api.names import EXIT_INTERRUPTED
from rlhf_api.rules import misfits, problems
from rlhf_api.run import Condition, Phase, RLHFRun, RunStatus, StageState, StageStatus
from rlhf_api.stage import Progress, StageFailure, StageResult
from rlhf_operator.stages import Fingerprints, Link, chain

MAX_ATTEMPTS: Final[Mapping[FailureClass, int]] = {"infrastructure": 5, "outOfMemory": 2}
BACKOFF_SECONDS: Final = 5.0  # doubled with each failure of the same class
MAX_BACKOFF_SECONDS: Final = 300.0
UNFINISHED: Final = ("Running", "Failed", "Suspended", "Waiting")


@dataclass(frozen=True)
class Attempt:
    """One process of one stage, as last seen. `finished` is None while it runs; `digest` is that of its output."""

    number: int
    digest: str
    started: float
    finished: float | None = None
    exit_code: int | None = None
    result: StageResult | None = None
    progress: Progress | None = None

    @property
    def interrupted(self) -> bool:
        """It was told to stop, or vanished: no fault of its own, so it does not count as a failure."""
        if self.finished is None:
            return False
        return self.exit_code == EXIT_INTERRUPTED or (self.exit_code is None and self.result is None)

    @property
    def failure(self) -> StageFailure | None:
        """Why a finished attempt made no artifact; None while it runs, if it succeeded, or if it was interrupted."""
        if self.finished is None or self.interrupted:
            return None
        if self.result is not None and self.result.failure is not None:
            return self.result.failure
        if self.result is not None and self.result.artifact is not None:
            return None
        return StageFailure(failure="bug", message=f"the stage exited with code {self.exit_code} and left no result")


@dataclass(frozen=True)
class Observed:
    """Everything that a decision may depend on, besides the run itself and the time."""

    fingerprints: Fingerprints = field(default_factory=dict)
    artifacts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """kind/digest -> the figures of each committed artifact of this chain."""
    attempts: Mapping[str, Sequence[Attempt]] = field(default_factory=dict)
    """Stage -> its attempts, oldest first."""
    asked_at: float = 0.0
    """Unix time somebody last asked for this run; what failed before does not count against a stage."""
    status: RunStatus | None = None
    """The status last published: a condition that has not changed keeps its time."""


@dataclass(frozen=True)
class Start:
    """Start this attempt of the stage."""

    link: Link
    number: int


@dataclass(frozen=True)
class Stop:
    """Ask the running attempt to save a checkpoint and exit."""

    stage: str
    number: int


@dataclass(frozen=True)
class Plan:
    """What to do now, what to publish, and when to look again if nothing changes before."""

    actions: tuple[Start | Stop, ...]
    status: RunStatus
    wake_at: float | None = None


@dataclass(frozen=True)
class _View:
    """One stage with the facts that decisions need."""

    link: Link
    needed: bool
    exists: bool
    ready: bool
    attempts: Sequence[Attempt]  # all of them
    counted: Sequence[Attempt]  # those that wrote to this output since somebody asked

    @property
    def running(self) -> Attempt | None:
        return next((attempt for attempt in reversed(self.attempts) if attempt.finished is None), None)

    @property
    def pending(self) -> bool:
        return self.needed and not self.exists and self.running is None


def plan(run: RLHFRun, observed: Observed, now: float) -> Plan:
    """The next actions and the status of `run`. Equal arguments give equal plans.

    A stage starts when its output is needed and missing, its inputs are committed and it is not running; stages that
    need a GPU run one at a time. A failure that no retry can mend, or one retry too many, stops the others; a spec
    that breaks a rule starts nothing.
    """
    views = _views(run, observed)
    failures = {view.link.name: failure for view in views if (failure := _final_failure(view))}
    invalid = _invalid(run, views, observed)
    halted = bool(failures or invalid) or run.spec.suspend
    retry_at = {view.link.name: time for view in views if view.pending and (time := _retry_at(view)) is not None}

    actions: list[Start | Stop] = []
    for view in views:
        if (attempt := view.running) and (halted or attempt.digest != view.link.output.digest):
            actions.append(Stop(view.link.name, attempt.number))
    if not halted:
        startable = [view for view in views if view.pending and view.ready and retry_at.get(view.link.name, 0.0) <= now]
        actions += [Start(view.link, _next_number(view)) for view in _one_gpu_stage(startable, views)]

    stages = [_stage_status(view, observed, run.spec.suspend, failures.get(view.link.name)) for view in views]
    phase = _phase(run.spec.suspend, stages, bool(failures) or invalid is not None)
    current = next((stage for stage in stages if stage.state in UNFINISHED), None)
    status = RunStatus(
        phase=phase,
        stage=current.name if current else None,
        progress=current.progress if current else None,
        reward=next((stage.metrics.get("reward") for stage in stages if stage.name == "ppo"), None),
        conditions=_conditions(phase, stages, failures, invalid),
        stages=stages,
    )
    waiting = [time for time in retry_at.values() if time > now and not halted]
    return Plan(tuple(actions), _run_status(run, observed, status, now), min(waiting, default=None))


def _views(run: RLHFRun, observed: Observed) -> list[_View]:
    links = chain(run, observed.fingerprints)
    needed = _needed(links, observed.artifacts)
    views = []
    for link in links:
        attempts = observed.attempts.get(link.name, ())
        digest = link.output.digest
        views.append(
            _View(
                link=link,
                needed=link.name in needed,
                exists=str(link.output) in observed.artifacts,
                ready=all(str(ref) in observed.artifacts for ref in link.inputs.values()),
                attempts=attempts,
                counted=[a for a in attempts if a.digest == digest and a.started >= observed.asked_at],
            )
        )
    return views


def _invalid(run: RLHFRun, views: Sequence[_View], observed: Observed) -> str | None:
    """The rules that the spec breaks and what the imported model cannot do of it, one line each; None if sound."""
    found = problems(run.spec)
    model = next(view.link.output for view in views if view.link.name == "import-model")
    shape = ModelShape.from_figures(observed.artifacts.get(str(model), {}))
    if shape and any(view.pending for view in views):  # what exists already was possible
        found += misfits(run.spec, shape)
    return "\n".join(map(str, found)) or None


def _needed(links: Sequence[Link], artifacts: Iterable[str]) -> set[str]:
    """The stages whose output must exist: the last one's, and the inputs of each that is needed and missing."""
    present = set(artifacts)
    wanted = {str(links[-1].output)}
    needed = set()
    for link in reversed(links):
        if link.skipped is None and str(link.output) in wanted:
            needed.add(link.name)
            if str(link.output) not in present:
                wanted |= {str(ref) for ref in link.inputs.values()}
    return needed


def _one_gpu_stage(startable: Sequence[_View], views: Sequence[_View]) -> list[_View]:
    """Those of `startable` that may start together: any number without a GPU, and one with, if none is running."""
    free = not any(view.running and view.link.stage.gpu for view in views)
    chosen = []
    for view in startable:
        if not view.link.stage.gpu:
            chosen.append(view)
        elif free:
            chosen.append(view)
            free = False
    return chosen


def _next_number(view: _View) -> int:
    return max((attempt.number for attempt in view.attempts), default=0) + 1


def _failures(view: _View) -> list[StageFailure]:
    failures = []
    for attempt in view.counted:
        if attempt.failure:
            failures.append(attempt.failure)
        elif attempt.finished is not None and not attempt.interrupted and not view.exists:
            message = f"the stage reported success but {view.link.output} is not in the store"
            failures.append(StageFailure(failure="infrastructure", message=message))
    return failures


def _final_failure(view: _View) -> StageFailure | None:
    """The failure that ends the run, or None: its class is not retried, or it was retried often enough."""
    if not view.pending or not (failures := _failures(view)):
        return None
    last = failures[-1]
    if last.failure not in RETRIED:
        return last
    count = sum(failure.failure == last.failure for failure in failures)
    if count < MAX_ATTEMPTS[last.failure]:
        return None
    return last.model_copy(update={"message": f"{last.message} (gave up after {count} attempts)"})


def _retry_at(view: _View) -> float | None:
    """When the stage may start again: at once after the first interruption, later with each failure."""
    finished = [attempt.finished for attempt in view.counted if attempt.finished is not None]
    if not finished:
        return None
    if view.counted[-1].interrupted:
        count = 0
        for attempt in reversed(view.counted):
            if not attempt.interrupted:
                break
            count += 1
        return finished[-1] + (0.0 if count == 1 else _backoff(count - 1))
    failures = _failures(view)
    return finished[-1] + _backoff(sum(failure.failure == failures[-1].failure for failure in failures))


def _backoff(count: int) -> float:
    return min(BACKOFF_SECONDS * 2.0 ** min(count - 1, 16), MAX_BACKOFF_SECONDS)


def _stage_status(view: _View, observed: Observed, suspend: bool, failure: StageFailure | None) -> StageStatus:
    name = view.link.name
    if view.link.skipped is not None:
        return StageStatus(name=name, state="Skipped", message=view.link.skipped)
    last = view.counted[-1] if view.counted else None
    state, message = _state(view, last, suspend, failure)
    progress = last.progress if last else None
    return StageStatus(
        name=name,
        state=state,
        attempt=last.number if last else 0,
        artifact=str(view.link.output),
        progress=f"{progress.step}/{progress.total}" if progress and progress.total else None,
        metrics=_metrics(view, observed, last),
        message=message,
    )


def _state(
    view: _View, last: Attempt | None, suspend: bool, failure: StageFailure | None
) -> tuple[StageState, str | None]:
    """The state that status shows, and the one line beside it."""
    if failure is not None:
        return "Failed", failure.message
    if running := view.running:
        return "Running", running.progress.phase or None if running.progress else None
    if view.exists:
        return ("Succeeded" if last else "Reused"), None
    if not view.needed:
        return "Skipped", "everything that reads it exists"
    if suspend and last and last.interrupted:
        return "Suspended", None
    if last and last.failure:
        limit = MAX_ATTEMPTS.get(last.failure.failure, 1)
        return "Waiting", f"attempt {last.number} failed, at most {limit} are made: {last.failure.message}"
    return "Waiting", None


def _metrics(view: _View, observed: Observed, last: Attempt | None) -> dict[str, float]:
    """Of the running attempt its progress, of a committed artifact its figures."""
    if str(view.link.output) in observed.artifacts:
        return dict(observed.artifacts[str(view.link.output)])
    return dict(last.progress.metrics) if last and last.progress else {}


def _phase(suspend: bool, stages: Sequence[StageStatus], failed: bool) -> Phase:
    """Running lasts until the last process has ended, whatever the run is coming to."""
    if any(stage.state == "Running" for stage in stages):
        return "Running"
    if failed:
        return "Failed"
    if stages[-1].state in ("Succeeded", "Reused"):
        return "Succeeded"
    if suspend:
        return "Suspended"
    return "Running" if any(stage.attempt for stage in stages) else "Pending"


def _conditions(
    phase: Phase, stages: Sequence[StageStatus], failures: Mapping[str, StageFailure], invalid: str | None
) -> list[Condition]:
    """The conditions that hold in this phase, without their times."""
    now_running = ", ".join(stage.name for stage in stages if stage.state == "Running")
    name, failure = next(iter(failures.items()), ("", None))
    why, reason = invalid or "", "User" if invalid else "None"
    if failure:
        why, reason = f"{name}: {failure.message}", failure.failure[:1].upper() + failure.failure[1:]

    def condition(kind: str, holds: bool, reason: str, message: str = "") -> Condition:
        return Condition(type=kind, status="True" if holds else "False", reason=reason, message=message)

    return [
        condition("Valid", invalid is None, "Checked" if invalid is None else "Rejected", invalid or ""),
        condition("Progressing", phase in ("Pending", "Running"), phase, now_running),
        condition("Succeeded", phase == "Succeeded", phase),
        condition("Failed", phase == "Failed", reason, why),
        condition("Suspended", phase == "Suspended", phase),
    ]


def _run_status(run: RLHFRun, observed: Observed, status: RunStatus, now: float) -> RunStatus:
    """`status` with the generation it is about and, on each condition, the time it last changed."""
    stamp = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    before = {condition.type: condition for condition in observed.status.conditions} if observed.status else {}
    conditions = []
    for condition in status.conditions:
        old = before.get(condition.type)
        since = old.last_transition_time if old and old.status == condition.status else stamp
        conditions.append(
            condition.model_copy(update={"last_transition_time": since, "observed_generation": run.metadata.generation})
        )
    return status.model_copy(update={"conditions": conditions, "observed_generation": run.metadata.generation})
