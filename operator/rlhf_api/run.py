"""The RLHFRun resource: what a person writes. Every field's default suits one 24 GB GPU."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
)
from pydantic.alias_generators import to_camel

from rlhf_api.names import API_VERSION

Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
Natural = Annotated[int, Field(ge=0, le=2**31 - 1)]
Rate = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# With a unit: 24 alone would be 24 bytes.
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)$", max_length=32)]
# A place to read from: hub, object store, file, or a file that an installed Python package ships.
Source = Annotated[str, Field(pattern=r"^(hf|s3|file|package)://.+$", max_length=1024)]
Name = Annotated[str, Field(max_length=256)]
# int-or-string, as Kubernetes calls it: the union that its schemas allow.
Label = Annotated[str, Field(max_length=256)] | int
ColumnName = Annotated[str, Field(min_length=1, max_length=256)]
Modules = Annotated[list[ColumnName], Field(min_length=1, max_length=64)]
# `module:callable`, importable in the stage's process.
Callable_ = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", max_length=256)]
# What S3 takes as a bucket, but for IP addresses, which a rule refuses.
Bucket = Annotated[
    str, Field(pattern=r"^[a-z0-9]+(-+[a-z0-9]+)*(\.[a-z0-9]+(-+[a-z0-9]+)*)*$", min_length=3, max_length=63)
]
# Nothing that a URL reads as its end, and no `.` or `..`, which S3's clients refuse.
Prefix = Annotated[
    str, Field(pattern=r"^([A-Za-z0-9_=-][A-Za-z0-9_.=-]*(/[A-Za-z0-9_=-][A-Za-z0-9_.=-]*)*/?)?$", max_length=256)
]
PORT = "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
Endpoint = Annotated[
    str,
    Field(pattern=rf"^https?://([A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\])(:{PORT})?/?$", max_length=256),
]


class Section(BaseModel):
    """A part of the resource: camelCase outside, unknown fields rejected, immutable once parsed."""

    model_config = ConfigDict(
        extra="forbid", alias_generator=to_camel, populate_by_name=True, frozen=True, allow_inf_nan=False
    )

    @model_serializer(mode="wrap")
    def _keep_meaningful_nulls(self, write: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        """A null that overrides a default is written even where nulls are left out: else the default would return."""
        document: dict[str, Any] = write(self)
        for name, field in type(self).model_fields.items():
            key = str(field.alias) if info.by_alias else name
            if info.exclude_none and field.default is not None and getattr(self, name) is None:
                document.setdefault(key, None)
        return document


class Model(Section):
    """The pretrained model."""

    source: Source = Field(
        description="hf://owner/name, s3://bucket/prefix, file:///folder, or package://module/path. "
        "A path that ends in .gguf is read as a GGUF file and dequantised."
    )
    revision: Name | None = Field(None, description="Commit, tag or branch of a hub model. Pin a commit.")
    pad_token: Name | None = Field(
        None, description="Token used as padding. Default: the tokenizer's, if it differs from EOS, else one is chosen."
    )


class Data(Section):
    """One table of rows: Parquet, CSV or JSON lines, or a hub data set."""

    source: Source = Field(description="Parquet, CSV or JSON lines file, or hf://datasets/owner/name[/subset or file].")
    revision: Name | None = Field(None, description="Commit, tag or branch of a hub data set.")
    split: Name = Field("train", description="Split of a hub data set.")
    where: dict[str, Label] = Field(
        default_factory=dict,
        max_length=16,
        description="Keep rows whose columns equal these values: text or whole numbers, 1 or 0 for a boolean.",
    )
    rows: str | None = Field(
        None,
        pattern=r"^[0-9]{1,3}%:[0-9]{1,3}%$",
        max_length=9,
        description="Keep this range of the rows in their hashed order, such as 0%:70%. "
        "Ranges of one source that do not overlap share no text.",
    )
    limit: Positive | None = Field(None, description="Keep at most this many rows.")
    held_out: Fraction = Field(0.05, description="Fraction of rows kept for validation, chosen by hash.")


class SFTData(Data):
    """Texts for supervised fine-tuning."""

    text_column: ColumnName = Field("text", description="Column that holds the text.")


class PreferenceData(Data):
    """Pairs of a preferred and a rejected text: as two columns, or made from labelled texts."""

    chosen_column: ColumnName | None = Field(None, description="Column that holds the preferred text.")
    rejected_column: ColumnName | None = Field(None, description="Column that holds the rejected text.")
    prompt_column: ColumnName | None = Field(None, description="Column put before both texts.")
    text_column: ColumnName | None = Field(None, description="With labelColumn: column that holds the text.")
    label_column: ColumnName | None = Field(
        None, description="Column of labels: a row with chosenLabel is paired with a row without it."
    )
    chosen_label: Label | None = Field(
        None, description="The label whose texts are preferred: text or a whole number, 1 or 0 for a boolean."
    )


class PromptData(Data):
    """Prompts for the rollouts."""

    prompt_column: ColumnName = Field("prompt", description="Column that holds the prompt.")
    overflow: Literal["error", "truncate", "drop"] = Field(
        "error", description="What becomes of a prompt longer than ppo.promptTokens. truncate keeps its beginning."
    )


class LabelledData(Data):
    """Labelled texts that an independent scorer is fitted on."""

    text_column: ColumnName = Field("text", description="Column that holds the text.")
    label_column: ColumnName = Field("label", description="Column that holds the label.")
    chosen_label: Label = Field(
        1, description="The label that counts as good: text or a whole number, 1 or 0 for a boolean."
    )


class DataSets(Section):
    """The tables a run reads."""

    sft: SFTData | None = Field(None, description="Texts for the sft stage.")
    preferences: PreferenceData | None = Field(None, description="Pairs for the reward stage.")
    prompts: PromptData = Field(description="Prompts for the rollouts and the evaluation.")
    evaluation: LabelledData | None = Field(
        None, description="Labelled texts for a scorer that saw neither training set; keep its rows disjoint."
    )


class Quantization(Section):
    """How the one base is held in memory."""

    type: Literal["nf4", "int8", "none"] = Field("nf4", description="nf4: 4 bit. int8: 8 bit. none: 16 or 32 bit.")
    double_quant: bool = Field(
        True, description="Quantise nf4's scales as well: 0.516 instead of 0.563 bytes a weight."
    )
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Type of activations. auto: bfloat16 on a GPU, float32 on a CPU."
    )


class Lora(Section):
    """The adapters: SFT's, and those of policy, critic and reward."""

    rank: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="Rank of the update matrices.")
    alpha: Positive = Field(32, description="Scale: the update counts alpha / rank (alpha / sqrt(rank) with rsLoRA).")
    dropout: Fraction = Field(0.0, description="Dropout before the adapter, in sft only; PPO runs without.")
    target_modules: Literal["attention", "all-linear"] | Modules = Field(
        "attention", description="attention, all-linear, or names of linear layers such as [q_proj, v_proj]."
    )
    layers: str = Field(
        "all",
        pattern=r"^(all|top:[1-9][0-9]*)$",
        max_length=16,
        description="Layers that policy, critic and reward adapt: all, or top:k, which shares the trunk below. "
        "sft always adapts all.",
    )
    use_rslora: bool = Field(False, description="Rank-stabilised scaling.")
    use_dora: bool = Field(False, description="Weight-decomposed adapters, in sft only.")


