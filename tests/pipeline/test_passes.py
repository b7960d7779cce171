"""Whole passes in fewer kernels: the same as PEFT, transformers and bitsandbytes compute, forward and backward."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from gpus import gpu
from tiny import Family, build_tiny_model
from torch import nn
from transformers.models.gpt_neox import modeling_gpt_neox

from rlhf_api.run import Lora, Quantization
from rlhf_pipeline import passes
from rlhf_pipeline.models import load_base, lora_config
from rlhf_pipeline.nf4_weight import Nf4Weight
from rlhf_pipeline.passes.four_bit import dequantised
from rlhf_pipeline.passes.low_rank import add_low_rank, lean
from rlhf_pipeline.passes.rotary import unfuse_rotary
from rlhf_pipeline.roles import Roles


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
    assert torch.autograd.gradcheck(lambda y, *a: add_low_rank(y * 1, *a, 0.7), (y, x, down, up))


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


def test_the_kernels_compute_what_transformers_and_bitsandbytes_do() -> None:
    """In Triton's interpreter, which has to be asked for before a kernel is defined: hence a process of its own."""
    script = Path(__file__).with_name("interpreted_passes.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["rotary", "attention", "dequantise"]


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_an_int8_base_keeps_no_activations_and_trains_as_its_own_layers_do(tmp_path: Path) -> None:
    roles = Roles(
        load_base(build_tiny_model(tmp_path, hidden=64), Quantization(type="int8"), torch.device("cpu")),
        Lora(rank=4, layers="all"),
        critic=False,
        checkpointing=True,
    )
    torch.manual_seed(0)
    for parameter in roles.parameters("policy"):
        parameter.data.normal_(0, 0.1)
    ids = torch.randint(2, 300, (3, 17))
    trunk = roles.trunk(ids, torch.ones_like(ids, dtype=torch.bool))
    inner = roles.model.config.intermediate_size
    found = []
    for own in (False, True):
        if own:
            for module in roles.model.modules():
                if type(module).__name__ == "Linear8bitLt":
                    del module.__dict__["forward"]
        hidden = roles.hidden("policy", trunk)
        gc.collect()
        tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
        kept = sum(each.numel() == ids.numel() * inner for each in tensors)
        assert kept >= len(roles.stack.layers) if own else kept == 0
        hidden.float().pow(2).sum().backward()
        found.append([hidden.detach(), *(parameter.grad for parameter in roles.parameters("policy"))])
        roles.model.zero_grad()
    assert len(found[0]) > 8
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("fault", ["zeros", "an error", None])
def test_kernels_that_disagree_or_fail_leave_a_model_its_own_layers(
    fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_base(build_tiny_model(tmp_path, "gpt_neox"), Quantization(type="none"), torch.device("cpu"))
    layer = model.gpt_neox.layers[1].mlp.dense_4h_to_h

    def faulty(x: torch.Tensor) -> torch.Tensor:
        if fault == "an error":
            raise RuntimeError("no such kernel")
        return nn.functional.linear(x, layer.weight * (fault is None), layer.bias)

    def lean(_: nn.Module) -> list[nn.Module]:
        layer.forward = faulty
        return [layer]

    monkeypatch.setattr(passes, "_on_gpu", lambda _: True)
    monkeypatch.setattr(passes, "lean_four_bit", lean)
    depth = len(model.gpt_neox.layers)
    passes.fuse(model)
    assert len(model.gpt_neox.layers) == depth
    kept = [name for name, module in model.named_modules() if "forward" in module.__dict__]
    if fault:
        assert kept == []
        assert modeling_gpt_neox.apply_rotary_pos_emb.__module__ == modeling_gpt_neox.__name__
        assert ("differ" if fault == "zeros" else "no such kernel") in caplog.text
    else:
        assert len(kept) == 1 + depth
        assert caplog.text == ""
        unfuse_rotary(model)


@gpu
@pytest.mark.parametrize("family", ["gpt_neox", "llama", "qwen3"])
def test_a_fused_model_trains_as_its_own_layers_do(family: Family, tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path, family, hidden=128)
    ids = torch.randint(2, 300, (4, 40), generator=torch.Generator().manual_seed(0)).cuda()
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    found = []
    for fused, dtype in ((True, "bfloat16"), (False, "bfloat16"), (False, "float32")):
        model = load_base(folder, Quantization(compute_dtype=dtype), torch.device("cuda", 0))  # type: ignore[arg-type]
        weights = [weight for each in model.modules() if (weight := Nf4Weight.of(each))]
        assert len(weights) > 10 or dtype == "float32"
        if fused:
            for weight in weights:
                state = next(p.quant_state for p in model.parameters() if p.data_ptr() == weight.packed.data_ptr())
                assert torch.equal(dequantised(weight), dequantize_4bit(weight.packed, state))
        else:
            unfuse_rotary(model)
            for module in model.modules():
                module.__dict__.pop("forward", None)
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        logits = model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits.float()
        loss = (logits.log_softmax(-1)[:, 12:] ** 2).mean()
        found.append((logits.detach()[mask.bool()], torch.autograd.grad(loss, embedded)[0].float()))
    for ours, own, exact in zip(*found, strict=True):
        error, own_error = ((each - exact).norm() / exact.norm() for each in (ours, own))
        assert not torch.equal(ours, own)  # which would be its own path
        assert float(error) < 1.2 * float(own_error)
