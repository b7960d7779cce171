"""What to do next for one run, decided from what is observed alone: no I/O, no clock, no memory between calls.

Whoever drives a run (a process on one machine, an operator in a cluster) observes, calls `plan`, applies the actions
and observes again. Because nothing else is remembered, a crash at any point loses nothing.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from rlhf_api.budget import ModelShape
from rlhf_api.errors import RETRIED, FailureClass
from rlhf_api.names import EXIT_INTERRUPTED, EXIT_OK
from rlhf_api.rules import misfits, problems
from rlhf_api.run import RLHFRun, RunStatus, StageState, StageStatus
from rlhf_api.stage import Progress, StageFailure, StageResult, StageSettings
from rlhf_operator import conditions
from rlhf_operator.conditions import Hold, stamp, unix_time
from rlhf_operator.figures import duration
from rlhf_operator.forks import DONE
from rlhf_operator.ladder import LENGTHS, Step, ladder, remedy, stepped_down, told
from rlhf_operator.memory_check import MemoryCheck, check_memory
from rlhf_operator.stages import Fingerprints, Link, chain

# outOfMemory: of a stage that has nothing to lower; else one for each step of its ladder, and the first.
MAX_ATTEMPTS: Final[Mapping[FailureClass, int]] = {"infrastructure": 5, "outOfMemory": 2}
BACKOFF_SECONDS: Final = 5.0  # doubled with each failure of the same class
MAX_BACKOFF_SECONDS: Final = 300.0
STORE_RETRY_SECONDS: Final = 15.0
HOLD_RETRY_SECONDS: Final = 30.0
STALE_SECONDS: Final = 900.0  # without a word, after which a stage's pace is not known any more: no step takes so long
UNFINISHED: Final = ("Running", "Pending", "Failed", "Suspended", "Waiting")


@dataclass(frozen=True)
class Attempt:
    """One process of one stage, as last seen. `finished` is None while it runs; `digest` is that of its output.

    One that ended well may have no result, if nobody saw it: whether the artifact is there tells.
    """

    number: int
    digest: str
    started: float
    finished: float | None = None
    exit_code: int | None = None
    result: StageResult | None = None
    progress: Progress | None = None
    job: str | None = None
    held: Hold | None = None
    """Why it is not running yet, such as a pod for which there is no node; None if it runs or is about to."""

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
        if self.exit_code == EXIT_OK or (self.result is not None and self.result.artifact is not None):
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
    store_problem: str | None = None
    """Why the store could not be asked. `artifacts` is then what was known before, and nothing new starts."""
    damage: str | None = None
    """What is wrong with an artifact of this chain, where one was altered or truncated in the store."""
    store_asked: bool = True
    """False where only the stages have the store's credentials; `artifacts` is then what they reported."""
    store_answer_seconds: float | None = None
    """How long the store took to answer, if that was measured."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Stage -> why no attempt of it can ever be made, such as a pod template that makes no pod."""
    held: Mapping[str, Hold] = field(default_factory=dict)
    """Stage -> why no attempt of it could be made now, such as a quota."""
    fork: Hold | None = None
    """Why what spec.forkFrom names cannot be taken over yet; nothing starts until it is."""


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
class Delete:
    """Delete the run and its record; its artifacts stay."""


@dataclass(frozen=True)
class Plan:
    """What to do now, what to publish, and when to look again if nothing changes before."""

    actions: tuple[Start | Stop | Delete, ...]
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
    counted: Sequence[Attempt]  # those that wrote to this output, or to that of a longer length, since somebody asked
    asked: StageSettings  # before any length was halved
    steps: Sequence[Step]  # down from there
    least: int  # of those steps that are taken whatever fails, as the output was made there
    store_known: bool
    refused: str | None
    held: Hold | None

    @property
    def running(self) -> Attempt | None:
        return next((attempt for attempt in reversed(self.attempts) if attempt.finished is None), None)

    @property
    def pending(self) -> bool:
        return self.needed and not self.exists and self.running is None

    def down(self, attempts: Iterable[Attempt]) -> int:
        """How many steps down its ladder the stage is after these attempts: one for each that ran out of memory."""
        return max(self.least, _out_of_memory(attempts))


