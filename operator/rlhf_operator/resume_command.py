"""`rlhf suspend` and `rlhf resume`: a run of a cluster stops with a checkpoint, and goes on from it."""

import time
from typing import Final

from rlhf_api.errors import StoreError
from rlhf_operator.cluster_options import ClusterOptions
from rlhf_operator.cluster_runs import ClusterRuns
from rlhf_operator.followed import status_of
from rlhf_operator.pod_template import Document

ENDED: Final = ("Succeeded", "Failed")
NOTICE_SECONDS: Final = 60.0  # for an operator to see that a run was suspended
POLL_SECONDS: Final = 0.5


def suspend_run(name: str, where: ClusterOptions) -> None:
    """Suspend a run and say so. One that has ended is left alone."""
    runs = ClusterRuns(where)
    if (phase := _ended(runs.get(name))) is not None:
        print(f"{name} has ended: its phase is {phase}")
        return
    runs.patch(name, _suspended(True))
    print(
        f"{name} is suspended: what runs saves a checkpoint and stops; `{where.command('resume', name)}` continues it"
    )


def resume_run(name: str, where: ClusterOptions) -> None:
    """Let a suspended run go on, or ask again for one that has ended, and say so."""
    runs = ClusterRuns(where)
    run = runs.get(name)
    if not run["spec"].get("suspend") and _ended(run) is None:
        print(f"{name} is not suspended")
        return
    asked_again(runs, run, _suspended(False))
    print(f"{name} is resumed; `{where.command('status', name)}` shows it")


def asked_again(runs: ClusterRuns, run: Document, patch: Document) -> Document:
    """The run after `patch`, which resumes it. One that has ended is suspended first: that makes it a new ask.

    Raises StoreError if no operator notices.
    """
    name = run["metadata"]["name"]
    if _ended(run) is not None and not _seen_suspended(run):
        if not run["spec"].get("suspend"):
            runs.patch(name, _suspended(True))
        deadline = time.monotonic() + NOTICE_SECONDS
        while not _seen_suspended(runs.get(name)):
            if time.monotonic() > deadline:
                raise StoreError(
                    f"{name}: is suspended, but no operator noticed in {NOTICE_SECONDS:.0f} s; see that one runs, then "
                    f"`{runs.options.command('resume', name)}`"
                )
            time.sleep(POLL_SECONDS)
    return runs.patch(name, patch)


def _suspended(suspend: bool) -> Document:
    return {"spec": {"suspend": suspend}}


def _ended(run: Document) -> str | None:
    """The phase of a run that has ended; None of another."""
    status = status_of(run)
    return status.phase if status and status.phase in ENDED else None


def _seen_suspended(run: Document) -> bool:
    status = status_of(run)
    return status is not None and status.suspend
