"""An adapter's share of a layer: the same as PEFT computes, forward and backward."""

from pathlib import Path

import pytest
import torch
from tiny import Family, build_tiny_model
from torch import nn

from rlhf_api.run import Lora, Quantization
from rlhf_pipeline.low_rank import add_low_rank, lean
from rlhf_pipeline.models import load_base, lora_config


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_a_lean_layer_computes_what_pefts_own_does(family: Family, tmp_path: Path) -> None:
    from peft import get_peft_model

    model = load_base(build_tiny_model(tmp_path, family), Quantization(type="none"), torch.device("cpu"))
    peft = get_peft_model(model, lora_config(Lora(rank=4, alpha=12), model, top=True), adapter_name="policy")
    torch.manual_seed(0)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2)
    ids = torch.randint(2, 300, (3, 9))
    found = []
    for made_lean in (False, True):
        if made_lean:
            for module in peft.modules():
                if hasattr(module, "lora_A"):
                    lean(module)
        logits = model(input_ids=ids, use_cache=False).logits
        logits.pow(2).sum().backward()
        gradients = {name: p.grad for name, p in peft.named_parameters() if p.grad is not None}
        found.append((logits.detach(), gradients))
        peft.zero_grad()
    (own, own_gradients), (ours, our_gradients) = found
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    assert len(our_gradients) > 4
    for name, gradient in own_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_its_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    shapes = {"y": (2, 3, 5), "x": (2, 3, 4), "down": (2, 4), "up": (5, 2)}
    y, x, down, up = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes.values())
    assert torch.autograd.gradcheck(lambda *a: add_low_rank(*a, 0.7), (y, x, down, up))


def test_master_weights_get_gradients_in_their_own_type() -> None:
    linear = nn.Linear(4, 5).to(torch.bfloat16)
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    down, up = torch.randn(2, 4, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    out = add_low_rank(linear(x), x, down, up, 0.5)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert down.grad is not None
    assert up.grad is not None
    assert down.grad.dtype == up.grad.dtype == torch.float32


def test_each_group_of_a_batch_gets_the_adapter_of_its_name(tmp_path: Path) -> None:
    from peft import get_peft_model

    model = load_base(build_tiny_model(tmp_path), Quantization(type="none"), torch.device("cpu"))
    config = lora_config(Lora(rank=4, alpha=12), model, top=True)
    peft = get_peft_model(model, config, adapter_name="policy")
    peft.add_adapter("critic", config)
    torch.manual_seed(0)
    layers = [module for module in peft.modules() if hasattr(module, "lora_A")]
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2)
    for layer in layers:
        lean(layer)
    ids = torch.randint(2, 300, (3, 9))

    def logits(names: list[str], groups: tuple[str, ...] | None, batch: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            layer._active_adapter, layer.groups = names, groups
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=batch, use_cache=False).logits
        return found

    whole = logits([], ("policy", "reference", "critic"), ids.repeat(3, 1))
    for part, names in zip(whole.chunk(3), (["policy"], [], ["critic"]), strict=True):
        torch.testing.assert_close(part, logits(names, None, ids), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole[:3], whole[3:6], atol=1e-2)
