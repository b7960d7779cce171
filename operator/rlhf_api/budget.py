"""A first estimate of GPU memory: what each phase of each stage holds, from the model's shape and the run's settings.

Weights and caches are counted as they are allocated; activations and logits by factors fitted to GPT-NeoX-20B in NF4 on
an H200, with rank 16 on its attention. Measured peaks, in GiB, and how far the estimate is from each:

base alone                                          10.76   -0.2 %
KV cache, 8 rows of 1024 tokens                      8.25    0.0 %
train all 44 layers with checkpointing,    8 × 512  14.34   +2.0 %
                                          16 × 128  12.8    +1.1 %
                                          16 × 256  14.7    -0.5 %
the top 11 layers alone,                  16 × 256  13.1    -1.5 %

The phases of PPO are held against the peaks of whole updates of eight models of four families in
tests/api/measured_peaks.jsonl. Activations that are kept because there is room for them (`Roles.choosing_kept_layers`)
are not counted, nor is fragmentation, nor what other model families do differently: a run is refused only well above
the limit.
"""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Final

from rlhf_api.quantity import bytes_of
from rlhf_api.run import RunSpec

GIB = 2**30
CONTEXT_BYTES = GIB  # the driver's and CUDA's, outside PyTorch's pool
BYTES_PER_WEIGHT = {"nf4": 0.5625, "int8": 1.0}  # nf4: 4 bits and a 4-byte scale for 64 weights
DOUBLE_QUANT = 0.5159  # the scales themselves in 8 bits
MASTER_BYTES = 4  # adapters, heads and their gradients are float32
OPTIMIZER_BYTES = 2  # two moments of 8 bits
# What a layer holds of one token while it is computed again and differentiated, in values: the fitted factors.
WIDTHS = 12  # hidden-sized
INNER = 2  # intermediate-sized, for each matrix of the MLP
FORWARD_SHARE = 0.41  # of that, in a pass without gradients
LOGIT_ROWS = 512  # of a chunk of log-probabilities
LOGIT_COPIES = 3  # float32: logits, log-softmax, entropy
LOGIT_COPIES_TRAINED = 5.5  # and their gradients
DECODING_BYTES = 0.18 * GIB  # workspaces of the decode step and of its graph; a process keeps them

UNTIED: Final = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gptj", "phi", "phi3")  # unless config.json says so
PLAIN_MLP: Final = ("gpt_neox", "gpt2", "opt", "gpt_neo", "gptj", "bloom", "falcon", "phi", "mpt")  # no gate
FUSED_QKV: Final = ("gpt_neox", "gpt2", "bloom", "falcon", "phi3", "mpt")  # one matrix for query, key and value
FUSED_DECODE: Final = ("gpt_neox", "llama", "mistral", "qwen2", "qwen3")  # decoded by fused kernels, in nf4
# Field of the spec that memory grows with -> where it is in RunSpec.
KNOBS: Final[Mapping[str, tuple[str, str]]] = {
    "sft.microBatchSize": ("sft", "micro_batch_size"),
    "reward.microBatchSize": ("reward", "micro_batch_size"),
    "ppo.microBatchSize": ("ppo", "micro_batch_size"),
    "ppo.rolloutBatchSize": ("ppo", "rollout_batch_size"),
    "evaluate.batchSize": ("evaluate", "batch_size"),
}


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a dense causal transformer that memory depends on."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    mlp_matrices: int  # 3 where the MLP is gated
    vocabulary: int
    positions: int
    tied: bool
    fused_qkv: bool = False
    fused_decode: bool = False

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's linear layers."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return attention + self.mlp_matrices * self.hidden * self.intermediate

    @property
    def embedding_weights(self) -> int:
        """Weights of the embeddings and the output layer, which are not quantised."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def cached_values(self) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_size

    @property
    def working_values(self) -> int:
        """Values that one layer holds of one token at most, while it is computed again and differentiated."""
        return WIDTHS * self.hidden + INNER * self.mlp_matrices * self.intermediate

    def figures(self) -> dict[str, float]:
        """The shape as metrics of the imported model."""
        return {name: float(value) for name, value in asdict(self).items()}

    @classmethod
    def from_figures(cls, figures: Mapping[str, float]) -> "ModelShape | None":
        """The shape from `figures`; None if it is not there."""
        known = {field.name: field for field in fields(cls)}
        if any(field.default is MISSING and name not in figures for name, field in known.items()):
            return None
        values: dict[str, Any] = {name: int(figures[name]) for name in known if name in figures}
        return cls(**values | {name: bool(values.get(name)) for name in ("tied", "fused_qkv", "fused_decode")})


def shape_of(config: Mapping[str, Any]) -> ModelShape | None:
    """The shape in a model's config.json; None if its sizes are named as in no family known here."""
    config = config.get("text_config", config)

    def first(*names: str) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), None)

    family = config.get("model_type")
    hidden, layers = first("hidden_size", "n_embd", "d_model"), first("num_hidden_layers", "n_layer", "num_layers")
    heads, vocabulary = first("num_attention_heads", "n_head", "num_heads"), first("vocab_size")
    positions = first("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
    if None in (hidden, layers, heads, vocabulary, positions):
        return None
    return ModelShape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=first("num_key_value_heads") or heads,
        head_size=first("head_dim") or hidden // heads,
        intermediate=first("intermediate_size", "ffn_dim", "n_inner") or 4 * hidden,
        mlp_matrices=2 if family in PLAIN_MLP else 3,
        vocabulary=vocabulary,
        positions=positions,
        tied=bool(config.get("tie_word_embeddings", family not in UNTIED)),
        fused_qkv=family in FUSED_QKV,
        fused_decode=family in FUSED_DECODE,
    )


