"""An adapter's share of a linear layer, in the type of the layer's activations and in as few passes as it takes.

PEFT turns activations to float32 for adapters that are kept in float32, and scales and adds in passes of their own.
Here the master weights are cast instead, which are small, and one product adds to the layer's output.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def lean(layer: Any) -> None:
    """Give a PEFT LoRA layer without dropout or DoRA a forward that computes the same in fewer passes.

    With `layer.groups`, names of adapters or of none, the batch is as many parts, each with the adapter of its name:
    for passes without gradients.
    """
    layer.forward = MethodType(_forward, layer)


def _forward(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = layer.base_layer(x)
    if groups := getattr(layer, "groups", None):
        for name, y_part, x_part in zip(groups, y.chunk(len(groups)), x.chunk(len(groups)), strict=True):
            _adapted(layer, name, y_part, x_part)
        return y
    for name in layer._active_adapter:
        y = _adapted(layer, name, y, x)
    return y


def _adapted(layer: Any, name: str, y: Tensor, x: Tensor) -> Tensor:
    if name not in layer.lora_A:
        return y
    return add_low_rank(y, x, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])


def add_low_rank(y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """y + scale * x down^T up^T, put in y's place. y: (..., out), contiguous; x: (..., in); down: (rank, in);
    up: (out, rank).

    Computed in the type of x, with float32 sums; gradients of down and up are in their own type.
    """
    added: Tensor = _AddLowRank.apply(y, x, down, up, scale)
    return added


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ down.to(x.dtype).T
        ctx.save_for_backward(x, low, down, up)
        ctx.scale = scale
        out = y.data  # nobody else needs y; marked as changed it might be no view, which a product's result often is
        out.view(-1, out.shape[-1]).addmm_(low, (up * scale).to(x.dtype).T)
        return out

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, None]:
        (gradient,) = outer
        x, low, down, up = ctx.saved_tensors
        of_rows = gradient.reshape(-1, gradient.shape[-1])
        of_low = of_rows @ (up * ctx.scale).to(x.dtype)
        of_x = of_down = of_up = None
        if ctx.needs_input_grad[1]:
            of_x = (of_low @ down.to(x.dtype)).view(x.shape)
        if ctx.needs_input_grad[2]:
            of_down = _product(of_low.T, x.reshape(-1, x.shape[-1]), down.dtype)
        if ctx.needs_input_grad[3]:
            of_up = _product(of_rows.T, low, up.dtype) * ctx.scale
        return gradient, of_x, of_down, of_up, None


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in another type: not rounded to that of a on the way, where the device can do so."""
    if a.is_cuda and dtype == torch.float32 and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def lean_layers(model: nn.Module) -> None:
    """`lean` for every LoRA layer of a model."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            lean(module)
