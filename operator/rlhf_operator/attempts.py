"""The attempts that a run's Jobs and their pods amount to: what the plan observes of a cluster. No I/O.

A pod may be gone at any look, with all that it said. So how one ended is kept on its Job when it is first seen.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from pydantic import ValidationError

from rlhf_api.names import (
    ANNOTATION_ASKED,
    ANNOTATION_DIGEST,
    ANNOTATION_OUTCOME,
    ANNOTATION_STOPPED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_OUT_OF_MEMORY,
    LABEL_ATTEMPT,
    LABEL_STAGE,
    STAGE_CONTAINER,
)
from rlhf_api.run import Section
from rlhf_api.stage import Progress, StageFailure, StageResult
from rlhf_operator.conditions import Hold, unix_time
from rlhf_operator.plan import Attempt
from rlhf_operator.pod_template import Document
from rlhf_operator.seen import POD_ENDED

SIGTERM_EXIT: Final = 128 + 15  # a container that SIGTERM ended before it could handle it
SIGKILL_EXIT: Final = 128 + 9
# Waiting for these is not starting: somebody has to do something.
BLOCKED: Final = (
    "ImagePullBackOff",
    "ErrImagePull",
    "ErrImageNeverPull",
    "InvalidImageName",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
)
NO_POD_SECONDS: Final = 15.0  # after a Job began, in which it would have made its pod
SLOW_SECONDS: Final = 120.0  # after a pod got its node, in which most have an image, their volumes, and start
LOST_SECONDS: Final = 60.0  # after a pod should have been gone: its node does not answer
MAX_LAST_LINES: Final = 600  # characters of a log's end that a message quotes


class Outcome(Section):
    """How the pod of an attempt ended, as its Job keeps it."""

    pod: str
    """Its uid: a queue may give one Job several pods, one after the other."""
    exit_code: int | None = None
    result: StageResult | None = None


def attempts_of(
    jobs: Iterable[Document], pods: Iterable[Document], progress: Mapping[str, Progress], now: float
) -> dict[str, list[Attempt]]:
    """Stage -> its attempts, oldest first. `progress`: pod uid -> what that pod last said of itself.

    Jobs of another maker, without the labels of a stage, are left out.
    """
    by_job = _by_job(pods)
    found: dict[str, list[Attempt]] = {}
    for job in jobs:
        labels = job["metadata"].get("labels", {})
        stage, number = labels.get(LABEL_STAGE, ""), labels.get(LABEL_ATTEMPT, "")
        if stage and number.isdecimal():
            attempt = _attempt(job, by_job.get(job["metadata"]["uid"], []), stage, int(number), progress, now)
            found.setdefault(stage, []).append(attempt)
    return {stage: sorted(made, key=lambda attempt: attempt.number) for stage, made in found.items()}


def outcomes_to_keep(jobs: Iterable[Document], pods: Iterable[Document], now: float) -> list[tuple[Document, str]]:
    """Each Job whose pod has ended, with what its annotation should say of that: nothing that it says already.

    Nothing either of what is known without the pod: a success by its artifact, that one was told to stop by the Job.
    """
    by_job = _by_job(pods)
    found = [(job, _outcome_to_keep(job, by_job.get(job["metadata"]["uid"], []), now)) for job in jobs]
    return [(job, outcome.model_dump_json(by_alias=True, exclude_none=True)) for job, outcome in found if outcome]


def container_ended(pod: Document, name: str) -> Document | None:
    """The `terminated` state of one container of a pod; None while it has not ended."""
    statuses: list[Document] = pod.get("status", {}).get("containerStatuses") or []
    state: Document = next((each.get("state", {}) for each in statuses if each["name"] == name), {})
    return state.get("terminated")


def _by_job(pods: Iterable[Document]) -> dict[str, list[Document]]:
    found: dict[str, list[Document]] = {}
    for pod in pods:
        for owner in pod["metadata"].get("ownerReferences", []):
            found.setdefault(owner["uid"], []).append(pod)
    return found


def _attempt(
    job: Document, pods: Sequence[Document], stage: str, number: int, progress: Mapping[str, Progress], now: float
) -> Attempt:
    annotations = job["metadata"].get("annotations", {})
    created = unix_time(job["metadata"]["creationTimestamp"])
    attempt = Attempt(
        number=number,
        digest=annotations.get(ANNOTATION_DIGEST, ""),
        # What was created for an ask counts as begun after it, whatever the clocks of two machines say.
        started=max(created, float(annotations.get(ANNOTATION_ASKED) or 0)),
        job=job["metadata"]["name"],
        progress=next((progress[pod["metadata"]["uid"]] for pod in pods if pod["metadata"]["uid"] in progress), None),
    )
    alive = any(_is_alive(pod, now) for pod in pods)
    ended = _ended(job, bool(pods))
    if ended is None and _stopped_before_it_ran(job):
        ended = unix_time(annotations[ANNOTATION_STOPPED])
    if ended is None or alive:
        return _with(attempt, held=_hold(job, pods, now))
    exit_code, result = _outcome(job, pods, stage)
    return _with(attempt, finished=ended, exit_code=exit_code, result=result)


def _with(attempt: Attempt, **changes: Any) -> Attempt:
    return Attempt(**{**attempt.__dict__, **changes})


def _condition(owner: Document, kind: str) -> Document | None:
    found: list[Document] = owner.get("status", {}).get("conditions") or []
    return next((each for each in found if each["type"] == kind and each["status"] == "True"), None)


def _ended(job: Document, has_pods: bool) -> float | None:
    """When the Job ended. One that has failed but waits for the pod of a lost node to be gone counts as ended."""
    for kind in ("Complete", "Failed", *(["FailureTarget"] if has_pods else [])):
        if condition := _condition(job, kind):
            return unix_time(condition["lastTransitionTime"])
    return None


def _stopped_before_it_ran(job: Document) -> bool:
    """Told to stop while a queue held the Job back: its deadline, which would end it, does not run then."""
    return _stopped(job) and bool(job["spec"].get("suspend"))


def _is_alive(pod: Document, now: float) -> bool:
    """Whether the pod may still be at work. Its deletion is due at a time that its grace period leads to."""
    due = pod["metadata"].get("deletionTimestamp")
    if due and now > unix_time(due) + LOST_SECONDS:
        return False
    return pod.get("status", {}).get("phase") not in POD_ENDED


def _outcome(job: Document, pods: Sequence[Document], stage: str) -> tuple[int | None, StageResult | None]:
    """Exit code and result of an attempt that ended: both None if it was told to stop, no result if nobody saw it."""
    newest, kept = _newest(pods), _kept(job)
    if kept is not None and (newest is None or newest["metadata"]["uid"] == kept.pod):
        return kept.exit_code, kept.result
    ended = _terminated(newest) if newest else None
    stopped = _stopped(job)
    if ended is not None:
        code, text = int(ended["exitCode"]), str(ended.get("message") or "")
        result = _result(text)
        if result is not None and (code != EXIT_INTERRUPTED or result.artifact is not None):
            return code, result
        told = code in (EXIT_INTERRUPTED, SIGTERM_EXIT)
        if told and not stopped and newest and _evicted(newest):  # else a pod over its own limit would never fail
            return None, _failed(stage, "infrastructure", _loss(job, newest))
        if told or stopped:
            return EXIT_INTERRUPTED, result
        return _without_result(stage, newest or {}, ended, code, text)
    if stopped:
        return None, None
    if _condition(job, "Complete"):
        return EXIT_OK, None
    return None, _failed(stage, "infrastructure", _loss(job, newest))


def _outcome_to_keep(job: Document, pods: Sequence[Document], now: float) -> Outcome | None:
    newest, kept = _newest(pods), _kept(job)
    if newest is None or any(_is_alive(pod, now) for pod in pods):
        return None
    if kept is not None and kept.pod == newest["metadata"]["uid"]:
        return None
    # The Job says so later than its pod, and may do so when that is gone. A pod whose node is lost may yet come back.
    over = newest.get("status", {}).get("phase") in POD_ENDED or _ended(job, True) is not None
    if not over or job["spec"].get("suspend"):  # a queue that took its pod back will give it another one
        return None
    code, result = _outcome(job, pods, job["metadata"].get("labels", {}).get(LABEL_STAGE, ""))
    told_to_stop = _stopped(job) and code == EXIT_INTERRUPTED
    if (
        (result is None and code in (None, EXIT_OK))
        or (result is not None and result.artifact is not None)
        or told_to_stop
    ):
        return None
    return Outcome(pod=newest["metadata"]["uid"], exit_code=code, result=result)


def _newest(pods: Sequence[Document]) -> Document | None:
    return max(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")), default=None)


def _kept(job: Document) -> Outcome | None:
    try:
        return Outcome.model_validate_json(job["metadata"].get("annotations", {}).get(ANNOTATION_OUTCOME, ""))
    except ValidationError:  # there is none, or another version wrote it
        return None


def _stopped(job: Document) -> bool:
    return ANNOTATION_STOPPED in job["metadata"].get("annotations", {})


def _without_result(
    stage: str, pod: Document, ended: Document, code: int, text: str
) -> tuple[int | None, StageResult | None]:
    """What a container that ended without a result means."""
    if ended.get("reason") == "OOMKilled":
        message = "out of host memory: the pod was killed at its memory limit, which placement.podTemplate can raise"
        return EXIT_OUT_OF_MEMORY, _failed(stage, "outOfMemory", message)
    if disruption := _disruption(pod):
        return code, _failed(stage, "infrastructure", disruption)
    if code == SIGKILL_EXIT:  # for memory it would say so; a stage does not kill itself
        return code, _failed(stage, "infrastructure", "the stage was killed (SIGKILL), and not at its memory limit")
    last = f"; its last lines: {text.strip()[-MAX_LAST_LINES:]}" if text.strip() else ""
    return code, _failed(stage, "bug", f"the stage exited with code {code} and left no result{last}")


def _failed(stage: str, failure: Any, message: str) -> StageResult:
    return StageResult(stage=stage, failure=StageFailure(failure=failure, message=message))


def _result(text: str) -> StageResult | None:
    try:
        return StageResult.model_validate_json(text)
    except ValidationError:
        return None


def _terminated(pod: Document) -> Document | None:
    found = container_ended(pod, STAGE_CONTAINER)
    # What a kubelet that lost a container writes; nobody saw it end.
    return None if found is not None and found.get("reason") == "ContainerStatusUnknown" else found


def _loss(job: Document, pod: Document | None) -> str:
    """Why a Job failed whose container was never seen to end."""
    if pod and (disruption := _disruption(pod)):
        return disruption
    if pod and (reason := pod.get("status", {}).get("reason")):
        return f"the pod was lost ({reason}): {pod['status'].get('message') or 'its node gave no message'}"
    failed = _condition(job, "Failed") or {}
    if failed.get("reason") not in (None, "BackoffLimitExceeded"):
        return f"the Job ended: {failed['reason']}: {failed.get('message', '')}"
    return "the pod was deleted, or its node was lost, before the stage ended"


def _evicted(pod: Document) -> bool:
    """Whether the kubelet put the pod out, for what it or others take of the node."""
    return bool(pod.get("status", {}).get("reason") == "Evicted")


def _disruption(pod: Document) -> str | None:
    if _evicted(pod):
        return f"the pod was evicted: {pod['status'].get('message', '')}"
    if condition := _condition(pod, "DisruptionTarget"):
        return f"the pod was disrupted ({condition.get('reason')}): {condition.get('message', '')}"
    return None


def _hold(job: Document, pods: Sequence[Document], now: float) -> Hold | None:
    """Why an attempt that has not ended is not running, if somebody or something has to act first."""
    if job["spec"].get("suspend"):
        return Hold("Queued", "the Job is suspended: a queue has yet to admit it")
    status = job.get("status", {})
    began = status.get("startTime")
    if began and not pods and not status.get("active") and now - unix_time(began) >= NO_POD_SECONDS:
        name = job["metadata"]["name"]
        why = "the namespace's Pod Security level, a quota or a webhook may refuse it"
        return Hold("NoPod", f"the Job {name} has no pod: {why}; kubectl describe job {name} says which")
    return next((hold for pod in pods if (hold := _pod_hold(pod, now))), None)


def _pod_hold(pod: Document, now: float) -> Hold | None:
    status = pod.get("status", {})
    for condition in status.get("conditions") or []:
        waits = condition["type"] == "PodScheduled" and condition["status"] == "False"
        if waits and condition.get("reason") in ("Unschedulable", "SchedulingGated"):
            return Hold(condition["reason"], condition.get("message") or "no node takes the pod")
    first, then = (status.get(kind) or [] for kind in ("initContainerStatuses", "containerStatuses"))
    for each in [*first, *then]:
        waiting = _state(each, "waiting") or {}
        if waiting.get("reason") in BLOCKED:
            return Hold(waiting["reason"], waiting.get("message") or f"container {each['name']} cannot start")
    placed = _condition(pod, "PodScheduled")
    stage: Document = next((each for each in then if each["name"] == STAGE_CONTAINER), {})
    begun = status.get("phase") != "Pending" or _state(stage, "running") is not None
    if begun or placed is None or now - unix_time(placed["lastTransitionTime"]) < SLOW_SECONDS:
        return None
    # A sidecar is an init container that counts as started, and need not end.
    at_work = [each["name"] for each in first if _state(each, "running") is not None and not each.get("started")]
    return _slow(pod, stage, next(iter(at_work), None))


def _slow(pod: Document, stage: Document, initialising: str | None) -> Hold:
    """A pod that has a node and does not start. Why is told in events, which the operator may not read."""
    name, minutes = pod["metadata"]["name"], f"{SLOW_SECONDS / 60:.0f} minutes"
    reason = (_state(stage, "waiting") or {}).get("reason") or "ContainerCreating"
    if initialising is not None:
        return Hold(reason, f"init container {initialising} has not ended {minutes} after the pod {name} got its node")
    why = "a large image is still pulled, or a volume, Secret or ConfigMap that it mounts is missing"
    how = f"kubectl describe pod {name} says which"
    return Hold(reason, f"the pod {name} has not started {minutes} after it got its node: {why}; {how}")


def _state(container: Document, kind: str) -> Document | None:
    found: Document | None = container.get("state", {}).get(kind)
    return found