class SFT(Section):
    """Supervised fine-tuning of an adapter."""

    steps: Positive = Field(1000, description="Optimiser steps.")
    batch_size: Positive = Field(16, description="Sequences a step.")
    micro_batch_size: Positive = Field(1, description="Sequences a forward pass; divides batchSize.")
    sequence_length: Annotated[int, Field(ge=8)] = Field(512, description="Tokens a sequence, at most.")
    learning_rate: Rate = Field(2e-4, description="Peak learning rate.")
    warmup_steps: Natural = Field(0, description="Steps of linear warm-up.")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="Decay after the warm-up.")
    checkpoint_steps: Positive = Field(100, description="Steps between checkpoints.")


class Merge(Section):
    """The SFT adapter merged into the 16-bit weights."""

    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="Type of the merged weights.")
    shard_size: Quantity = Field("2Gi", description="Size of a weight file at most, such as 2Gi.")


class Classifier(Section):
    """A sequence-classification model as the reward."""

    source: Source = Field(description="hf://owner/name, s3://bucket/prefix or file:///folder.")
    revision: Name | None = Field(None, description="Commit, tag or branch of a hub model.")
    label: Name = Field(description="Name of the class whose logit is the reward.")


class Reward(Section):
    """Where the reward comes from: a trained adapter (default), a classifier, or a function."""

    steps: Positive = Field(500, description="Optimiser steps.")
    batch_size: Positive = Field(16, description="Pairs a step.")
    micro_batch_size: Positive = Field(1, description="Pairs a forward pass; divides batchSize.")
    sequence_length: Annotated[int, Field(ge=8)] = Field(512, description="Tokens a text, at most.")
    learning_rate: Rate = Field(1e-4, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="Decay.")
    checkpoint_steps: Positive = Field(100, description="Steps between checkpoints.")
    min_accuracy: Fraction = Field(
        0.6, description="Held-out pair accuracy below which the run stops: PPO would chase noise."
    )
    compare_base: bool = Field(
        True, description="Measure what quantisation costs: score the held-out pairs on the 16-bit base as well."
    )
    classifier: Classifier | None = Field(None, description="Use a classifier; nothing is trained.")
    function: Callable_ | None = Field(
        None, description="module:callable taking (prompts, responses), two lists of texts; returns a list of numbers."
    )

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter on the base, and no classifier or function."""
        return self.classifier is None and self.function is None


class AdaptiveKL(Section):
    """A controller that moves klCoefficient towards a target KL."""

    target: Annotated[float, Field(gt=0)] = Field(6.0, description="KL to the reference, nats a response.")
    horizon: Positive = Field(10000, description="Episodes over which the coefficient may double or so.")


class PPO(Section):
    """Proximal policy optimisation of the policy adapter."""

    episodes: Positive = Field(20000, description="Responses in all, rounded up to whole batches.")
    batch_size: Positive = Field(64, description="Episodes a rollout.")
    mini_batch_size: Positive | None = Field(None, description="Episodes an optimiser step. Default: batchSize / 4.")
    micro_batch_size: Positive = Field(8, description="Episodes a forward pass; divides miniBatchSize.")
    rollout_batch_size: Positive | None = Field(
        None,
        description="Episodes decoded together on a GPU; divides its share of batchSize. "
        "Default: the share's largest divisor up to 32.",
    )
    epochs: Positive = Field(4, description="Passes over each rollout.")
    prompt_tokens: Positive = Field(64, description="Tokens of a prompt, at most.")
    response_tokens: Positive = Field(128, description="Tokens of a response, at most.")
    temperature: Annotated[float, Field(gt=0, le=10)] = Field(1.0, description="Of the policy and the reference alike.")
    learning_rate: Rate = Field(1e-5, description="Of the policy adapter.")
    critic_learning_rate: Rate | None = Field(None, description="Of the critic. Default: learningRate.")
    schedule: Literal["constant", "linear"] = Field("linear", description="Decay of both learning rates.")
    kl_coefficient: Annotated[float, Field(ge=0)] = Field(0.05, description="Weight of the per-token KL penalty.")
    adaptive_kl: AdaptiveKL | None = Field(None, description="Let klCoefficient follow a target.")
    max_kl: Annotated[float, Field(gt=0)] | None = Field(
        None, description="KL to the reference, nats a response, at which training ends early, keeping the policy."
    )
    abort_kl: Annotated[float, Field(gt=0)] = Field(
        200.0, description="KL, nats a response, that counts as an explosion: the stage fails."
    )
    update_kl: Annotated[float, Field(gt=0)] | None = Field(
        None, description="KL between the rollout's policy and the current one at which a batch's epochs end early."
    )
    clip_range: Annotated[float, Field(gt=0, lt=1)] = Field(0.2, description="Clip of the probability ratio.")
    value_clip_range: Annotated[float, Field(gt=0)] = Field(0.2, description="Clip of the value's move.")
    value_coefficient: Annotated[float, Field(gt=0)] = Field(0.1, description="Weight of the value loss.")
    gamma: Fraction = Field(1.0, description="Discount.")
    gae_lambda: Fraction = Field(0.95, alias="lambda", description="Lambda of generalised advantage estimation.")
    whiten_rewards: bool = Field(False, description="Whiten per-token rewards, keeping their mean.")
    normalize_reward: bool = Field(
        True, description="Scale the score to mean 0 and variance 1 over responses of the reference at the start."
    )
    missing_eos_penalty: Annotated[float, Field(ge=0)] | None = Field(
        1.0, description="Score of a response without EOS becomes minus this. null: score it as it is."
    )
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Gradient norm is clipped to this.")
    checkpoint_steps: Positive = Field(20, description="Rollouts between checkpoints.")
    sample_steps: Positive = Field(10, description="Rollouts between logged generations.")

    @property
    def rollouts(self) -> int:
        """Whole batches of episodes."""
        return -(-self.episodes // self.batch_size)

    @property
    def effective_mini_batch_size(self) -> int:
        """Episodes an optimiser step: miniBatchSize, else a quarter of batchSize if micro-batches divide it, or all."""
        quarter, rest = divmod(self.batch_size, 4)
        fits = rest == 0 and quarter >= self.micro_batch_size and quarter % self.micro_batch_size == 0
        return self.mini_batch_size or (quarter if fits else self.batch_size)

    def effective_rollout_batch_size(self, gpus: int) -> int:
        """Episodes decoded together on each GPU: rolloutBatchSize, else the largest divisor of its share up to 32."""
        share = self.batch_size // max(1, gpus)
        divisors = (size for size in range(32, 0, -1) if share % size == 0)
        return self.rollout_batch_size or next(divisors)


class Scorer(Section):
    """A scorer that training never saw."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,30}$", max_length=31)] = Field(
        description="Name in the report: lower-case letters, digits and hyphens, 31 at most."
    )
    function: Callable_ | None = Field(None, description="module:callable, as reward.function.")
    fitted: bool = Field(False, description="Fit a bag-of-words classifier on data.evaluation.")


