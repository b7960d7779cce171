"""Where a causal model keeps its decoder layers."""

from dataclasses import dataclass

from torch import nn

from rlhf_api.errors import UserError


@dataclass(frozen=True)
class Stack:
    """The decoder layers of a causal model."""

    layers: nn.ModuleList
    pattern: str  # the list's own name, by which PEFT finds a layer's index
    path: str  # its full name inside the model


def stack_of(model: nn.Module) -> Stack:
    """The decoder layers of `model`: the list of modules as long as its config says it is deep."""
    depth = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return Stack(module, path.rsplit(".", 1)[-1], path)
    raise UserError(f"model: {type(model).__name__} has no list of {depth} decoder layers that adapters could sit on")
