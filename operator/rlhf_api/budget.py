"""A first estimate of GPU memory: which stage needs how much for what, from the model's shape and the run's settings.

It is arithmetic, without margins: weights as stored, caches as allocated, activations counted per layer. tests hold it
against measured peaks of GPT-NeoX-20B; on those it is within 4 %. It is not yet used to refuse a run.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlhf_api.quantity import bytes_of
from rlhf_api.run import RunSpec

GIB = 2**30
CONTEXT_BYTES = GIB  # the driver's and CUDA's, outside PyTorch's pool
BYTES_PER_WEIGHT = {"nf4": 0.5625, "int8": 1.0, "none": 2.0}  # nf4: 4 bits and a 4-byte scale for 64 weights
DOUBLE_QUANT = 0.5159  # the scales themselves in 8 bits
MASTER_BYTES = 4  # adapters, heads and their gradients are float32
OPTIMIZER_BYTES = 2  # two moments of 8 bits
LAYER_TOKENS = (
    20  # hidden-sized 16-bit tensors that one layer holds at most while it is computed again and differentiated
)
FORWARD_TOKENS = 10  # the same in a forward pass
LOGIT_ROWS = 512  # of a chunk of log-probabilities
LOGIT_COPIES = 3  # float32: logits, log-softmax, gradient


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a causal transformer that memory depends on."""

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
    def cache_bytes(self) -> int:
        """16-bit keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_size * 2

    def figures(self) -> dict[str, float]:
        """The shape as metrics of the imported model."""
        return {name: float(value) for name, value in asdict(self).items()}

    @classmethod
    def from_figures(cls, figures: Mapping[str, float]) -> "ModelShape | None":
        """The shape from `figures`; None if it is not there."""
        names = cls.__dataclass_fields__
        if not names.keys() <= figures.keys():
            return None
        values: dict[str, Any] = {name: int(figures[name]) for name in names}
        return cls(**values | {"tied": bool(figures["tied"])})


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape in a model's config.json. Raises KeyError where a size is named as in none of the known families."""
    config = config.get("text_config", config)

    def first(*names: str) -> Any:
        return next(config[name] for name in names if config.get(name) is not None)

    try:
        hidden, heads = first("hidden_size", "n_embd"), first("num_attention_heads", "n_head")
        inner = config.get("intermediate_size") or config.get("ffn_dim") or config.get("n_inner") or 4 * hidden
        return ModelShape(
            hidden=hidden,
            layers=first("num_hidden_layers", "n_layer"),
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or hidden // heads,
            intermediate=inner,
            mlp_matrices=2 if config.get("model_type") in ("gpt_neox", "gpt2", "opt", "gpt_neo", "bloom") else 3,
            vocabulary=first("vocab_size"),
            positions=first("max_position_embeddings", "n_positions"),
            tied=bool(
                config.get("tie_word_embeddings", config.get("model_type") in ("gpt2", "opt", "gemma", "gemma2"))
            ),
        )
    except StopIteration:
        raise KeyError("the sizes in config.json have unknown names") from None


@dataclass(frozen=True)
class Phase:
    """One phase of a stage: what it holds, in bytes."""

    stage: str
    name: str
    terms: dict[str, float]

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
    """The memory of each phase, in bytes, on one GPU."""
    ppo = spec.ppo
    adapted = shape.layers if spec.lora.layers == "all" else int(spec.lora.layers.removeprefix("top:"))
    one_layer = _adapter_weights(shape, spec)
    trained = {"sft": one_layer * shape.layers, "reward": one_layer * adapted, "ppo": 2 * one_layer * adapted}
    held = trained | {"ppo": 3 * one_layer * adapted}
    base = {"base": _base_bytes(shape, spec)}
    largest = 2.0 * shape.hidden * max(shape.intermediate, shape.head_size * (shape.heads + 2 * shape.kv_heads))
    workspace = {"dequantised layer": largest} if spec.quantization.type != "none" else {}
    rows = min(ppo.rollout_batch_size or ppo.batch_size, ppo.batch_size)
    tokens = ppo.prompt_tokens + ppo.response_tokens
    trunk = 0 if spec.lora.layers == "all" else ppo.batch_size * tokens * shape.hidden * 2.0

    def common(stage: str) -> dict[str, float]:
        return base | {"adapters": held[stage] * MASTER_BYTES} | workspace

    def training(stage: str, layers: int, batch_tokens: int) -> dict[str, float]:
        one = batch_tokens * shape.hidden * 2.0
        logits = min(LOGIT_ROWS, batch_tokens) * shape.vocabulary * 4.0 * LOGIT_COPIES
        return common(stage) | {
            "gradients": trained[stage] * MASTER_BYTES,
            "optimizer": trained[stage] * OPTIMIZER_BYTES,
            "kept activations": layers * one,
            "one layer or logits": max(LAYER_TOKENS * one, logits),
        }

    phases = [
        Phase("sft", "train", training("sft", shape.layers, spec.sft.micro_batch_size * spec.sft.sequence_length)),
        Phase(
            "reward",
            "train",
            training("reward", adapted, 2 * spec.reward.micro_batch_size * spec.reward.sequence_length),
        ),
        Phase(
            "ppo",
            "rollout",
            common("ppo")
            | {
                "cache": rows * tokens * float(shape.cache_bytes),
                "prefill": FORWARD_TOKENS * rows * ppo.prompt_tokens * shape.hidden * 2.0,
                "sampling": rows * shape.vocabulary * 4.0 * LOGIT_COPIES,
            },
        ),
        Phase(
            "ppo",
            "score",
            common("ppo")
            | {"trunk": trunk, "forward": FORWARD_TOKENS * ppo.micro_batch_size * tokens * shape.hidden * 2.0},
        ),
        Phase("ppo", "train", training("ppo", adapted, ppo.micro_batch_size * tokens) | {"trunk": trunk}),
    ]
    if spec.data.sft is None:
        phases = phases[1:]
    return Budget(phases, bytes_of(spec.gpu.memory) - CONTEXT_BYTES)


def _base_bytes(shape: ModelShape, spec: RunSpec) -> float:
    per_weight = BYTES_PER_WEIGHT[spec.quantization.type]
    if spec.quantization.type == "nf4" and spec.quantization.double_quant:
        per_weight = DOUBLE_QUANT
    small = shape.layers * 8 * shape.hidden * 2.0  # norms and biases
    return shape.layers * shape.layer_weights * per_weight + shape.embedding_weights * 2.0 + small


def _adapter_weights(shape: ModelShape, spec: RunSpec) -> float:
    """Weights of one layer's share of one adapter. Layers given by name count as attention."""
    attention = 4 * shape.hidden + 2 * shape.head_size * (shape.heads + shape.kv_heads)
    mlp = shape.mlp_matrices * (shape.hidden + shape.intermediate)
    return float(spec.lora.rank * (attention + (mlp if spec.lora.target_modules == "all-linear" else 0)))
