"""What passes between the operator and a stage: its StageConfig going in, its StageResult coming out."""

from typing import Annotated, Any, Literal

from pydantic import Field

from rlhf_api.canonical import canonical_json, sha256_of
from rlhf_api.errors import FailureClass
from rlhf_api.run import (
    GPU,
    PPO,
    SFT,
    Evaluate,
    LabelledData,
    Lora,
    Merge,
    Model,
    Natural,
    Positive,
    PreferenceData,
    PromptData,
    Quantization,
    Reward,
    Section,
    SFTData,
    Tracking,
)

Program = Literal["import-model", "import-data", "sft", "merge", "reward", "ppo", "evaluate"]
MAX_RESULT_BYTES = 4096  # Kubernetes truncates a longer termination message

# Raised when a stage's output changes meaning, so that artifacts of older code are not reused.
PROGRAM_VERSION: dict[Program, int] = {
    "import-model": 1,
    "import-data": 1,
    "sft": 1,
    "merge": 1,
    "reward": 1,
    "ppo": 2,
    "evaluate": 2,
}

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ArtifactKind = Literal[
    "model",
    "sft-data",
    "preference-data",
    "prompt-data",
    "evaluation-data",
    "sft-adapter",
    "merged-model",
    "reward-model",
    "policy",
    "evaluation",
]


class ArtifactRef(Section):
    """The address of an artifact: known before the artifact exists."""

    kind: ArtifactKind
    digest: Digest

    def __str__(self) -> str:
        return f"{self.kind}/{self.digest}"

    @classmethod
    def parse(cls, text: str) -> "ArtifactRef":
        """The address written as kind/digest. Raises ValueError for anything else."""
        kind, _, digest = text.partition("/")
        return cls.model_validate({"kind": kind, "digest": digest})


class StoreConfig(Section):
    """Which object store, never with credentials: those come from the environment."""

    url: str = Field(pattern=r"^(file:///|s3://).+", description="file:///folder or s3://bucket/prefix")
    endpoint: str | None = Field(None, description="S3 endpoint URL, http:// or https://")
    region: str | None = None


class RunIdentity(Section):
    """Whose stage this is. Not part of the digest: two runs with equal settings share artifacts."""

    name: str
    namespace: str = "default"
    uid: str = ""


class StageSettings(Section):
    """The parts of the spec that this stage reads, and no others, so that only they enter its digest."""

    model: Model | None = None
    sft_data: SFTData | None = None
    preference_data: PreferenceData | None = None
    prompt_data: PromptData | None = None
    prompt_tokens: Positive | None = Field(None, description="ppo.promptTokens, for the import of prompts alone.")
    evaluation_data: LabelledData | None = None
    fingerprint: str | None = Field(None, description="What the source's bytes looked like when the run was planned.")
    quantization: Quantization | None = None
    lora: Lora | None = None
    sft: SFT | None = None
    merge: Merge | None = None
    reward: Reward | None = None
    ppo: PPO | None = None
    evaluate: Evaluate | None = None
    seed: Natural = 0


class StageConfig(Section):
    """Everything a stage process needs to know, as one JSON document."""

    run: RunIdentity
    stage: str
    program: Program
    settings: StageSettings
    inputs: dict[str, ArtifactRef] = Field(default_factory=dict)
    output: ArtifactRef
    attempt: str = Field("1", pattern=r"^[A-Za-z0-9][A-Za-z0-9-]*$", description="Unique among writers of the output.")
    store: StoreConfig
    gpu: GPU = Field(default_factory=GPU)
    tracking: Tracking = Field(default_factory=Tracking)


def stage_digest(program: Program, settings: StageSettings, inputs: dict[str, ArtifactRef]) -> str:
    """The digest that addresses a stage's output: its settings, its inputs' digests and the program's version.

    Run identity, attempt, store and hardware do not enter: equal work has an equal address.
    """
    return sha256_of(
        {
            "program": program,
            "version": PROGRAM_VERSION[program],
            "settings": settings.model_dump(mode="json", by_alias=True, exclude_none=True),
            "inputs": {name: str(ref) for name, ref in inputs.items()},
        }
    )


class StageFailure(Section):
    """Why a stage ended without an artifact."""

    failure: FailureClass
    message: str
    checkpoint: str | None = Field(None, description="Last good checkpoint, if any.")


class StageResult(Section):
    """How a stage ended. Written as JSON of at most 4 KiB; the artifact is committed before it."""

    stage: str
    artifact: ArtifactRef | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    failure: StageFailure | None = None
    seconds: float = 0.0

    def to_bytes(self) -> bytes:
        """Canonical JSON of at most 4 KiB: metrics are dropped, then the message is cut, to keep it so."""
        result = self
        if len(result._dump()) > MAX_RESULT_BYTES:
            result = result.model_copy(update={"metrics": {}})
        if result.failure and (excess := len(result._dump()) - MAX_RESULT_BYTES) > 0:
            message = result.failure.message.encode()[: -excess - 16].decode(errors="ignore") + " …"
            result = result.model_copy(update={"failure": result.failure.model_copy(update={"message": message})})
        return result._dump()

    def _dump(self) -> bytes:
        document: Any = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        return canonical_json(document)


class Progress(Section):
    """How far a running stage is: replaced atomically in its working folder, served as metrics in a pod."""

    stage: str
    step: Natural = 0
    total: Natural = 0
    phase: str = Field("", description="What it is doing, in a word or two: loading, training, committing.")
    metrics: dict[str, float] = Field(default_factory=dict)
    started_at: float = Field(0.0, description="Unix time the stage began.")
    updated_at: float = Field(0.0, description="Unix time of this document.")
    eta_seconds: float | None = None