@dataclass(frozen=True)
class Phase:
    """One phase of a stage: what it holds, in bytes, and the field of the spec that makes it larger or smaller."""

    stage: str
    name: str
    terms: dict[str, float]
    knob: str | None = None

    @property
    def total(self) -> float:
        return sum(self.terms.values())


@dataclass(frozen=True)
class Budget:
    """Every phase of every stage that uses the GPU, and what PyTorch may take of it."""

    phases: list[Phase]
    available: float

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        return self.peak.total <= self.available


def budget(shape: ModelShape, spec: RunSpec) -> Budget:
    """The memory of each phase, in bytes, on one GPU. Phases of stages that the run skips are absent."""
    needs, gpus = _Needs(shape, spec), max(1, spec.gpu.count)
    ppo, tokens = spec.ppo, spec.ppo.prompt_tokens + spec.ppo.response_tokens
    trunk = {"trunk": 0.0 if spec.lora.layers == "all" else ppo.batch_size / gpus * tokens * needs.width}
    roles = 3 if spec.reward.classifier or spec.reward.function else 4  # whose rows are in one batch
    scored = roles * ppo.micro_batch_size * tokens
    forward = {
        "workspaces": DECODING_BYTES,
        # The largest layer while the logits of the rows before are still there, or those of the next after it.
        "one layer or logits": max(FORWARD_SHARE * scored * needs.working, (LOGIT_COPIES - 1) * needs.logits)
        + needs.logits,
    }
    rows = ppo.effective_rollout_batch_size(gpus)
    phases = [Phase("any", "load", {"base": needs.base, "tensor in 16 bits": needs.largest})]
    if spec.data.sft is not None:
        held = spec.sft.micro_batch_size * spec.sft.sequence_length
        phases.append(Phase("sft", "train", needs.training(shape.layers, 1, 1, held), "sft.microBatchSize"))
    if spec.reward.is_adapter:
        held = 2 * spec.reward.micro_batch_size * spec.reward.sequence_length
        phases.append(Phase("reward", "train", needs.training(needs.adapted, 1, 1, held), "reward.microBatchSize"))
    train = needs.training(needs.adapted, 3, 2, ppo.micro_batch_size * tokens)
    adapters = needs.common(3 * needs.adapted)
    return Budget(
        [
            *phases,
            Phase("ppo", "rollout", adapters | needs.decoding(rows, tokens, ppo.prompt_tokens), "ppo.rolloutBatchSize"),
            Phase("ppo", "score", adapters | trunk | forward, "ppo.microBatchSize"),
            Phase("ppo", "train", train | trunk, "ppo.microBatchSize"),
            Phase(
                "evaluate",
                "rollout",
                adapters | needs.decoding(spec.evaluate.batch_size, tokens, ppo.prompt_tokens),
                "evaluate.batchSize",
            ),
        ],
        bytes_of(spec.gpu.memory) - CONTEXT_BYTES,
    )


def suggestions(shape: ModelShape, spec: RunSpec) -> list[str]:
    """For each phase that does not fit, the largest setting that would, as a line for people. Empty if all fit."""
    found = budget(shape, spec)
    lines = {}
    for phase in found.phases:
        if phase.total <= found.available:
            continue
        needs = f"{phase.stage} {phase.name} needs {phase.total / GIB:.1f} GiB of {found.available / GIB:.1f}"
        size = _largest(shape, spec, phase.knob) if phase.knob else None
        if size is None:
            what = "no batch is small enough; use nf4, shorter sequences, fewer lora.layers or a larger GPU"
            lines[phase.stage, phase.name] = f"{needs}: {what}"
        else:
            lines[phase.stage, phase.name] = f"{needs}: set {phase.knob} to {size}"
    return list(lines.values())


def largest_sizes(shape: ModelShape, spec: RunSpec) -> dict[str, int | None]:
    """Each size of a batch that memory grows with -> the largest that fits and breaks no rule; None if none does."""
    knobs = dict.fromkeys(phase.knob for phase in budget(shape, spec).phases if phase.knob)
    return {knob: _largest(shape, spec, knob) for knob in knobs}


