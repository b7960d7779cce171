"""Linear layers with 4-bit weights over many rows: one kernel writes the weight out in bfloat16, which is multiplied.

bitsandbytes takes three kernels for that, of which the largest reaches half of the memory's rate. The weights written
are the same to the bit.
"""

from types import MethodType
from typing import Any, Final

import torch
from torch import Tensor, nn

from rlhf_pipeline.decode.nf4_gemm import MAX_ROWS
from rlhf_pipeline.nf4_weight import Nf4Weight

BLOCKS: Final = 128  # of 64 weights, a program's


def lean_four_bit(model: nn.Module) -> list[nn.Module]:
    """Give the NF4 layers with double-quantised scales of a frozen model on a GPU this product. Returns them."""
    changed = []
    for module in model.modules():
        if (weight := Nf4Weight.of(module)) is not None:
            lean: Any = module
            lean.forward = MethodType(_forward(weight, lean.forward), module)
            changed.append(module)
    return changed


def dequantised(weight: Nf4Weight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weight in 16 bits or 32, (out, in), as bitsandbytes' `dequantize_4bit` gives it."""
    from rlhf_pipeline.passes.kernels import dequantise_kernel

    out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    blocks = out.numel() // 64
    dequantise_kernel[(-(-blocks // BLOCKS),)](
        weight.packed, weight.codes, weight.steps, weight.code_values, weight.offset, weight.levels, out, blocks,
        BLOCKS, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _forward(weight: Nf4Weight, own: Any) -> Any:
    def forward(layer: Any, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16 or x.numel() <= MAX_ROWS * x.shape[-1]:  # a decode step's
            few: Tensor = own(x)
            return few
        product: Tensor = _Product.apply(x, weight, layer.bias)
        return product

    return forward


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Nf4Weight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return nn.functional.linear(x, dequantised(weight), bias)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, None, None]:
        return outer[0] @ dequantised(ctx.weight) if ctx.needs_input_grad[0] else None, None, None
