"""Where kopf meets the operator: `kopf run -m rlhf_operator.handlers --liveness=http://0.0.0.0:8080/healthz`.

Only events are watched. A create, update or field handler would write its annotations on Jobs and pods, and a delete
handler's finalizer would keep every run from being deleted while no operator is there.
"""

import logging
import os
from typing import Any

import kopf

from rlhf_api.errors import RLHFError
from rlhf_api.names import GROUP, PLURAL, STAGE_LABELS, VERSION
from rlhf_operator.cluster import PAGE, STAGES_SELECTOR
from rlhf_operator.controller import Controller
from rlhf_operator.kubernetes_api import KubernetesApi
from rlhf_operator.operator_settings import OperatorSettings


class NoDiffs(kopf.DiffBaseStorage):  # type: ignore[misc]
    """Nothing to compare objects by: no handler asks for changes, and copying each object took a third of the time."""

    def build(self, **_: Any) -> dict[str, Any]:
        return {}

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None


@kopf.on.startup()
async def begin(settings: kopf.OperatorSettings, memo: kopf.Memo, **_: Any) -> None:
    """Start the controller. A wrong setting ends the process, saying which."""
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)  # else a line for every event of every object
    settings.posting.enabled = False  # events on a run are the reconcile's to write
    settings.persistence.diffbase_storage = NoDiffs()
    settings.peering.standalone = True  # a Lease says who leads
    for kind in ("jobs", "pods"):  # else those of the whole cluster would be sent here
        settings.watching.label_selectors[kind] = STAGES_SELECTOR
    settings.watching.chunk_size = PAGE
    settings.watching.server_timeout = 240
    settings.watching.client_timeout = 270
    try:
        ours = OperatorSettings.from_environment(os.environ)
        memo.controller = Controller(ours, KubernetesApi(connections=ours.workers + 4))
    except RLHFError as error:
        raise kopf.PermanentError(str(error)) from error
    memo.controller.start()


@kopf.on.cleanup()
async def end(memo: kopf.Memo, **_: Any) -> None:
    """Stop, and let another operator lead."""
    if "controller" in memo:
        await memo.controller.stop()


@kopf.on.probe(id="operator")
async def health(memo: kopf.Memo, **_: Any) -> dict[str, Any]:
    """Alive while runs are looked at, not merely while a thread is."""
    try:
        found: dict[str, Any] = memo.controller.health()
    except RLHFError as error:
        raise kopf.PermanentError(str(error)) from error
    return found


@kopf.on.event(GROUP, VERSION, PLURAL)
async def run_heard(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:
    memo.controller.heard("run", event["type"], dict(event["object"]))


@kopf.on.event("batch", "v1", "jobs", labels=STAGE_LABELS)
async def job_heard(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:
    memo.controller.heard("job", event["type"], dict(event["object"]))


@kopf.on.event("", "v1", "pods", labels=STAGE_LABELS)
async def pod_heard(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:
    memo.controller.heard("pod", event["type"], dict(event["object"]))
