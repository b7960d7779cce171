"""The events that a change of status is worth: what `kubectl describe` tells of a run."""

from dataclasses import dataclass
from typing import Literal

from rlhf_api.run import Condition, RunStatus, StageStatus


@dataclass(frozen=True)
class RunEvent:
    """One event on a run."""

    kind: Literal["Normal", "Warning"]
    reason: str
    message: str


def events_between(before: RunStatus | None, after: RunStatus) -> list[RunEvent]:
    """What happened between two statuses, in the order of the chain; equal statuses give none."""
    old = {stage.name: stage for stage in before.stages} if before else {}
    found = [event for stage in after.stages for event in _of_stage(old.get(stage.name), stage)]
    conditions = {each.type: each for each in before.conditions} if before else {}
    for condition in after.conditions:
        found += _of_condition(conditions.get(condition.type), condition)
    return found


def _of_stage(before: StageStatus | None, after: StageStatus) -> list[RunEvent]:
    old = before or StageStatus(name=after.name)
    name = after.name
    found = []
    if after.attempt > old.attempt and after.state in ("Running", "Pending", "Succeeded", "Failed"):
        if old.attempt and old.failure:
            how = f" with {after.lowered}" if after.lowered else ""
            found.append(RunEvent("Normal", "Retrying", f"{name}: attempt {after.attempt}{how}, after: {old.message}"))
        else:
            found.append(RunEvent("Normal", "StageStarted", f"{name}: attempt {after.attempt}, Job {after.job}"))
    if after.failure and (after.failure, after.attempt, after.message) != (old.failure, old.attempt, old.message):
        found.append(RunEvent("Warning", "StageFailed", f"{name}: {after.failure}: {after.message}"))
    if after.state != old.state:
        if after.state == "Succeeded":
            figures = ", ".join(f"{key} {value:.4g}" for key, value in sorted(after.metrics.items())[:4])
            found.append(RunEvent("Normal", "StageSucceeded", f"{name}: {figures}" if figures else name))
        elif after.state == "Reused":
            found.append(RunEvent("Normal", "StageReused", f"{name}: {after.artifact} was there already"))
        elif after.state == "Pending":
            found.append(RunEvent("Warning", "StagePending", f"{name}: {after.message}"))
        elif after.state == "Suspended":
            found.append(RunEvent("Normal", "StageSuspended", f"{name}: stopped at its last checkpoint"))
    return found


def _of_condition(before: Condition | None, after: Condition) -> list[RunEvent]:
    waits = after.reason == "DeletionWaits" and (before is None or before.reason != after.reason)
    if before is not None and before.status == after.status and not waits:
        return []
    match after.type, after.status:
        case "Succeeded", "True":
            return [RunEvent("Normal", "RunSucceeded", "every stage has its artifact")]
        case "Failed", "True":
            return [RunEvent("Warning", "RunFailed", f"{after.reason}: {after.message}")]
        case "Suspended", "True":
            return [RunEvent("Normal", "RunSuspended", "nothing runs; set spec.suspend to false to continue")]
        case "Suspended", "False" if before is not None:
            return [RunEvent("Normal", "RunResumed", "spec.suspend is false")]
        case "StoreReady", "False" if waits:
            return [RunEvent("Warning", "DeletionWaits", after.message)]
        case "StoreReady", "False":
            return [RunEvent("Warning", "StoreUnavailable", after.message)]
        case "FitsInMemory", "False":
            return [RunEvent("Warning", "DoesNotFitInMemory", after.message)]
        case "Valid", "False":
            return [RunEvent("Warning", "Rejected", after.message)]
    return []