def plan(run: RLHFRun, observed: Observed, now: float) -> Plan:
    """The next actions and the status of `run`. Equal arguments give equal plans.

    A stage starts when its output is needed and missing, its inputs are committed and it is not running; stages that
    need a GPU run one at a time. A failure that no retry can mend, or one retry too many, stops the others; a spec
    that breaks a rule starts nothing.
    """
    views = _views(run, observed)
    failures = {view.link.name: failure for view in views if (failure := _final_failure(view))}
    invalid, memory = _invalid(run, views, observed), _memory(run, views, observed)
    why = _why_failed(run, views, failures, invalid, memory, observed, now)
    halted = why is not None or run.spec.suspend
    blocked = halted or observed.store_problem is not None or observed.fork is not None
    retry_at = {view.link.name: time for view in views if view.pending and (time := _retry_at(view)) is not None}

    actions: list[Start | Stop | Delete] = []
    for view in views:
        if (attempt := view.running) and (halted or attempt.digest != view.link.output.digest):
            actions.append(Stop(view.link.name, attempt.number))
    if not blocked:
        startable = [view for view in views if view.pending and view.ready and retry_at.get(view.link.name, 0.0) <= now]
        actions += [Start(_next_link(view), _next_number(view)) for view in _one_gpu_stage(startable, views)]

    stages = [_stage_status(view, observed, run.spec.suspend, failures.get(view.link.name)) for view in views]
    unfinished = any(view.running for view in views)
    phase = conditions.phase_of(stages, why is not None, run.spec.suspend, unfinished)
    current = next((stage for stage in stages if stage.state in UNFINISHED), None)
    found = [
        conditions.valid(invalid),
        conditions.store_ready(
            observed.store_problem, observed.store_asked, observed.store_answer_seconds, observed.status
        ),
        memory.condition,
        conditions.progressing(phase, stages, _hold(views, observed)),
        conditions.succeeded(phase),
        conditions.failed(phase, why),
        conditions.suspended(phase),
    ]
    status = RunStatus(
        phase=phase,
        stage=current.name if current else None,
        progress=current.progress if current else None,
        eta=_eta(views, current.name, now) if current else None,
        taken=run.status.taken if run.status else {},
        reward=_reward(stages),
        observed_generation=run.metadata.generation,
        asked_at=stamp(observed.asked_at) if observed.asked_at else None,
        suspend=run.spec.suspend,
        conditions=conditions.dated(found, observed.status, run.metadata.generation, now),
        stages=stages,
        budget=memory.lines,
    )
    return Plan(tuple(actions), status, _wake_at(run, observed, status, retry_at, halted, now))


def asked_at(run: RLHFRun, status: RunStatus | None, attempts: Iterable[Attempt], now: float) -> float:
    """When the run was last asked for, to the second: as its status says, or now if it is new or was just resumed.

    Later than the start of every attempt made before, whatever the clocks say, so that none of them counts.
    """
    if status is not None and status.asked_at is not None and (run.spec.suspend or not status.suspend):
        return unix_time(status.asked_at)
    return float(max([int(now), *(int(attempt.started) + 1 for attempt in attempts)]))


def seconds_left(progress: Progress, now: float) -> float | None:
    """The time that a stage has left by what it last said; None if it did not say, or too long ago."""
    age = max(0.0, now - progress.updated_at)
    if progress.eta_seconds is None or age > min(progress.eta_seconds, STALE_SECONDS):
        return None
    return progress.eta_seconds - age


def at_rest(
    status: RunStatus | None, generation: int | None, suspend: bool, ttl_seconds: int | None, now: float
) -> Plan | None:
    """What to do for a run that has ended by its own status; None if it has not, or was resumed since.

    Its end is final: an artifact that is deleted later, a store that is away, or an operator that would not take its
    spec any more, starts nothing again and takes nothing back.
    """
    if status is None or status.phase not in ("Succeeded", "Failed") or (status.suspend and not suspend):
        return None
    found = [each.model_copy(update={"observed_generation": generation}) for each in status.conditions]
    kept = status.model_copy(update={"observed_generation": generation, "suspend": suspend, "conditions": found})
    ended = next((each.last_transition_time for each in status.conditions if each.type == status.phase), None)
    if ttl_seconds is None or ended is None:
        return Plan((), kept)
    delete_at = unix_time(ended) + ttl_seconds
    return Plan((Delete(),), kept) if delete_at <= now else Plan((), kept, delete_at)


