"""Rotary embeddings of query and key in one kernel, in place of the dozen that transformers' formula takes.

Source of the formula: RoFormer, https://arxiv.org/abs/2104.09864, equation 34, in the layout of GPT-NeoX: the second
half of the rotated values holds each pair's other member.
"""

import sys
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

FAMILIES: Final = ("gpt_neox", "llama", "mistral", "qwen2", "qwen3")  # whose formula is this one
HEADS: Final = 16  # a program's
Rotate = Callable[..., tuple[Tensor, Tensor]]


def fuse_rotary(model: nn.Module) -> None:
    """Put the kernel in place of the family's own function, for every model of it in this process.

    What the kernel does not know, such as tensors on a CPU, still goes to that function.
    """
    config: Any = model.config
    if config.get_text_config().model_type not in FAMILIES:
        return
    module: Any = sys.modules[type(model).__module__]
    own = module.apply_rotary_pos_emb
    if getattr(own, "own", None) is None:
        module.apply_rotary_pos_emb = _fused(own)


def unfuse_rotary(model: nn.Module) -> None:
    """Put the family's own function back."""
    module: Any = sys.modules[type(model).__module__]
    function = getattr(module, "apply_rotary_pos_emb", None)
    module.apply_rotary_pos_emb = getattr(function, "own", function)


def rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key rotated by their positions, rounded once. On CUDA alone.

    query, key: (batch, heads, tokens, size), of any strides but the last; cos, sin: (1 or batch, tokens, rotated values
    of a head). Returns both in the same shape, a token's heads beside each other in memory.
    """
    found: tuple[Tensor, Tensor] = _Rotated.apply(query, key, cos, sin)
    return found


def _fused(own: Rotate) -> Rotate:
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, **named: Any
    ) -> tuple[Tensor, Tensor]:
        known = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and unsqueeze_dim == 1 and not named
        if known and q.stride(-1) == k.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1 and cos.dim() == 3:
            return rotated(q, k, cos, sin)
        return own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim, **named)

    apply_rotary_pos_emb.own = own  # type: ignore[attr-defined]
    return apply_rotary_pos_emb


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _launch(query, key, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query, key = (each if each.stride(-1) == 1 else each.contiguous() for each in outer)
        return *_launch(query, key, *ctx.saved_tensors, back=True), None, None


def _launch(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
    from rlhf_pipeline.passes.kernels import rotate_kernel

    batch, heads, tokens, size = query.shape
    key_heads = key.shape[1]
    query_out, key_out = (each.new_empty(batch, tokens, each.shape[1], size) for each in (query, key))
    blocks = -(-heads // HEADS) + -(-key_heads // HEADS)
    rotate_kernel[(batch * tokens, blocks)](
        query, key, query_out, key_out, cos, sin, tokens, heads, key_heads,
        *query.stride()[:3], *key.stride()[:3], cos.stride(0) if len(cos) > 1 else 0, cos.stride(1),
        size, 1 << (size - 1).bit_length(), cos.shape[-1], HEADS, back, num_warps=4,
    )  # fmt: skip
    return query_out.transpose(1, 2), key_out.transpose(1, 2)
