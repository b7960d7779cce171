"""Rotary embeddings of query and key in one kernel, in place of the dozen that transformers' formula takes.

Source of the formula: RoFormer, https://arxiv.org/abs/2104.09864, equation 34, in the layout of GPT-NeoX: the second
half of the rotated values holds each pair's other member.
"""

import sys
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, Final

import torch
from torch import Tensor, nn

from rlhf_pipeline.decode.layers import LLAMA_LIKE

FAMILIES: Final = ("gpt_neox", *LLAMA_LIKE)  # whose formula is this one
HEADS: Final = 16  # a program's
Rotate = Callable[..., tuple[Tensor, Tensor]]


def fuse_rotary(model: nn.Module) -> list[nn.Module]:
    """Put the kernel in place of the family's own function, for every model of it in this process; GPT-NeoX's attention
    also splits its heads with it.

    What the kernel does not know, such as tensors on a CPU, still goes to their own. Returns the layers with a
    forward of their own now.
    """
    config: Any = model.config
    if config.get_text_config().model_type not in FAMILIES:
        return []
    module: Any = sys.modules[type(model).__module__]
    own = module.apply_rotary_pos_emb
    if getattr(own, "own", None) is None:
        module.apply_rotary_pos_emb = _fused(own)
    changed = [module for module in model.modules() if type(module).__name__ == "GPTNeoXAttention"]
    for attention in changed:
        lean: Any = attention
        lean.forward = MethodType(_neox_attention(lean.forward), attention)
    return changed


def unfuse_rotary(model: nn.Module) -> None:
    """Put the family's own function back, for models that were not fused themselves."""
    module: Any = sys.modules[type(model).__module__]
    if function := getattr(module, "apply_rotary_pos_emb", None):
        module.apply_rotary_pos_emb = getattr(function, "own", function)


def rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key rotated by their positions, rounded once. On CUDA alone.

    query, key: (batch, heads, tokens, size), of any strides but the last; cos, sin: (1 or batch, tokens, rotated values
    of a head). Returns both in the same shape, a token's heads beside each other in memory.
    """
    found: tuple[Tensor, Tensor] = _Rotated.apply(query, key, cos, sin)
    return found


def heads_of(joint: Tensor, cos: Tensor, sin: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key, rotated, and value of GPT-NeoX's joint projection, in memory of their own. On CUDA alone.

    joint: (batch, tokens, heads * 3 * size), contiguous: query, key and value of one head after the other. Returns each
    as (batch, heads, tokens, size). Their gradients go into one of joint's shape, without copies in between.
    """
    found: tuple[Tensor, Tensor, Tensor] = _Heads.apply(joint, cos, sin, size)
    return found


def _fused(own: Rotate) -> Rotate:
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, **named: Any
    ) -> tuple[Tensor, Tensor]:
        known = _is_known(q, cos, sin) and q.stride(-1) == k.stride(-1) == 1
        if known and unsqueeze_dim == 1 and not named:
            return rotated(q, k, cos, sin)
        return own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim, **named)

    apply_rotary_pos_emb.own = own  # type: ignore[attr-defined]
    return apply_rotary_pos_emb


def _neox_attention(own: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def forward(
        attention: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **named: Any,
    ) -> tuple[Tensor, None]:
        dropout = attention.training and attention.attention_dropout
        sdpa = attention.config._attn_implementation == "sdpa" and not dropout
        if not sdpa or position_embeddings is None or not _is_known(hidden_states, *position_embeddings):
            found: tuple[Tensor, None] = own(
                hidden_states, attention_mask, layer_past=layer_past, position_embeddings=position_embeddings, **named
            )
            return found
        joint = attention.query_key_value(hidden_states)
        query, key, value = heads_of(joint, *position_embeddings, attention.head_size)
        del joint
        if layer_past is not None:
            key, value = layer_past.update(key, value, attention.layer_idx)
        out, _ = sdpa_attention_forward(
            attention, query, key, value, attention_mask, scaling=attention.scaling, dropout=0.0, **named
        )
        return attention.dense(out.reshape(*hidden_states.shape[:2], -1)), None

    return forward


def _is_known(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    known = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and cos.dim() == 3
    return known and cos.stride(-1) == sin.stride(-1) == 1


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        query, key = _moved((query, key), cos, sin, back=False)
        return query, key

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query, key = _moved([_dense(each) for each in outer], *ctx.saved_tensors, back=True)
        return query, key, None, None


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joint: Tensor, cos: Tensor, sin: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        heads = joint.view(*joint.shape[:2], -1, 3 * size).transpose(1, 2)
        query, key, value = _moved(heads.split(size, -1), cos, sin, back=False)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        batch, heads, tokens, size = outer[0].shape
        joint = outer[0].new_empty(batch, tokens, heads, 3 * size)
        _launch([_dense(each) for each in outer], joint.split(size, -1), *ctx.saved_tensors, back=True)
        return joint.view(batch, tokens, -1), None, None, None


def _moved(sources: Sequence[Tensor], cos: Tensor, sin: Tensor, *, back: bool) -> list[Tensor]:
    """The same in memory of their own, query and key rotated. All (batch, heads, tokens, size)."""
    targets = [each.new_empty(each.transpose(1, 2).shape) for each in sources]
    _launch(sources, targets, cos, sin, back=back)
    return [target.transpose(1, 2) for target in targets]


def _dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.stride(-1) == 1 else gradient.contiguous()


def _launch(sources: Sequence[Tensor], targets: Sequence[Tensor], cos: Tensor, sin: Tensor, *, back: bool) -> None:
    """sources: query, key and perhaps value, (batch, heads, tokens, size); targets: (batch, tokens, heads, size)."""
    from rlhf_pipeline.passes.kernels import rotate_kernel

    batch, heads, tokens, size = sources[0].shape
    key_heads = sources[1].shape[1]
    query, key, value = (*sources, sources[1])[:3]
    query_out, key_out, value_out = (*targets, targets[1])[:3]
    blocks = -(-heads // HEADS) + (len(sources) - 1) * -(-key_heads // HEADS)
    rotate_kernel[(batch * tokens, blocks)](
        query, key, value, query_out, key_out, value_out, cos, sin, tokens, heads, key_heads,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        query_out.stride(1), key_out.stride(1), query_out.stride(2), cos.stride(0) if len(cos) > 1 else 0,
        cos.stride(1), size, 1 << (size - 1).bit_length(), cos.shape[-1], HEADS, back, num_warps=4,
    )  # fmt: skip