def rejected(
    name: str,
    generation: int | None,
    suspend: bool,
    complaint: str,
    attempts: Mapping[str, Sequence[Attempt]],
    before: RunStatus | None,
    now: float,
) -> Plan:
    """What to do for a resource that is no run: its spec passed the API server, maybe long ago, but not the models.

    What it made stays known; what still runs is stopped.
    """
    alive = {stage: attempt for stage, made in attempts.items() for attempt in made if attempt.finished is None}
    known = before or RunStatus()
    ended: dict[str, Any] = {"state": "Waiting", "progress": None, "message": None}
    stages = [
        each.model_copy(update=ended) if each.state in ("Running", "Pending") and each.name not in alive else each
        for each in known.stages
    ]
    phase = conditions.phase_of(stages, True, suspend, bool(alive))
    found = [
        conditions.valid(complaint),
        conditions.progressing(phase, stages, None),
        conditions.succeeded(phase),
        conditions.failed(phase, Hold("User", f"{name}: {complaint}")),
        conditions.suspended(phase),
    ]
    changes = {
        "phase": phase,
        "stage": None,
        "progress": None,
        "eta": None,
        "observed_generation": generation,
        "suspend": suspend,
        "conditions": conditions.dated(found, before, generation, now),
        "stages": stages,
    }
    stops = tuple(Stop(stage, attempt.number) for stage, attempt in alive.items())
    return Plan(stops, known.model_copy(update=changes))


def shortened(
    run: RLHFRun,
    fingerprints: Fingerprints,
    attempts: Mapping[str, Sequence[Attempt]],
    asked: float,
    status: RunStatus | None,
) -> RLHFRun:
    """The run with the lengths that memory leaves it, where its spec allows that: the one whose chain is made.

    `status`: the one last published. What it says was made at a shorter length stays when the run is resumed.
    """
    return _shortened(run, fingerprints, attempts, asked, status)[0]


@dataclass(frozen=True)
class _Lengths:
    """What was tried of a stage with a length, and how far down its ladder it is even if nothing fails any more."""

    digests: Collection[str]  # of its output at every length tried
    steps: int = 0


def _shortened(
    run: RLHFRun,
    fingerprints: Fingerprints,
    attempts: Mapping[str, Sequence[Attempt]],
    asked: float,
    status: RunStatus | None,
) -> tuple[RLHFRun, dict[str, _Lengths]]:
    found: dict[str, _Lengths] = {}
    if not run.spec.gpu.shorten_on_out_of_memory:
        return run, found
    made = {stage.name: stage.artifact for stage in status.stages if stage.state in DONE} if status else {}
    for name, (section, field_name) in LENGTHS.items():
        since = [attempt for attempt in attempts.get(name, ()) if attempt.started >= asked]
        link = _link(run, fingerprints, name)
        outputs, found[name], shorter = [link.output], _Lengths({link.output.digest}), run
        for number, step in enumerate(ladder(name, link.settings, True, link.gpus(run.spec)), 0):
            if not step.shortens:
                continue
            tried = {output.digest for output in outputs}
            failed = _out_of_memory(attempt for attempt in since if attempt.digest in tried) > number
            if not failed and made.get(name) in (None, *map(str, outputs)):
                break
            part = getattr(run.spec, section).model_copy(update={field_name: step.after})
            shorter = shorter.model_copy(update={"spec": shorter.spec.model_copy(update={section: part})})
            outputs.append(_link(shorter, fingerprints, name).output)
            kept = str(outputs[-1]) == made.get(name)
            if failed or kept:
                run = shorter
                found[name] = _Lengths(tried | {outputs[-1].digest}, number + 1 if kept else 0)
    return run, found


def _link(run: RLHFRun, fingerprints: Fingerprints, name: str) -> Link:
    return next(link for link in chain(run, fingerprints) if link.name == name)


def _views(run: RLHFRun, observed: Observed) -> list[_View]:
    asked_for = {link.name: link.settings for link in chain(run, observed.fingerprints)}
    short, lengths = _shortened(run, observed.fingerprints, observed.attempts, observed.asked_at, observed.status)
    links = chain(short, observed.fingerprints)
    needed = _needed(links, observed.artifacts)
    views = []
    for link in links:
        attempts = observed.attempts.get(link.name, ())
        length = lengths.get(link.name, _Lengths({link.output.digest}))
        asked = asked_for[link.name] if link.name in LENGTHS else link.settings
        views.append(
            _View(
                link=link,
                needed=link.name in needed,
                exists=str(link.output) in observed.artifacts or (link.taken and not observed.store_asked),
                ready=all(str(ref) in observed.artifacts for ref in link.inputs.values()),
                attempts=attempts,
                counted=[a for a in attempts if a.digest in length.digests and a.started >= observed.asked_at],
                asked=asked,
                steps=ladder(link.name, asked, run.spec.gpu.shorten_on_out_of_memory, link.gpus(run.spec)),
                least=length.steps,
                store_known=observed.store_problem is None and observed.damage is None,
                refused=observed.refused.get(link.name),
                held=observed.held.get(link.name),
            )
        )
    return views


