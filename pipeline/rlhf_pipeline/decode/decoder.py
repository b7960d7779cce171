"""A causal model's decode step on fused kernels, over a static cache.

A model that it does not know, or whose first step differs from the model's own forward, is decoded by that forward.
"""

import logging
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from rlhf_pipeline.decode.layers import Layer, Linear, Norm, Unknown, launch_option, layers_of, mlp
from rlhf_pipeline.decode.nf4_gemm import Choice, dependent_launch, measured, padded_rows
from rlhf_pipeline.models import vocabulary_logits

log = logging.getLogger(__name__)

KEPT: Final = "_fused_decoder"
TIMED_LAYERS: Final = 16  # of one shape, so that their weights do not all stay in the card's cache
STATIC_ROPE: Final = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on the longest sequence seen


@dataclass
class Session:
    """One batch that is being decoded: its cache and where each row stands in it."""

    keys: list[Tensor]  # by layer: (rows, key heads, slots, head size)
    values: list[Tensor]
    first: Tensor  # (rows,) int32: the row's first real slot
    slot: Tensor  # (rows,) int32: where the next token goes; the caller moves it on
    trunk: Tensor | None = None  # (rows, slots, width): what comes out of `trunk_layers` layers is kept here
    trunk_layers: int = 0


@dataclass
class Decoder:
    """The layers of a model as the fused step runs them."""

    model: Any
    layers: list[Layer]
    norm: Norm
    heads: int
    key_heads: int
    head_size: int
    rotary: int  # how many of a head's values are rotated
    scale: float
    cos: Tensor = field(init=False)  # (positions, rotary)
    sin: Tensor = field(init=False)
    prepared: int = field(init=False, default=0)  # rows that tiles were chosen for
    choices: dict[tuple[tuple[int, int], int], Choice] = field(init=False, default_factory=dict)  # by shape and rows

    def __post_init__(self) -> None:
        device = self.norm.weight.device
        embedding = _rotary_embedding(self.model)
        positions = torch.arange(self.model.config.get_text_config().max_position_embeddings, device=device)[None]
        cos, sin = embedding(torch.empty(0, dtype=self.model.dtype, device=device), positions)
        self.cos, self.sin = cos[0].contiguous(), sin[0].contiguous()
        self.rotary = self.cos.shape[-1]
        self.chained = dependent_launch(device)

    def linears(self) -> list[Linear]:
        """Every linear layer of the stack."""
        found: list[Linear | None] = []
        for layer in self.layers:
            found += [*layer.inputs, layer.output, layer.gate, layer.up, layer.down]
        return [linear for linear in found if linear is not None]

    def prepare(self, rows: int) -> bool:
        """Choose tiles for so many rows and take over the active adapter.

        Returns whether tiles were chosen: whether a step may compute otherwise than the steps before.
        """
        linears, padded = self.linears(), padded_rows(rows)
        new = self.prepared != padded
        if new:
            by_shape: dict[tuple[int, int], list[Linear]] = {}
            for linear in linears:
                if linear.weight is not None:
                    by_shape.setdefault(linear.weight.shape, []).append(linear)
            for shape, alike in by_shape.items():
                if (shape, padded) not in self.choices:
                    some = alike[:TIMED_LAYERS]
                    weights = [linear.weight for linear in some if linear.weight is not None]
                    self.choices[shape, padded] = measured(
                        weights,
                        padded,
                        lambda x, some=some: [linear.base(x) for linear in some],  # type: ignore[misc]
                    )
                for linear in alike:
                    linear.tile = self.choices[shape, padded].best
            self.prepared = padded
        for linear in linears:
            linear.take_adapter()
        return new

    @torch.no_grad()
    def step(self, token: Tensor, session: Session, trunk_only: bool = False) -> Tensor:
        """Put each row's token into the cache at its slot and give the next one's logits: (rows, vocabulary).

        token: (rows,). trunk_only: end where the trunk does, and return that. Capturable in a CUDA graph.
        """
        x = self.model.get_input_embeddings()(token)
        first: Tensor | None = None
        second: Tensor | None = None
        for index, layer in enumerate(self.layers):
            other = layer.mlp_norm if layer.parallel else None
            x, normed, mlp_input = self._add_norms(x, first, second, layer.attention_norm, other)
            if session.trunk is not None and index == session.trunk_layers:
                session.trunk[self._rows(x), session.slot.long()] = x
                if trunk_only:
                    return x
            if layer.parallel:
                second = self._attend(layer, index, normed, session)
                first = mlp(layer, mlp_input)
            else:
                attended = self._attend(layer, index, normed, session)
                x, mlp_input, _ = self._add_norms(x, attended, None, layer.mlp_norm)
                first = mlp(layer, mlp_input)
        _, normed, _ = self._add_norms(x, first, second, self.norm)
        return vocabulary_logits(self.model, normed)

    def _rows(self, x: Tensor) -> Tensor:
        return torch.arange(len(x), device=x.device)

    def _attend(self, layer: Layer, index: int, x: Tensor, session: Session) -> Tensor:
        from rlhf_pipeline.decode.step_kernels import attend_kernel

        size, rows = self.head_size, x.shape[0]
        keys, values = session.keys[index], session.values[index]
        projected = [linear(x) for linear in layer.inputs]
        if len(projected) == 1:  # [query, key, value] of one head after the other
            whole = projected[0]
            query, key, value = whole, whole[:, size:], whole[:, 2 * size :]
            stride, key_stride = 3 * size, 3 * size
        else:
            query, key, value = projected
            stride, key_stride = size, size
        out = torch.empty(rows, self.heads * size, dtype=x.dtype, device=x.device)
        norms = layer.head_norms
        attend_kernel[(rows, self.heads)](
            query, key, value, keys, values, out, session.first, session.slot, self.cos, self.sin,
            out if norms is None else norms[0].weight, out if norms is None else norms[1].weight,
            0.0 if norms is None else norms[0].eps, self.scale,
            query.stride(0), stride, key.stride(0), key_stride, value.stride(0), key_stride,
            keys.stride(0), keys.stride(1),
            self.heads, self.heads // self.key_heads, size, 1 << (size - 1).bit_length(), self.rotary,
            norms is not None, 32, self.chained, num_warps=4, **launch_option(self.chained),
        )  # fmt: skip
        return layer.output(out)

    def _add_norms(
        self, x: Tensor, first: Tensor | None, second: Tensor | None, norm: Norm, other: Norm | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        from rlhf_pipeline.decode.step_kernels import add_norm_kernel

        rows, width = x.shape
        total = x if first is None else torch.empty_like(x)
        y = torch.empty_like(x)
        y2 = y if other is None else torch.empty_like(x)
        also = other or norm
        block = 1 << (width - 1).bit_length()
        add_norm_kernel[(rows,)](
            x, x if first is None else first, x if second is None else second, total,
            norm.weight, norm.weight if norm.bias is None else norm.bias, y,
            also.weight, also.weight if also.bias is None else also.bias, y2, norm.eps,
            width, block, (first is not None) + (second is not None), norm.rms, norm.bias is not None,
            other is not None, self.chained, num_warps=8 if block >= 4096 else 4, **launch_option(self.chained),
        )  # fmt: skip
        return total, y, y2


def decoder_of(model: Any) -> Decoder | None:
    """The fused decode step of `model`; None, said once in the log, if the model is not one that it knows.

    It is kept on the model, whose layers it refers to, and goes with it.
    """
    adapted = _adapted(model)
    known: tuple[int, Decoder | None] | None = model.__dict__.get(KEPT)
    # An adapter that is added to a layer without one wraps the layer: what was read before does not know of it.
    if known is None or known[0] != adapted:
        try:
            known = adapted, _read(model)
        except Unknown as reason:
            forget(model, reason)
            return None
        model.__dict__[KEPT] = known
    return known[1]


def forget(model: Any, reason: object) -> None:
    """Decode `model` with its own forward from now on."""
    log.warning("decoding with the model's own forward pass: %s", reason)
    model.__dict__[KEPT] = _adapted(model), None


def _adapted(model: Any) -> int:
    return sum(hasattr(module, "lora_A") for module in model.modules())


def _read(model: Any) -> Decoder:
    if reason := _unfit(model):
        raise Unknown(reason)
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in STATIC_ROPE:
        raise Unknown(f"rotary embeddings of type {rope.get('rope_type')}")
    layers, norm = layers_of(model)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return Decoder(model, layers, norm, heads, key_heads, size, 0, size**-0.5)


def _unfit(model: Any) -> str | None:
    if not model.get_input_embeddings().weight.is_cuda:
        return "no CUDA device"
    return None if model.dtype == torch.bfloat16 else f"activations in {model.dtype}"


def _rotary_embedding(model: Any) -> Any:
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            return module
    raise Unknown("no rotary embedding")
