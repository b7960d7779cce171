"""A decoder layer as the fused step knows it: linear layers with 4-bit weights and adapters, norms, and their order.

`layers_of(model)` reads them off the modules of the families that it knows; weights stay where they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from rlhf_pipeline.decode.nf4_gemm import (
    RANK_STEP,
    Activation,
    LowRank,
    Tile,
    dependent_launch,
    nf4_gemm,
)
from rlhf_pipeline.nf4_weight import Nf4Weight
from rlhf_pipeline.stack import stack_of

ACTIVATIONS: Final[dict[str, Activation]] = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu", "swish": "silu", "relu": "relu",
}  # fmt: skip
LLAMA_LIKE: Final = ("llama", "mistral", "qwen2", "qwen3")


class Unknown(Exception):
    """The model has a part that the fused step does not know."""


class Linear:
    """A linear layer of the model, its 4-bit weight if it has one, and the adapter that is active on it."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.tuned = module if hasattr(module, "lora_A") else None
        self.dtype = dtype
        self.base: Any = module.base_layer if self.tuned is not None else module
        self.weight = Nf4Weight.of(self.base)
        self.out, self.inner = int(self.base.out_features), int(self.base.in_features)
        self.low_rank: LowRank | None = None
        self.tile: Tile | None = None  # None: the layer's own product

    def take_adapter(self) -> None:
        """Copy the active adapter's matrices, the scale in the second, into buffers that stay in place."""
        if self.tuned is None:
            return
        tuned: Any = self.tuned
        active = [name for name in tuned.active_adapters if name in tuned.lora_A]
        if len(active) > 1 or getattr(tuned, "lora_magnitude_vector", None):
            raise Unknown("more than one adapter at a time, or DoRA")
        if self.low_rank is None:
            rank = max(a.weight.shape[0] for a in tuned.lora_A.values())
            padded = -(-rank // RANK_STEP) * RANK_STEP
            like = {"dtype": self.dtype, "device": next(iter(tuned.lora_A.values())).weight.device}
            self.low_rank = LowRank(torch.zeros(padded, self.inner, **like), torch.zeros(self.out, padded, **like))
        if not active:
            self.low_rank.up.zero_()  # the buffers stay: a captured graph reads them
            return
        a, b = tuned.lora_A[active[0]].weight.detach(), tuned.lora_B[active[0]].weight.detach()
        self.low_rank.down[: a.shape[0]].copy_(a)
        self.low_rank.up[:, : b.shape[1]].copy_(b * tuned.scaling[active[0]])

    def __call__(self, x: Tensor, activation: Activation = "none") -> Tensor:
        """(rows, in) -> (rows, out)."""
        low = None if self.low_rank is None else _low(x, self.low_rank.down)
        up = None if self.low_rank is None else self.low_rank.up
        if self.weight is not None and self.tile is not None:
            return nf4_gemm(x, self.weight, self.tile, self.base.bias, low, up, activation)
        y: Tensor = self.base(x)
        if low is not None and up is not None:
            y = torch.addmm(y, low, up.T)
        return _activate(y, activation)


@dataclass(frozen=True)
class Norm:
    """A layer norm or, without a mean, an RMS norm."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    rms: bool

    @classmethod
    def of(cls, module: Any) -> "Norm":
        if isinstance(module, nn.LayerNorm):
            return cls(module.weight, module.bias, module.eps, rms=False)
        return cls(module.weight, None, module.variance_epsilon, rms=True)


@dataclass(frozen=True)
class Layer:
    """One decoder layer: attention and MLP, beside each other or one after the other."""

    attention_norm: Norm
    mlp_norm: Norm
    inputs: tuple[Linear, ...]  # one for query, key and value of each head in turn, or three
    output: Linear
    head_norms: tuple[Norm, Norm] | None  # of query and key
    gate: Linear | None
    up: Linear
    down: Linear
    activation: Activation
    parallel: bool


def layers_of(model: Any) -> tuple[list[Layer], Norm]:
    """The model's decoder layers and the norm above them. Raises Unknown for a family that is not known here."""
    config = model.config.get_text_config()
    stack = stack_of(model).layers

    def linear(module: Any) -> Linear:
        return Linear(module, model.dtype)

    if config.model_type == "gpt_neox":
        return [_neox(layer, config, linear) for layer in stack], Norm.of(model.gpt_neox.final_layer_norm)
    if config.model_type in LLAMA_LIKE:
        return [_llama(layer, config, linear) for layer in stack], Norm.of(model.model.norm)
    raise Unknown(f"models of type {config.model_type}")


def _neox(layer: Any, config: Any, linear: Callable[[Any], Linear]) -> Layer:
    return Layer(
        Norm.of(layer.input_layernorm),
        Norm.of(layer.post_attention_layernorm),
        (linear(layer.attention.query_key_value),),
        linear(layer.attention.dense),
        None,
        None,
        linear(layer.mlp.dense_h_to_4h),
        linear(layer.mlp.dense_4h_to_h),
        _activation(config.hidden_act),
        layer.use_parallel_residual,
    )


def _llama(layer: Any, config: Any, linear: Callable[[Any], Linear]) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    normed = hasattr(attention, "q_norm")
    return Layer(
        Norm.of(layer.input_layernorm),
        Norm.of(layer.post_attention_layernorm),
        (linear(attention.q_proj), linear(attention.k_proj), linear(attention.v_proj)),
        linear(attention.o_proj),
        (Norm.of(attention.q_norm), Norm.of(attention.k_norm)) if normed else None,
        linear(mlp.gate_proj),
        linear(mlp.up_proj),
        linear(mlp.down_proj),
        _activation(config.hidden_act),
        parallel=False,
    )


def mlp(layer: Layer, x: Tensor) -> Tensor:
    if layer.gate is None:
        return layer.down(layer.up(x, layer.activation))
    return layer.down(_gated(layer.gate(x, layer.activation), layer.up(x)))


def _low(x: Tensor, down: Tensor) -> Tensor:
    from rlhf_pipeline.decode.step_kernels import low_rank_kernel

    rank, inner = down.shape
    low = torch.empty(x.shape[0], rank, dtype=x.dtype, device=x.device)
    chained = dependent_launch(x.device)
    low_rank_kernel[(x.shape[0], rank // 4)](
        x, down, low, inner, rank, 4, 1024, chained, num_warps=4, **launch_option(chained)
    )
    return low


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    from rlhf_pipeline.decode.step_kernels import gated_kernel

    rows, size = gate.shape
    out = torch.empty_like(gate)
    chained = dependent_launch(gate.device)
    gated_kernel[(rows, -(-size // 1024))](gate, up, out, size, 1024, chained, num_warps=4, **launch_option(chained))
    return out


def _activate(y: Tensor, activation: Activation) -> Tensor:
    match activation:
        case "gelu":
            return nn.functional.gelu(y)
        case "gelu_tanh":
            return nn.functional.gelu(y, approximate="tanh")
        case "silu":
            return nn.functional.silu(y)
        case "relu":
            return nn.functional.relu(y)
        case "none":
            return y


def _activation(name: str) -> Activation:
    if name not in ACTIVATIONS:
        raise Unknown(f"the activation {name}")
    return ACTIVATIONS[name]


def launch_option(chained: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if chained else {}
