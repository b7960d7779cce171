"""Every name that more than one place spells: API group, labels, environment variables, exit codes."""

import hashlib
from typing import Final

GROUP: Final = "rlhf.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "RLHFRun"
PLURAL: Final = "rlhfruns"
SINGULAR: Final = "rlhfrun"
SHORT_NAMES: Final = ("rlhf",)

LABEL_RUN: Final = f"{GROUP}/run"
LABEL_STAGE: Final = f"{GROUP}/stage"
LABEL_ATTEMPT: Final = f"{GROUP}/attempt"
LABEL_GPU_MEMORY: Final = f"{GROUP}/gpu-memory"
LABEL_QUEUE: Final = "kueue.x-k8s.io/queue-name"  # of a run, handed on to its Jobs
ANNOTATION_DIGEST: Final = f"{GROUP}/digest"  # of the artifact that a Job makes
ANNOTATION_ASKED: Final = f"{GROUP}/asked-at"  # Unix time at which the run was asked for when the Job was created
FINALIZER: Final = f"{GROUP}/artifacts"  # of a run whose artifacts are deleted with it
ANNOTATION_STOPPED: Final = f"{GROUP}/stopped-at"  # on a Job that was told to stop
ANNOTATION_OUTCOME: Final = f"{GROUP}/outcome"  # on a Job whose pod ended without an artifact: how, as JSON

# What every Job and pod of a stage carries, besides the run, the stage and the attempt.
OPERATOR_NAME: Final = "rlhf-operator"
STAGE_COMPONENT: Final = "stage"
STAGE_LABELS: Final = {
    "app.kubernetes.io/name": OPERATOR_NAME,
    "app.kubernetes.io/managed-by": OPERATOR_NAME,
    "app.kubernetes.io/component": STAGE_COMPONENT,
}
STAGE_NAMES: Final = (  # in the order of the chain
    "import-model", "import-sft", "import-preferences", "import-prompts", "import-evaluation",
    "sft", "merge", "reward", "ppo", "evaluate",
)  # fmt: skip
STAGE_CONTAINER: Final = "stage"
STAGE_WORK: Final = "/work"
TERMINATION_LOG: Final = "/dev/termination-log"
GPU_RESOURCE: Final = "nvidia.com/gpu"
MAX_NAME: Final = 63  # of a Job, so that its pods can be labelled with it

OPERATOR_HEALTH_PORT: Final = 8080
OPERATOR_METRICS_PORT: Final = 9091

# What a stage process reads from its environment; its StageConfig and working folder come as arguments.
ENV_ACCESS_KEY: Final = "AWS_ACCESS_KEY_ID"
ENV_SECRET_KEY: Final = "AWS_SECRET_ACCESS_KEY"
ENV_SESSION_TOKEN: Final = "AWS_SESSION_TOKEN"
ENV_STAGE_CONFIG: Final = "RLHF_STAGE_CONFIG"  # of a pod, whose arguments name it as env:RLHF_STAGE_CONFIG
ENV_METRICS_PORT: Final = "RLHF_METRICS_PORT"
ENV_RANKS: Final = "RLHF_RANKS"  # processes that share a training stage where gpu.count is 0: to try ranks on a CPU

# What a stage's pod serves while it runs.
METRICS_PORT: Final = 9090
METRIC_INFO: Final = "rlhf_stage_info"
METRIC_PHASE: Final = "rlhf_stage_phase"
METRIC_STEP: Final = "rlhf_stage_step"
METRIC_STEPS: Final = "rlhf_stage_steps"
METRIC_ETA: Final = "rlhf_stage_eta_seconds"
METRIC_STARTED: Final = "rlhf_stage_started_timestamp_seconds"
METRIC_UPDATED: Final = "rlhf_stage_updated_timestamp_seconds"
METRIC_FIGURE: Final = "rlhf_stage_metric"  # with the label name: the few figures of Progress
METRIC_LOGGED: Final = "rlhf_stage_logged"  # with the label name: everything the newest step logged
METRIC_HOST_MEMORY: Final = "rlhf_stage_peak_host_memory_bytes"
METRIC_GPU_MEMORY: Final = "rlhf_stage_peak_gpu_memory_bytes"

# Files in a stage's working folder.
STAGE_CONFIG_FILE: Final = "stage.json"
STAGE_RESULT_FILE: Final = "result.json"  # the pod's termination message
PROGRESS_FILE: Final = "progress.json"

# Exit codes of a stage process and of `rlhf run`.
EXIT_OK: Final = 0
EXIT_BUG: Final = 1
EXIT_USER: Final = 2
EXIT_GATE: Final = 3
EXIT_INFRASTRUCTURE: Final = 4
EXIT_OUT_OF_MEMORY: Final = 5
EXIT_INTERRUPTED: Final = 130

EXIT_CODES: Final = {
    "bug": EXIT_BUG,
    "user": EXIT_USER,
    "gate": EXIT_GATE,
    "infrastructure": EXIT_INFRASTRUCTURE,
    "outOfMemory": EXIT_OUT_OF_MEMORY,
}


def job_name(run: str, stage: str, attempt: int) -> str:
    """The name of the Job of one attempt: the same for the same attempt, another for any other; 63 characters at most.

    A run may have two hyphens in a row in its name, a stage has none: the last two part the run from its stage.
    """
    name = f"{run}--{stage}-{attempt}"
    if len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: MAX_NAME - 9].rstrip('-')}-{digest}"