def _invalid(run: RLHFRun, views: Sequence[_View], observed: Observed) -> str | None:
    """The rules that the spec breaks and what the imported model cannot do of it, one line each; None if sound."""
    found = problems(run.spec)
    shape = _shape(views, observed)
    if shape and any(view.pending for view in views):  # what exists already was possible
        found += misfits(run.spec, shape)
    return "\n".join(map(str, found)) or None


def _shape(views: Sequence[_View], observed: Observed) -> ModelShape | None:
    model = next(view.link.output for view in views if view.link.name == "import-model")
    return ModelShape.from_figures(observed.artifacts.get(str(model), {}))


def _memory(run: RLHFRun, views: Sequence[_View], observed: Observed) -> MemoryCheck:
    pending = [view.link.name for view in views if view.pending and view.link.stage.gpu]
    return check_memory(run.spec, _shape(views, observed), pending)


def _why_failed(
    run: RLHFRun,
    views: Sequence[_View],
    failures: Mapping[str, StageFailure],
    invalid: str | None,
    memory: MemoryCheck,
    observed: Observed,
    now: float,
) -> Hold | None:
    """What ends the run, or None.

    An artifact that was altered, the first of its stages' failures, a broken rule, too little memory, its deadline.
    """
    if observed.damage is not None:
        return Hold("User", observed.damage)
    for name, failure in failures.items():
        return Hold(failure.failure[:1].upper() + failure.failure[1:], f"{name}: {failure.message}")
    if invalid is not None:
        return Hold("User", invalid)
    if memory.refusal is not None:
        return Hold("OutOfMemory", memory.refusal)
    limit = run.spec.active_deadline_seconds
    if limit is not None and not run.spec.suspend and not views[-1].exists and now >= observed.asked_at + limit:
        how = "raise it, then set suspend to true and back to false to continue"
        return Hold("DeadlineExceeded", f"spec.activeDeadlineSeconds: {limit} have passed; {how}")
    return None


def _hold(views: Sequence[_View], observed: Observed) -> Hold | None:
    """What keeps the run waiting: the store, or the first stage that cannot run yet."""
    if observed.store_problem is not None:
        return Hold("StoreUnavailable", observed.store_problem)
    if observed.fork is not None:
        return observed.fork
    for view in views:
        held = view.running.held if view.running else view.held if view.pending else None
        if held:
            return Hold(held.reason, f"{view.link.name}: {held.message}")
    return None


def _wake_at(
    run: RLHFRun, observed: Observed, status: RunStatus, retry_at: Mapping[str, float], halted: bool, now: float
) -> float | None:
    if halted or status.phase == "Succeeded":
        return None
    times = [time for time in retry_at.values() if time > now]
    if observed.store_problem is not None:
        times.append(now + STORE_RETRY_SECONDS)
    if observed.held:
        times.append(now + HOLD_RETRY_SECONDS)
    if run.spec.active_deadline_seconds is not None:
        times.append(max(observed.asked_at + run.spec.active_deadline_seconds, now))
    return min(times, default=None)


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


def _next_link(view: _View) -> Link:
    """The link with the settings of its next attempt."""
    return replace(view.link, settings=stepped_down(view.steps, view.asked, view.down(view.counted)))


def _out_of_memory(attempts: Iterable[Attempt]) -> int:
    return sum(attempt.failure is not None and attempt.failure.failure == "outOfMemory" for attempt in attempts)


def _most_attempts(view: _View, failure: FailureClass) -> int:
    """After so many failures of this class the stage is given up."""
    most = MAX_ATTEMPTS.get(failure, 1)
    return max(most, 1 + len(view.steps)) if failure == "outOfMemory" else most


def _failures(view: _View) -> list[StageFailure]:
    failures = []
    for attempt in view.counted:
        if attempt.failure:
            failures.append(attempt.failure)
        elif attempt.finished is not None and not attempt.interrupted and not view.exists and view.store_known:
            message = f"the stage reported success but {view.link.output} is not in the store"
            failures.append(StageFailure(failure="infrastructure", message=message))
    return failures