class Evaluate(Section):
    """The SFT policy against the PPO policy on held-out prompts."""

    samples: Annotated[int, Field(ge=2, le=2**31 - 1)] = Field(64, description="Held-out prompts, at most.")
    batch_size: Positive = Field(16, description="Prompts decoded together.")
    temperature: Annotated[float, Field(ge=0, le=10)] = Field(1.0, description="0: greedy.")
    scorers: list[Scorer] = Field(default_factory=list, max_length=8, description="Independent scorers.")


class GPU(Section):
    """The accelerator each training stage asks for."""

    memory: Quantity = Field(
        "24Gi", description="Memory of one GPU, such as 24Gi. On a larger card a stage keeps within it."
    )
    count: Natural = Field(
        1, description="GPUs of sft, reward and ppo, which share each batch, 8 at most. 0: run on the CPU."
    )
    shorten_on_out_of_memory: bool = Field(
        False,
        description="Where smaller batches did not help, halve sft.sequenceLength, reward.sequenceLength or "
        "ppo.responseTokens, down to 64. That changes what is learnt: the artifacts are those of the shorter lengths.",
    )


class Placement(Section):
    """Where the pods may run."""

    node_selector: dict[str, Name] = Field(default_factory=dict, max_length=32, description="Labels a node must have.")
    tolerations: list[dict[str, Any]] = Field(
        default_factory=list, max_length=32, description="Taints the pods tolerate."
    )
    pod_template: dict[str, Any] = Field(default_factory=dict, description="Strategic patch on every stage's pod.")
    stage_pod_templates: dict[str, dict[str, Any]] = Field(
        default_factory=dict, max_length=16, description="Stage, such as ppo, to a patch on its pods, over podTemplate."
    )


