"""The phase and the conditions that status shows: one small function each, from what the plan found."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from rlhf_api.names import FINALIZER
from rlhf_api.run import Condition, Phase, RunStatus, StageStatus


@dataclass(frozen=True)
class Hold:
    """Why something that should run cannot yet: a CamelCase reason and a message for people."""

    reason: str
    message: str


def stamp(time: float) -> str:
    """A Unix time as the Kubernetes API writes it, to the second."""
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def unix_time(text: str) -> float:
    """The Unix time of a timestamp of the Kubernetes API. Raises ValueError if it is none."""
    return datetime.fromisoformat(text).timestamp()


def phase_of(stages: Sequence[StageStatus], failed: bool, suspend: bool, unfinished: bool) -> Phase:
    """The phase. It is not an end before the last process has ended, whatever the run is coming to.

    `unfinished`: whether any attempt has yet to end; those that wait for a node count.
    """
    states = {stage.state for stage in stages}
    if "Running" in states:
        return "Running"
    if unfinished:
        return "Pending"
    if failed:
        return "Failed"
    if stages[-1].state in ("Succeeded", "Reused"):
        return "Succeeded"
    if suspend:
        return "Suspended"
    return "Running" if any(stage.attempt for stage in stages) and "Pending" not in states else "Pending"


def valid(invalid: str | None) -> Condition:
    """Whether the spec keeps the rules; else each that it breaks."""
    return _condition("Valid", invalid is None, "Checked" if invalid is None else "Rejected", invalid or "")


def store_ready(
    problem: str | None, asked: bool, answer_seconds: float | None = None, before: RunStatus | None = None
) -> Condition:
    """Whether the object store answers; Unknown where only the stages have its credentials.

    The time it took to answer is said once, until it fails: a status is not written for each measurement.
    """
    if problem is not None:
        return _condition("StoreReady", False, "Unavailable", problem)
    if not asked:
        message = "spec.objectStore is not the operator's own; what the stages report is believed"
        return Condition(type="StoreReady", status="Unknown", reason="NotAsked", message=message)
    old = next((each for each in before.conditions if each.type == "StoreReady"), None) if before else None
    if old is not None and old.status == "True" and old.message:
        return _condition("StoreReady", True, "Answered", old.message)
    answers = "" if answer_seconds is None else f"answers in {max(1, round(answer_seconds * 1000))} ms"
    return _condition("StoreReady", True, "Answered", answers)


def deletion_waits(problem: str) -> Condition:
    """Why a run that is to be deleted with its artifacts is still there."""
    how = f"the run stays until its artifacts are deleted; without its finalizer {FINALIZER} it goes and they stay"
    return _condition("StoreReady", False, "DeletionWaits", f"{problem}; {how}")


def progressing(phase: Phase, stages: Sequence[StageStatus], hold: Hold | None) -> Condition:
    """Whether the run is on its way to an end, and what it waits for."""
    running = ", ".join(stage.name for stage in stages if stage.state == "Running")
    on_its_way = phase in ("Pending", "Running")
    if on_its_way and hold and not running:
        return _condition("Progressing", True, hold.reason, hold.message)
    return _condition("Progressing", on_its_way, phase, running)


def succeeded(phase: Phase) -> Condition:
    return _condition("Succeeded", phase == "Succeeded", phase)


def failed(phase: Phase, why: Hold | None) -> Condition:
    """Whether the run failed for good; the reason is the class of the failure."""
    return _condition("Failed", phase == "Failed", why.reason if why else "None", why.message if why else "")


def suspended(phase: Phase) -> Condition:
    return _condition("Suspended", phase == "Suspended", phase)


def dated(
    conditions: Sequence[Condition], before: RunStatus | None, generation: int | None, now: float
) -> list[Condition]:
    """`conditions` with the generation they are about and, on each, the time its status last changed."""
    known = {condition.type: condition for condition in before.conditions} if before else {}
    made = []
    for condition in conditions:
        old = known.get(condition.type)
        since = old.last_transition_time if old and old.status == condition.status else stamp(now)
        made.append(condition.model_copy(update={"last_transition_time": since, "observed_generation": generation}))
    return made


def _condition(kind: str, holds: bool, reason: str, message: str = "") -> Condition:
    return Condition(type=kind, status="True" if holds else "False", reason=reason, message=message)
