"""Every call to the Kubernetes API that the operator makes for its runs. Reads come from what the watches said."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final

from rlhf_api.names import (
    ANNOTATION_OUTCOME,
    ANNOTATION_STOPPED,
    API_VERSION,
    GROUP,
    KIND,
    OPERATOR_NAME,
    PLURAL,
    STAGE_CONTAINER,
    STAGE_LABELS,
    VERSION,
)
from rlhf_api.stage import Progress
from rlhf_operator.attempts import container_ended
from rlhf_operator.conditions import stamp
from rlhf_operator.kubernetes_api import ApiError, Invalid, KubernetesApi, NotFound
from rlhf_operator.pod_metrics import progress_from
from rlhf_operator.pod_template import Document
from rlhf_operator.run_events import RunEvent
from rlhf_operator.seen import Key, Kind, Seen

STAGES_SELECTOR: Final = ",".join(f"{name}={value}" for name, value in STAGE_LABELS.items())
MAX_EVENT: Final = 1024  # bytes of an event's message that the API takes
PAGE: Final = 500  # objects of a list at once
PREFIX: Final[dict[Kind, str]] = {"run": f"/apis/{GROUP}/{VERSION}", "job": "/apis/batch/v1", "pod": "/api/v1"}
PLURALS: Final[dict[Kind, str]] = {"run": PLURAL, "job": "jobs", "pod": "pods"}


class KubernetesCluster:
    """The cluster that `api` leads to.

    `may_write` is asked before each write and raises ApiError unless this operator leads.
    `namespaces`: of the runs; none for all.
    """

    def __init__(
        self, api: KubernetesApi, seen: Seen, namespaces: Sequence[str], may_write: Callable[[], None]
    ) -> None:
        self._api, self._seen, self._namespaces, self._may_write = api, seen, namespaces, may_write

    def run(self, namespace: str, name: str) -> Document | None:
        return self._seen.run((namespace, name))

    def jobs(self, namespace: str, run: str) -> list[Document]:
        return self._seen.of_run("job", (namespace, run))

    def pods(self, namespace: str, run: str) -> list[Document]:
        return self._seen.of_run("pod", (namespace, run))

    def job(self, namespace: str, name: str) -> Document | None:
        try:
            return self._api.request("GET", f"{_path('job', namespace)}/{name}")
        except NotFound:
            return None

    def create_job(self, job: Document) -> None:
        self._may_write()
        # Strict: a pod template's field that there is not would be dropped, and the run do without what it asked for.
        strict = {"fieldValidation": "Strict"}
        created = self._api.request("POST", _path("job", job["metadata"]["namespace"]), job, strict)
        self._seen.put("job", created)

    def stop_job(self, job: Document, now: float) -> None:
        """A deadline in the past ends the Job for good, with SIGTERM for its pod, whether or not a queue manages it.

        Suspending it instead would let a queue such as Kueue admit, and so start, it again.
        """
        stopped = {ANNOTATION_STOPPED: stamp(now)}
        self._patch_job(job, {"metadata": {"annotations": stopped}, "spec": {"activeDeadlineSeconds": 1}})

    def keep_outcome(self, job: Document, outcome: str) -> None:
        self._patch_job(job, {"metadata": {"annotations": {ANNOTATION_OUTCOME: outcome}}})

    def write_status(self, run: Document, patch: Document) -> None:
        self._may_write()
        versioned = {"metadata": {"resourceVersion": run["metadata"]["resourceVersion"]}, "status": patch}
        written = self._api.request("PATCH", f"{_path_of('run', run)}/status", versioned)
        self._seen.put("run", written)

    def runs(self) -> list[Document]:
        return [run for key in self._seen.runs() if (run := self._seen.run(key))]

    def set_finalizers(self, run: Document, finalizers: list[str]) -> None:
        self._may_write()
        metadata = {"resourceVersion": run["metadata"]["resourceVersion"], "finalizers": finalizers}
        try:
            written = self._api.request("PATCH", _path_of("run", run), {"metadata": metadata})
        except NotFound:
            return
        if not written["metadata"].get("deletionTimestamp") or written["metadata"].get("finalizers"):
            self._seen.put("run", written)

    def delete_run(self, run: Document) -> None:
        self._may_write()
        options = {"propagationPolicy": "Background", "preconditions": {"uid": run["metadata"]["uid"]}}
        try:
            self._api.request("DELETE", _path_of("run", run), options)
        except NotFound:
            return

    def record(self, run: Document, event: RunEvent) -> None:
        now = datetime.now(UTC)
        metadata = run["metadata"]
        message = event.message.encode()[:MAX_EVENT].decode(errors="ignore")
        document = {
            "metadata": {"generateName": f"{metadata['name']}.", "namespace": metadata["namespace"]},
            "involvedObject": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "name": metadata["name"],
                "namespace": metadata["namespace"],
                "uid": metadata["uid"],
                "resourceVersion": metadata["resourceVersion"],
            },
            "type": event.kind,
            "reason": event.reason,
            "message": message,
            "source": {"component": OPERATOR_NAME},
            "reportingComponent": OPERATOR_NAME,
            "firstTimestamp": stamp(now.timestamp()),
            "lastTimestamp": stamp(now.timestamp()),
            "count": 1,
        }
        try:
            self._may_write()
            self._api.request("POST", f"/api/v1/namespaces/{metadata['namespace']}/events", document)
        except (ApiError, Invalid):  # news for people; what is true stands in the status
            return

    def progress(self, pod: Document, stage: str) -> Progress | None:
        address = pod.get("status", {}).get("podIP")
        if not address or container_ended(pod, STAGE_CONTAINER):
            return None
        return progress_from(address, stage)

    def _patch_job(self, job: Document, patch: Document) -> None:
        self._may_write()
        try:
            patched = self._api.request("PATCH", _path_of("job", job), patch)
        except NotFound:
            return
        self._seen.put("job", patched)

    def list_all(self, kind: Kind) -> list[Key]:
        """Read every object of a kind, in case a watch missed something; returns the runs with news."""
        found: list[Document] = []
        versions = []
        for namespace in self._namespaces or ("",):
            documents, version = self._list(_path(kind, namespace), kind)
            found += documents
            versions.append(version)
        return self._seen.replace(kind, found, min(versions, key=int))

    def _list(self, path: str, kind: Kind) -> tuple[list[Document], str]:
        """The objects below a path, page by page, and the version of the API server they are of."""
        query = {"limit": str(PAGE)} | ({} if kind == "run" else {"labelSelector": STAGES_SELECTOR})
        found: list[Document] = []
        while True:
            page = self._api.request("GET", path, query=query)
            found += page["items"]
            if not (more := page["metadata"].get("continue")):
                return found, page["metadata"]["resourceVersion"]
            query["continue"] = more


def _path(kind: Kind, namespace: str) -> str:
    inside = f"/namespaces/{namespace}" if namespace else ""
    return f"{PREFIX[kind]}{inside}/{PLURALS[kind]}"


def _path_of(kind: Kind, document: Document) -> str:
    return f"{_path(kind, document['metadata']['namespace'])}/{document['metadata']['name']}"
