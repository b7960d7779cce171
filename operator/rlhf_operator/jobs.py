"""The Job of one attempt at a stage, from the run, the link of its chain and the operator's settings. No I/O."""

from typing import Final

from rlhf_api.errors import UserError
from rlhf_api.names import (
    ANNOTATION_ASKED,
    ANNOTATION_DIGEST,
    API_VERSION,
    ENV_ACCESS_KEY,
    ENV_METRICS_PORT,
    ENV_SECRET_KEY,
    ENV_SESSION_TOKEN,
    ENV_STAGE_CONFIG,
    GPU_RESOURCE,
    KIND,
    LABEL_ATTEMPT,
    LABEL_QUEUE,
    LABEL_RUN,
    LABEL_STAGE,
    METRICS_PORT,
    STAGE_CONTAINER,
    STAGE_LABELS,
    STAGE_WORK,
    TERMINATION_LOG,
    job_name,
)
from rlhf_api.run import RLHFRun
from rlhf_operator.operator_settings import OperatorSettings
from rlhf_operator.pod_template import Document, overlaid
from rlhf_operator.stages import Link

TEMPLATE_PATH: Final = "spec.placement.podTemplate"
STAGE_TEMPLATE_PATH: Final = "spec.placement.stagePodTemplates"
MEMORY_VOLUME: Final = "shared-memory"
FOLDERS: Final = {"work": STAGE_WORK, "tmp": "/tmp"}
NO_GPU: Final = {"NVIDIA_VISIBLE_DEVICES": "void"}  # else NVIDIA's runtime shows every GPU of the node
THREADS: Final = "OMP_NUM_THREADS"
GPU_TOLERATION: Final = {"key": GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"}


def stage_job(run: RLHFRun, link: Link, number: int, settings: OperatorSettings, asked_at: float) -> Document:
    """The Job of attempt `number`: the same for the same arguments. It runs one pod, once; the plan alone retries.

    Raises UserError if spec.placement.podTemplate does not fit a pod.
    """
    labels = stage_labels(run, link, number)
    queue = (run.metadata.model_extra or {}).get("labels", {}).get(LABEL_QUEUE)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": job_name(run.metadata.name, link.name, number),
            "namespace": run.metadata.namespace or "default",
            "labels": labels | ({LABEL_QUEUE: queue} if queue else {}),
            "annotations": {ANNOTATION_DIGEST: link.output.digest, ANNOTATION_ASKED: f"{asked_at:.0f}"},
            "ownerReferences": [owner_reference(run)],
        },
        "spec": {
            "backoffLimit": 0,
            "completions": 1,
            "parallelism": 1,
            "template": _template(run, link, number, settings, labels),
        },
    }


def stage_labels(run: RLHFRun, link: Link, number: int) -> dict[str, str]:
    """The labels of the Job and its pod."""
    return STAGE_LABELS | {LABEL_RUN: run.metadata.name, LABEL_STAGE: link.name, LABEL_ATTEMPT: str(number)}


