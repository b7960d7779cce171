"""Every name that more than one place spells: API group, labels, environment variables, exit codes."""

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
LABEL_GPU_MEMORY: Final = f"{GROUP}/gpu-memory"

# What a stage process reads from its environment; its StageConfig and working folder come as arguments.
ENV_ACCESS_KEY: Final = "AWS_ACCESS_KEY_ID"
ENV_SECRET_KEY: Final = "AWS_SECRET_ACCESS_KEY"
ENV_SESSION_TOKEN: Final = "AWS_SESSION_TOKEN"

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