class ObjectStore(Section):
    """Where artifacts live. Defaults come from the chart, or from the command line."""

    bucket: Bucket | None = Field(None, description="Bucket: lower-case letters, digits, dots and hyphens, 3 to 63.")
    prefix: Prefix | None = Field(
        None, description="Key prefix inside the bucket: folders of letters, digits and _=-. that begin with no dot."
    )
    endpoint: Endpoint | None = Field(None, description="S3 endpoint: http://host:port or https://host:port.")
    credentials_secret: Name | None = Field(None, description="Secret with the access and the secret key.")


class ArtifactPolicy(Section):
    """What becomes of the run's artifacts."""

    on_delete: Literal["Keep", "Delete"] = Field(
        "Keep",
        description="When the run is deleted. Keep: artifacts stay, and equal runs reuse them. "
        "Delete: those that no other run of the cluster names are deleted first.",
    )


class Fork(Section):
    """Another run, of the same namespace and store, whose artifacts this one takes over as they are."""

    run: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?$", max_length=52)] = Field(
        description="Name of the other run: lower-case letters, digits and hyphens. It is waited for."
    )
    stage: Literal["import-model", "sft", "merge", "reward", "ppo"] = Field(
        description="The last stage to take over, with all that it was made from. "
        "What this spec says of those stages is not read."
    )


class Tracking(Section):
    """Optional experiment trackers; TensorBoard files are always written."""

    wandb_project: Name | None = Field(None, description="Weights & Biases project.")
    mlflow_uri: Name | None = Field(None, description="MLflow tracking URI.")