def _final_failure(view: _View) -> StageFailure | None:
    """The failure that ends the run, or None: its class is not retried, or it was retried often enough."""
    if view.pending and view.refused is not None:
        return StageFailure(failure="user", message=view.refused)
    if view.pending and view.link.taken and view.store_known:
        gone = f"{view.link.output}, taken over by spec.forkFrom, is not in the store any more"
        return StageFailure(failure="user", message=f"{gone}; apply a run of another name, without forkFrom")
    if not view.pending or not (failures := _failures(view)):
        return None
    last = failures[-1]
    if last.failure not in RETRIED:
        return last
    count = sum(failure.failure == last.failure for failure in failures)
    if count < _most_attempts(view, last.failure):
        return None
    tried = told(view.steps, count - 1) if last.failure == "outOfMemory" else None
    how = f", the last with {tried}" if tried else ""
    message = f"{last.message} (gave up after {count} attempts{how})"
    if last.failure == "outOfMemory":
        message += f"; {remedy(view.link.name, view.link.settings)}"
    return last.model_copy(update={"message": message})


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
    if not (failures := _failures(view)):  # a success that the store, which is away, cannot confirm
        return None
    last = failures[-1].failure
    if last == "outOfMemory":  # the step down mends it, not the time
        return finished[-1] + BACKOFF_SECONDS
    return finished[-1] + _backoff(sum(failure.failure == last for failure in failures))


def _backoff(count: int) -> float:
    return min(BACKOFF_SECONDS * 2.0 ** min(count - 1, 16), MAX_BACKOFF_SECONDS)


def _reward(stages: Sequence[StageStatus]) -> float | None:
    """PPO's, in four digits: a column of `kubectl get` shows all that there are."""
    found = next((stage.metrics.get("reward") for stage in stages if stage.name == "ppo"), None)
    return None if found is None else float(f"{found:.4g}")


def _stage_status(view: _View, observed: Observed, suspend: bool, failure: StageFailure | None) -> StageStatus:
    name = view.link.name
    if view.link.skipped is not None:
        return StageStatus(name=name, state="Skipped", message=view.link.skipped)
    last = view.counted[-1] if view.counted else None
    state, message = _state(view, last, suspend, failure)
    progress = last.progress if last else None
    reason = failure or (last.failure if last else None)
    return StageStatus(
        name=name,
        state=state,
        attempt=last.number if last else 0,
        job=last.job if last else None,
        artifact=str(view.link.output),
        progress=f"{progress.step}/{progress.total}" if progress and progress.total else None,
        metrics=_metrics(view, observed, last),
        failure=reason.failure if reason and not view.exists else None,
        message=message,
        lowered=told(view.steps, view.down(view.counted[:-1])),
    )


def _state(
    view: _View, last: Attempt | None, suspend: bool, failure: StageFailure | None
) -> tuple[StageState, str | None]:
    """The state that status shows, and the one line beside it."""
    if failure is not None:
        return "Failed", failure.message
    if running := view.running:
        if running.held:
            return "Pending", running.held.message
        return "Running", running.progress.phase or None if running.progress else None
    if view.exists:
        return ("Succeeded" if last else "Reused"), None
    if not view.needed:
        return "Skipped", "everything that reads it exists"
    if suspend and last and last.interrupted:
        return "Suspended", None
    if view.held and not suspend:
        return "Pending", view.held.message
    if last and last.failure:
        limit = _most_attempts(view, last.failure.failure)
        return "Waiting", f"attempt {last.number} failed, at most {limit} are made: {last.failure.message}"
    return "Waiting", None


def _eta(views: Sequence[_View], stage: str, now: float) -> str | None:
    """The time that the stage has left, coarsely: status is not written for every second."""
    running = next((view.running for view in views if view.link.name == stage), None)
    seconds = seconds_left(running.progress, now) if running and running.progress else None
    if seconds is None:
        return None
    return duration(seconds) if seconds < 60 else duration(seconds - seconds % 60).replace(" 00 s", "")


def _metrics(view: _View, observed: Observed, last: Attempt | None) -> dict[str, float]:
    """Of the running attempt its progress, of a committed artifact its figures."""
    if str(view.link.output) in observed.artifacts:
        return dict(observed.artifacts[str(view.link.output)])
    return dict(last.progress.metrics) if last and last.progress else {}
