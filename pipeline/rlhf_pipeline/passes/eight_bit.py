"""Linear layers with 8-bit weights that keep nothing for the backward pass.

bitsandbytes' own product holds on to its input, where checkpointing does not see it: every layer's activations would
stay in memory. A frozen layer's gradient needs the weight alone.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def lean_eight_bit(model: nn.Module) -> None:
    """Give the int8 layers of a frozen model this product; what it computes is their own."""
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            lean: Any = module
            lean.forward = MethodType(_forward(lean.forward), module)


def _forward(own: Any) -> Any:
    def forward(layer: Any, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x, layer, own)
        return product

    return forward


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, own: Any) -> Tensor:
        ctx.state, ctx.dtype = layer.state, x.dtype
        product: Tensor = own(x)
        return product

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        scales = ctx.state.SCB[:, None] * (1.0 / 127.0)
        return outer[0].to(ctx.dtype) @ ctx.state.CB.to(ctx.dtype, copy=True).mul_(scales), None, None