def owner_reference(run: RLHFRun) -> Document:
    """What makes the Job go when the run goes."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": run.metadata.name,
        "uid": run.metadata.uid or "",
        "controller": True,
        "blockOwnerDeletion": False,  # true would ask for a permission on the run's finalizers
    }


def _template(run: RLHFRun, link: Link, number: int, settings: OperatorSettings, labels: dict[str, str]) -> Document:
    template: Document = {"metadata": {"labels": labels}, "spec": _pod(run, link, number, settings)}
    overlays = {TEMPLATE_PATH: run.spec.placement.pod_template}
    if (own := run.spec.placement.stage_pod_templates.get(link.name)) is not None:
        overlays[f"{STAGE_TEMPLATE_PATH}.{link.name}"] = own
    for path, overlay in overlays.items():
        if unknown := sorted(set(overlay) - {"metadata", "spec"}):
            raise UserError(f"{path}.{unknown[0]}: unknown field; a pod template has metadata and spec")
        if emptied := [name for name, value in overlay.items() if value is None]:
            raise UserError(f"{path}.{emptied[0]}: is null; leave it out, or write what to change")
        template = overlaid(template, overlay, path)
        containers = [each for each in template["spec"].get("containers", []) if each["name"] == STAGE_CONTAINER]
        if not containers:
            raise UserError(f"{path}.spec.containers: has no {STAGE_CONTAINER}; leave that container in")
    # What the operator itself relies on is not the overlay's to change.
    template["metadata"]["labels"] = template["metadata"].get("labels", {}) | labels
    template["spec"]["restartPolicy"] = "Never"
    containers[0]["terminationMessagePath"] = TERMINATION_LOG
    _limit_threads(containers[0])
    return template


def _limit_threads(container: Document) -> None:
    """As many threads as CPUs that the container may use: libraries count the node's, and their threads would wait."""
    variables = container.get("env", [])
    limits = container.get("resources", {}).get("limits")
    if not isinstance(limits, dict) or "cpu" not in limits or THREADS in {each["name"] for each in variables}:
        return
    # The kubelet fills it in, rounded up.
    limit = {"name": THREADS, "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}
    container["env"] = [*variables, limit]


def _pod(run: RLHFRun, link: Link, number: int, settings: OperatorSettings) -> Document:
    placement, gpus = run.spec.placement, _gpus(run, link)
    tolerations = [*placement.tolerations, *([GPU_TOLERATION] if gpus else [])]
    memory = {"medium": "Memory", "sizeLimit": settings.shared_memory}
    pod = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": settings.grace_seconds,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "nodeSelector": dict(placement.node_selector),
        "tolerations": tolerations,
        "priorityClassName": settings.priority_class,
        "imagePullSecrets": [{"name": name} for name in settings.image_pull_secrets],
        "containers": [_container(run, link, number, settings, gpus)],
        "volumes": [
            *({"name": name, "emptyDir": {}} for name in FOLDERS),
            {"name": MEMORY_VOLUME, "emptyDir": memory},
        ],
    }
    return {name: value for name, value in pod.items() if value not in (None, [], {})}


def _container(run: RLHFRun, link: Link, number: int, settings: OperatorSettings, gpus: int) -> Document:
    folders = [{"name": name, "mountPath": path} for name, path in FOLDERS.items()]
    return {
        "name": STAGE_CONTAINER,
        "image": settings.image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["python", "-m", "rlhf_pipeline"],
        "args": ["--config", f"env:{ENV_STAGE_CONFIG}", "--work", STAGE_WORK, "--result", TERMINATION_LOG],
        "env": _environment(run, link, number, settings, gpus),
        "ports": [{"name": "metrics", "containerPort": METRICS_PORT}],
        "resources": _resources(settings, gpus),
        "terminationMessagePath": TERMINATION_LOG,
        # A process that died without a result leaves its last lines instead.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [*folders, {"name": MEMORY_VOLUME, "mountPath": "/dev/shm"}],
    }


def _environment(run: RLHFRun, link: Link, number: int, settings: OperatorSettings, gpus: int) -> list[Document]:
    store = settings.store_of(run.spec.object_store)
    # Runs of one name, in two namespaces or one after the other, may write the same artifact at once.
    writer = f"{run.metadata.name}-{(run.metadata.uid or '')[:8]}-{number}"
    config = link.config(run, store, writer)
    plain = {
        # The kubelet expands $(NAME) in values, and writes $ for $$.
        ENV_STAGE_CONFIG: config.model_dump_json(by_alias=True, exclude_none=True).replace("$", "$$"),
        ENV_METRICS_PORT: str(METRICS_PORT),
        "HOME": FOLDERS["tmp"],  # caches go there: the root is read-only
        **({} if gpus else NO_GPU),
    }
    variables: list[Document] = [{"name": name, "value": value} for name, value in plain.items()]
    if store.url.startswith("s3://"):
        secret = settings.secret_of(run.spec.object_store)
        for name in (ENV_ACCESS_KEY, ENV_SECRET_KEY, ENV_SESSION_TOKEN):
            source: Document = {"name": secret, "key": name}
            if name == ENV_SESSION_TOKEN:
                source["optional"] = True
            variables.append({"name": name, "valueFrom": {"secretKeyRef": source}})
    return variables


def _resources(settings: OperatorSettings, gpus: int) -> Document:
    found: Document = {"requests": {"ephemeral-storage": settings.ephemeral_storage}}
    found = overlaid(found, dict(settings.resources), "stage resources")
    if gpus:
        found = overlaid(found, dict(settings.gpu_resources), "GPU stage resources")
        found = overlaid(found, {"limits": {GPU_RESOURCE: str(gpus)}}, "GPU stage resources")
    return found


def _gpus(run: RLHFRun, link: Link) -> int:
    return link.gpus(run.spec) if link.stage.gpu else 0
