"""A 4-bit weight as bitsandbytes keeps it, for the kernels that read it in place."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Nf4Weight:
    """A packed weight with its double-quantised scales."""

    packed: Tensor  # uint8
    codes: Tensor  # (blocks,) uint8
    steps: Tensor  # (blocks / 256,) float32
    code_values: Tensor  # (256,) float32
    offset: Tensor  # () float32
    levels: Tensor  # (16,) float32
    shape: tuple[int, int]  # (out, in)

    @classmethod
    def of(cls, linear: nn.Module) -> "Nf4Weight | None":
        """The weight of a bitsandbytes Linear4bit; None if the kernels do not know its layout or its sizes."""
        weight = getattr(linear, "weight", None)
        state = getattr(weight, "quant_state", None)
        if weight is None or state is None or state.quant_type != "nf4" or state.blocksize != 64 or not state.nested:
            return None
        out, inner = state.shape
        if state.state2.blocksize != 256 or state.dtype != torch.bfloat16 or out % 64 or inner % 64:
            return None
        second = state.state2
        found = cls(weight.data, state.absmax, second.absmax, second.code, state.offset, state.code, (out, inner))
        return found if found.packed.is_cuda and found.packed.is_contiguous() else None
