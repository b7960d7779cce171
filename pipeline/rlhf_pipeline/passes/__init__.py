"""Passes over whole sequences, as scoring and training make them: the layers' own results in less time and memory."""

import logging
from typing import Any, Final

import torch
from torch import Tensor, nn

from rlhf_pipeline.decode.nf4_gemm import MAX_ROWS
from rlhf_pipeline.passes.eight_bit import lean_eight_bit
from rlhf_pipeline.passes.four_bit import lean_four_bit
from rlhf_pipeline.passes.rotary import fuse_rotary, unfuse_rotary
from rlhf_pipeline.stack import stack_of

log = logging.getLogger(__name__)

AGREEMENT: Final = 0.1  # relative difference from the layers' own results; bfloat16 alone gives 0.01 to 0.05
TRIED_LAYERS: Final = 2
TRIED_TOKENS: Final = (2, MAX_ROWS)


def fuse(model: nn.Module) -> None:
    """Let a frozen causal model compute the same with less memory and, on a GPU, in fewer kernels.

    On a GPU the lowest layers are tried both ways first, forward and backward: where a kernel does not run on this card
    or gives something else, the model keeps its own.
    """
    lean_eight_bit(model)
    if not _on_gpu(model):
        return
    changed: list[nn.Module] = []
    try:
        own = _tried(model)
        changed += lean_four_bit(model)
        changed += fuse_rotary(model)
        worst = max(_difference(ours, theirs) for ours, theirs in zip(_tried(model), own, strict=True))
        reason = None if worst < AGREEMENT else f"they differ from the layers' own results by {worst:.1e}"
    except Exception as error:  # noqa: BLE001 - whatever keeps a kernel from running here, the layers' own do
        reason = f"{type(error).__name__}: {str(error)[:200]}"
    if reason:
        log.warning("passes without fused kernels: %s", reason)
        unfuse_rotary(model)
        for module in changed:
            del module.__dict__["forward"]


def _on_gpu(model: nn.Module) -> bool:
    return next(model.parameters()).is_cuda


def _tried(model: Any) -> tuple[Tensor, Tensor]:
    """What comes out of the lowest layers and the final norm for some tokens, and the gradient of what goes in."""
    found = stack_of(model)
    parent, name = model.get_submodule(found.path.rpartition(".")[0]), found.pattern
    embeddings = model.get_input_embeddings()
    rows, tokens = TRIED_TOKENS
    ids = torch.arange(rows * tokens, device=embeddings.weight.device).view(rows, tokens) % len(embeddings.weight)
    mask = torch.ones_like(ids)
    mask[0, : tokens // 4] = 0
    embedded = embeddings(ids).detach().requires_grad_()
    setattr(parent, name, found.layers[:TRIED_LAYERS])
    try:
        with torch.enable_grad():
            hidden = model.base_model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).last_hidden_state
            outer = torch.arange(hidden.numel(), device=hidden.device).view(hidden.shape).cos() * mask[..., None]
            (gradient,) = torch.autograd.grad((hidden.float() * outer).sum(), embedded)
    finally:
        setattr(parent, name, found.layers)
    return hidden.detach()[mask.bool()], gradient


def _difference(ours: Tensor, own: Tensor) -> float:
    return float((ours.float() - own.float()).norm() / own.float().norm())