def sizes_that_fit(shape: ModelShape, spec: RunSpec) -> dict[str, int] | None:
    """The sizes to make smaller, each to the largest that fits: none if all fits already; None if nothing helps."""
    found, sizes = budget(shape, spec), {}
    for phase in found.phases:
        if phase.total > found.available:
            size = _largest(shape, spec, phase.knob) if phase.knob else None
            if not phase.knob or size is None:
                return None
            sizes[phase.knob] = size
    return sizes


def with_sizes(spec: RunSpec, sizes: Mapping[str, int]) -> RunSpec:
    """The spec with other sizes, such as `ppo.rolloutBatchSize`."""
    for knob, size in sizes.items():
        section, field = KNOBS[knob]
        spec = spec.model_copy(update={section: getattr(spec, section).model_copy(update={field: size})})
    return spec


def _largest(shape: ModelShape, spec: RunSpec, knob: str) -> int | None:
    gpus = max(1, spec.gpu.count)  # which share each batch
    whole = {
        "sft.microBatchSize": spec.sft.batch_size // gpus,
        "reward.microBatchSize": spec.reward.batch_size // gpus,
        "ppo.microBatchSize": spec.ppo.effective_mini_batch_size // gpus,
        "ppo.rolloutBatchSize": spec.ppo.batch_size // gpus,
        "evaluate.batchSize": spec.evaluate.samples,
    }[knob]
    for size in (part for part in range(whole, 0, -1) if whole % part == 0):
        found = budget(shape, with_sizes(spec, {knob: size}))
        if all(each.total <= found.available for each in found.phases if each.knob == knob):
            return size
    return None


class _Needs:
    """The terms that the phases share, in bytes."""

    def __init__(self, shape: ModelShape, spec: RunSpec) -> None:
        full = 4.0 if spec.quantization.compute_dtype == "float32" else 2.0
        per_weight = BYTES_PER_WEIGHT.get(spec.quantization.type, full)
        if spec.quantization.type == "nf4" and spec.quantization.double_quant:
            per_weight = DOUBLE_QUANT
        norms = shape.layers * 8 * shape.hidden
        self.shape, self.bytes = shape, full
        self.base = shape.layers * shape.layer_weights * per_weight + (shape.embedding_weights + norms) * full
        matrices = max(shape.intermediate, shape.head_size * (shape.heads + 2 * shape.kv_heads))
        self.largest = full * shape.hidden * max(matrices, shape.vocabulary)
        self.dequantised = full * shape.hidden * matrices if spec.quantization.type != "none" else 0.0
        self.width = shape.hidden * full
        self.working = shape.working_values * full
        self.logits = LOGIT_ROWS * shape.vocabulary * 4.0
        self.adapted = adapted_layers(shape, spec)
        self.adapter = adapter_weights(shape, spec)

    def common(self, adapter_layers: int) -> dict[str, float]:
        """The base, adapters on so many layers in all, and the layer that is dequantised at the time."""
        adapters = adapter_layers * self.adapter * MASTER_BYTES
        return {"base": self.base, "adapters": adapters, "dequantised layer": self.dequantised}

    def training(self, layers: int, held: int, trained: int, tokens: int) -> dict[str, float]:
        """A step with checkpointing through `layers`; `held` adapters are in memory and `trained` of them trained."""
        weights = trained * layers * self.adapter
        return self.common(held * layers) | {
            "gradients": weights * MASTER_BYTES,
            "optimizer": weights * OPTIMIZER_BYTES,
            "layer inputs": layers * tokens * self.width,
            # A layer is computed again after the logits are gone: the larger of the two counts.
            "one layer or logits": max(
                tokens * self.working, min(1.0, tokens / LOGIT_ROWS) * LOGIT_COPIES_TRAINED * self.logits
            ),
        }

    def decoding(self, rows: int, tokens: int, prompt: int) -> dict[str, float]:
        """A static cache for `rows` sequences of `tokens`, and one pass over their prompts."""
        return {
            "decode step": DECODING_BYTES + self.adapted * self.adapter * self.bytes,
            "cache": rows * tokens * self.shape.cached_values * self.bytes,
            "activations": FORWARD_SHARE * rows * prompt * self.working,
            "sampling": rows * self.shape.vocabulary * 4.0 * LOGIT_COPIES,
        }


def adapted_layers(shape: ModelShape, spec: RunSpec) -> int:
    """How many layers the adapters of PPO's roles sit on."""
    layers = spec.lora.layers
    return shape.layers if layers == "all" else min(shape.layers, int(layers.removeprefix("top:")))


def adapter_weights(shape: ModelShape, spec: RunSpec) -> float:
    """Weights of one layer's share of one adapter. Layers given by name count as attention."""
    query, key = shape.head_size * shape.heads, shape.head_size * shape.kv_heads
    attention = 2 * shape.hidden + 2 * query + 2 * key
    if not shape.fused_qkv:
        attention += 2 * shape.hidden
    mlp = shape.mlp_matrices * (shape.hidden + shape.intermediate)
    return float(spec.lora.rank * (attention + (mlp if spec.lora.target_modules == "all-linear" else 0)))
