"""`rlhf logs --cluster`: what the pods of a run's stages write, while they write it and after."""

import sys
import time
from typing import Final

from rlhf_api.errors import UserError
from rlhf_api.names import LABEL_ATTEMPT, LABEL_STAGE, STAGE_CONTAINER
from rlhf_operator.attempts import attempts_of
from rlhf_operator.cluster_options import ClusterOptions
from rlhf_operator.cluster_runs import ClusterRuns
from rlhf_operator.followed import status_of
from rlhf_operator.local import ENDED
from rlhf_operator.logs_command import nothing_of, print_head
from rlhf_operator.pod_template import Document

POLL_SECONDS: Final = 1.0


def show_cluster_log(name: str | None, where: ClusterOptions, stage: str | None, follow: bool) -> None:
    """Print the log of a run's newest attempt, at one stage if it is named. None: the run created last.

    With `follow`, wait for it to begin, go on until it ends and, where no stage is named, with those that come after
    until the run has ended. Raises UserError if there is no such run or no such log.
    """
    runs = ClusterRuns(where)
    run = runs.get(name) if name else runs.newest()
    begun = _begun(runs, run, stage)
    if not follow and not begun:
        raise UserError(nothing_of(run["metadata"]["name"], stage, map(_stage, runs.jobs(run))))
    past = {job["metadata"]["uid"] for job in begun[:-1]}
    while True:
        for job in begun:
            if job["metadata"]["uid"] not in past:
                past.add(job["metadata"]["uid"])
                _print_log(runs, run, job, follow)
        status = status_of(run)
        if not follow or (stage and past) or (status and status.phase in ENDED):
            return
        time.sleep(POLL_SECONDS)
        # In this order: what began before the run was seen to have ended is not missed.
        run = runs.get(run["metadata"]["name"])
        begun = _begun(runs, run, stage)


def _begun(runs: ClusterRuns, run: Document, stage: str | None) -> list[Document]:
    """The Jobs of a run, or of one of its stages, oldest first."""
    jobs = sorted(runs.jobs(run), key=lambda job: (job["metadata"]["creationTimestamp"], job["metadata"]["name"]))
    return [job for job in jobs if stage in (None, _stage(job))]


def _stage(job: Document) -> str:
    return str(job["metadata"]["labels"][LABEL_STAGE])


def _print_log(runs: ClusterRuns, run: Document, job: Document, follow: bool) -> None:
    name, stage, number = run["metadata"]["name"], _stage(job), job["metadata"]["labels"][LABEL_ATTEMPT]
    said = None
    while (why := _why_silent(pods := runs.pods(run, job), job)) is not None:
        if not follow:
            raise UserError(f"run {name!r}: {stage}, attempt {number} has no log: {why}")
        if why != said:
            said = why
            print(f"rlhf: {name}, {stage}, attempt {number}: {why}", file=sys.stderr, flush=True)
        if not pods and _has_ended(job):
            return
        time.sleep(POLL_SECONDS)
        job = next((each for each in runs.jobs(run) if each["metadata"]["uid"] == job["metadata"]["uid"]), job)
    print_head(name, stage, number)
    for line in runs.log(pods[-1], follow):
        print(line, flush=True)


def _why_silent(pods: list[Document], job: Document) -> str | None:
    """Why an attempt has written nothing yet, or no longer has what it wrote; None if its log can be read."""
    if not pods:
        return "its pod is gone" if _has_ended(job) else "it has no pod yet"
    status = pods[-1].get("status", {})
    states = [each.get("state", {}) for each in status.get("containerStatuses", []) if each["name"] == STAGE_CONTAINER]
    if any("running" in state or "terminated" in state for state in states):
        return None
    (attempt,) = next(iter(attempts_of([job], pods, {}, time.time()).values()))
    return attempt.held.message if attempt.held else f"its pod is {status.get('phase', 'Pending')}"


def _has_ended(job: Document) -> bool:
    conditions = job.get("status", {}).get("conditions") or []
    return any(each["type"] in ("Complete", "Failed") and each["status"] == "True" for each in conditions)
