"""A run of a cluster as the display shows it, once or until it ends."""

import shlex
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

from pydantic import ValidationError

from rlhf_api.errors import UserError
from rlhf_api.names import OPERATOR_NAME
from rlhf_api.run import RunStatus, StageStatus
from rlhf_api.stage import Progress
from rlhf_operator.attempts import attempts_of
from rlhf_operator.cluster_runs import ClusterRuns
from rlhf_operator.conditions import unix_time
from rlhf_operator.kubernetes_api import ApiError
from rlhf_operator.local import ENDED, Show
from rlhf_operator.plan import Observed
from rlhf_operator.pod_template import Document

POLL_SECONDS: Final = 2.0
SILENT_SECONDS: Final = 20.0  # after which an operator should have looked at a run
PATIENCE_SECONDS: Final = 300.0  # with an API server that does not answer


def follow(runs: ClusterRuns, run: Document, show: Show, say: Callable[[str], None]) -> RunStatus:
    """Show the run until it has succeeded, failed or was suspended; returns its last status.

    An end that is older than `run` does not count. `say`: told what is worth a line besides.
    Raises UserError if it is deleted, ApiError if the API server is silent for minutes.
    """
    name, uid, generation = run["metadata"]["name"], run["metadata"]["uid"], run["metadata"]["generation"]
    heard = time.monotonic()
    silent: float | None = heard + SILENT_SECONDS
    lost = False
    while True:
        try:
            found = runs.find(name)
            jobs = runs.jobs(found) if found else []
        except ApiError as error:
            if time.monotonic() - heard > PATIENCE_SECONDS:
                raise
            if not lost:
                say(f"{name} goes on, but is not seen for now: {error}")
            lost = True
            time.sleep(POLL_SECONDS)
            continue
        if lost:
            say("the API server answers again")
        heard, lost = time.monotonic(), False
        if found is None or found["metadata"]["uid"] != uid:
            raise UserError(f"run {name!r} was deleted")
        status = status_of(found)
        if status is not None and (status.observed_generation or 0) >= generation:
            silent = None
            if status.stages:
                show(status, observed_of(status, jobs, time.time()))
            if status.phase in ENDED:
                return status
        elif silent is not None and time.monotonic() > silent:
            silent = None
            say(f"no operator has looked at {name} yet; see that one serves {runs.namespace}: {_operators(runs)}")
        time.sleep(POLL_SECONDS)


def status_of(run: Document) -> RunStatus | None:
    """The status of a run, None if it has none yet. Raises UserError if another version wrote it."""
    try:
        return RunStatus.model_validate(run["status"]) if run.get("status") else None
    except ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"run {run['metadata']['name']!r}: its status.{field} is of another version; use the operator's"
        ) from error


def observed_of(status: RunStatus, jobs: Iterable[Document], now: float) -> Observed:
    """What the display shows beside a status: the attempts with their times, and how far the running ones are."""
    attempts = attempts_of(jobs, (), {}, now)
    for stage in status.stages:
        if stage.state == "Running" and (made := attempts.get(stage.name)):
            made[-1] = replace(made[-1], progress=_progress(stage, now))
    asked_at = unix_time(status.asked_at) if status.asked_at else 0.0
    return Observed(attempts=attempts, asked_at=asked_at, status=status)


def _progress(stage: StageStatus, now: float) -> Progress | None:
    step, _, total = (stage.progress or "").partition("/")
    if not total:
        return None
    return Progress(
        stage=stage.name,
        step=int(step),
        total=int(total),
        phase=stage.message or "",
        metrics=stage.metrics,
        updated_at=now,
    )


def _operators(runs: ClusterRuns) -> str:
    labels = f"app.kubernetes.io/name={OPERATOR_NAME},app.kubernetes.io/component=operator"
    return shlex.join(replace(runs.options, namespace=None).kubectl("get", "pods", "--all-namespaces", "-l", labels))