class RunSpec(Section):
    """What to align, on what data, and how."""

    model: Model
    data: DataSets
    quantization: Quantization = Field(default_factory=Quantization)
    lora: Lora = Field(default_factory=Lora)
    sft: SFT = Field(default_factory=SFT)
    merge: Merge = Field(default_factory=Merge)
    reward: Reward = Field(default_factory=Reward)
    ppo: PPO = Field(default_factory=PPO)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    gpu: GPU = Field(default_factory=GPU)
    placement: Placement = Field(default_factory=Placement)
    object_store: ObjectStore = Field(default_factory=ObjectStore)
    tracking: Tracking = Field(default_factory=Tracking)
    fork_from: Fork | None = Field(None, description="Take over another run's artifacts up to one of its stages.")
    artifacts: ArtifactPolicy = Field(default_factory=ArtifactPolicy)
    seed: Natural = Field(0, description="Seed of everything random.")
    suspend: bool = Field(False, description="Stop after the current checkpoint and wait.")
    active_deadline_seconds: Positive | None = Field(
        None, description="Seconds after which a run that has not ended fails; counted anew when it is resumed."
    )
    ttl_seconds_after_finished: Natural | None = Field(
        None, description="Seconds after its end at which the run and its Jobs are deleted; its artifacts stay."
    )


class Metadata(BaseModel):
    """Kubernetes object metadata, as far as this project reads it."""

    model_config = ConfigDict(extra="allow", alias_generator=to_camel, populate_by_name=True)

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?$")] = Field(
        description="Lower-case letters, digits and hyphens, 52 at most."
    )
    namespace: str | None = None
    uid: str | None = None
    generation: int | None = None


class Condition(Section):
    """A Kubernetes condition."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str = ""
    observed_generation: int | None = None
    last_transition_time: str | None = None


Phase = Literal["Pending", "Running", "Suspended", "Succeeded", "Failed"]
StageState = Literal["Waiting", "Pending", "Running", "Succeeded", "Reused", "Skipped", "Failed", "Suspended"]


class StageStatus(Section):
    """One stage as status shows it."""

    name: str
    state: StageState = "Waiting"
    attempt: Natural = 0
    job: str | None = None
    artifact: str | None = Field(None, description="kind/digest")
    progress: str | None = Field(None, description="step/total")
    metrics: dict[str, float] = Field(default_factory=dict)
    failure: str | None = Field(None, description="Class of the last attempt's failure.")
    message: str | None = None
    lowered: str | None = Field(
        None, description="What the last attempt had smaller than the spec says, since earlier ones ran out of memory."
    )


class StoreStatus(Section):
    """Where a run's artifacts are, for those who read them."""

    url: str = Field(description="s3://bucket/prefix, or file:///folder of a volume.")
    endpoint: str | None = Field(None, description="S3 endpoint URL; AWS where there is none.")
    region: str | None = None
    credentials_secret: str | None = Field(None, description="Secret in the run's namespace with the store's keys.")


class RunStatus(Section):
    """What the operator, or the local runner, has seen and decided."""

    phase: Phase = "Pending"
    stage: str | None = Field(None, description="The stage that runs, or is next.")
    progress: str | None = Field(None, description="Of that stage: step/total.")
    eta: str | None = Field(None, description="Of that stage: the time left by its pace so far, such as 12 min.")
    reward: float | None = Field(None, description="The last figure of the reward in ppo.")
    observed_generation: int | None = None
    asked_at: str | None = Field(
        None, description="When the run was created or last resumed: earlier failures are forgiven."
    )
    suspend: bool = Field(False, description="What spec.suspend was when the run was last looked at.")
    store: StoreStatus | None = Field(None, description="Where the artifacts are.")
    taken: dict[str, str] = Field(
        default_factory=dict,
        description="Of spec.forkFrom: stage to kind/digest, as first seen; empty where that run skipped the stage.",
    )
    conditions: list[Condition] = Field(default_factory=list)
    stages: list[StageStatus] = Field(default_factory=list)
    budget: list[dict[str, Any]] = Field(default_factory=list)


class RLHFRun(BaseModel):
    """One run of the chain."""

    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, populate_by_name=True, frozen=True)

    api_version: Literal["rlhf.dev/v1alpha1"] = API_VERSION  # type: ignore[assignment]
    kind: Literal["RLHFRun"] = "RLHFRun"
    metadata: Metadata
    spec: RunSpec
    status: RunStatus | None = None
