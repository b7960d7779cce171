"""The fused decode step: its kernels compile for every card, and on a card it agrees with the model's own forward."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpus import gpu
from tiny import EOS, PAD, VOCABULARY, Family, build_tiny_model
from torch import Tensor

from rlhf_api.run import GPU, Lora, Quantization
from rlhf_pipeline import rollout as rollouts
from rlhf_pipeline.decode import decoder as decoders
from rlhf_pipeline.decode.decoder import decoder_of
from rlhf_pipeline.decode.nf4_gemm import (
    CANDIDATES,
    Tile,
    dequantised_product,
    launch_options,
    measured,
    nf4_gemm,
)
from rlhf_pipeline.models import device_of, load_base
from rlhf_pipeline.nf4_weight import Nf4Weight
from rlhf_pipeline.roles import Roles
from rlhf_pipeline.rollout import Sampling, _Decoder, rollout

TILES = [(rows, tile) for rows, tiles in CANDIDATES.items() for tile in tiles]
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="shown where there is no CUDA device")


# ---- without a card ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [80, 86, 89, 90])
def test_every_tile_compiles_for_every_card_without_spilling(capability: int) -> None:
    pytest.importorskip("triton")
    for rows, tile in {(rows, tiles[0]) for rows, tiles in CANDIDATES.items()} | {(64, CANDIDATES[64][-1])}:
        assert _spilled_bytes(_compiled(rows, tile, capability)) == 0, (rows, tile)


def test_the_small_kernels_and_whole_steps_compute_what_plain_torch_does() -> None:
    """In Triton's interpreter, which has to be asked for before a kernel is defined: hence a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    script = Path(__file__).with_name("small_kernels.py")
    done = subprocess.run([sys.executable, script], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["add_norm", "attend", "low_rank", "gated", "steps"]


@on_cpu
def test_a_machine_without_a_card_decodes_with_the_models_own_forward(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_base(
        build_tiny_model(tmp_path, "gpt_neox"), Quantization(compute_dtype="bfloat16"), torch.device("cpu")
    )
    assert decoder_of(model) is None
    assert decoder_of(model) is None
    ours = [record.message for record in caplog.records if record.name == decoders.__name__]
    assert ours == ["decoding with the model's own forward pass: no CUDA device"]


def _compiled(rows: int, tile: Tile, capability: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from rlhf_pipeline.decode.nf4_gemm import _input_layout
    from rlhf_pipeline.decode.nf4_kernel import nf4_gemm_kernel as kernel

    types = {
        "x": "*bf16", "weight": "*u8", "codes": "*u8", "steps": "*fp32", "code_values": "*fp32", "offset": "*fp32",
        "pairs": "*i32", "bias": "*bf16", "low": "*bf16", "up": "*bf16", "y": "*bf16", "partial": "*fp32",
        "arrived": "*i32", "rows": "i32",
    }  # fmt: skip
    constants = {
        "N": 18432, "K": 6144, "BN": tile.outputs, "BK": tile.inputs, "BM": rows, "WARPS": tile.warps,
        "STAGES": tile.stages, "TABLE": tile.table, "BIAS": True, "RANK": 16, "ACTIVATION": "gelu_tanh",
        "PDL": capability >= 90, "INPUT_LAYOUT": _input_layout(rows, tile.warps),
    }  # fmt: skip
    names = kernel.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "").startswith("*")}
    source = GluonASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(i,): constants[name] for i, name in enumerate(names) if name in constants},
        aligned,
    )
    options = {"num_warps": tile.warps, **launch_options(tile, capability >= 90)}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _spilled_bytes(compiled: Any) -> int:
    """Bytes of a thread's stack, which is where registers go that are too many; read off the machine code."""
    import tempfile

    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        told = subprocess.run([tool, "-res-usage", file.name], text=True, capture_output=True, check=True).stdout
    found = re.findall(r"STACK:(\d+)", told)
    assert found
    return sum(map(int, found))


# ---- on a card -----------------------------------------------------------------------------------------------------


def quantised(out: int, inner: int) -> Nf4Weight:
    from bitsandbytes.nn import Linear4bit

    linear = Linear4bit(inner, out, compute_dtype=torch.bfloat16, quant_type="nf4", bias=False)
    linear.weight.data = torch.randn(out, inner, dtype=torch.bfloat16) * 0.02
    found = Nf4Weight.of(linear.cuda())
    assert found
    return found


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@gpu
@pytest.mark.parametrize(("rows", "tile"), TILES, ids=str)
def test_every_tile_multiplies_as_the_dequantised_weight_does(rows: int, tile: Tile) -> None:
    torch.manual_seed(rows)
    out, inner = 6 * 128, 5 * 256
    weight = quantised(out, inner)
    bias = torch.randn(out, device="cuda", dtype=torch.bfloat16)
    up, low = (torch.randn(n, 32, device="cuda", dtype=torch.bfloat16) * 0.1 for n in (out, rows))
    for some in {rows, rows - 3, 1}:
        x = torch.randn(some, inner, device="cuda", dtype=torch.bfloat16)
        if rows != max(8, 1 << (some - 1).bit_length()):
            continue
        plain = dequantised_product(weight, x)
        assert relative(nf4_gemm(x, weight, tile), plain) < 4e-3
        whole = plain + bias.float() + low[:some].float() @ up.float().T
        got = nf4_gemm(x, weight, tile, bias, low[:some], up, "gelu")
        assert relative(got, torch.nn.functional.gelu(whole)) < 6e-3
        assert torch.equal(got, nf4_gemm(x, weight, tile, bias, low[:some], up, "gelu"))  # to the bit


@gpu
def test_a_tile_that_computes_something_else_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_pipeline.decode import nf4_gemm as module

    weight = quantised(512, 512)
    good = measured([weight], 8, lambda x: x)
    assert good.tiles
    right = module.nf4_gemm
    monkeypatch.setattr(module, "nf4_gemm", lambda *a, **n: right(*a, **n) * 1.05)
    bad = measured([weight], 8, lambda x: x)
    assert not bad.tiles
    assert "relative error" in bad.refused[0]


def fused_roles(folder: Path, family: Family, quantization: Quantization, layers: str = "top:2") -> Roles:
    """A tiny model whose policy adapter changes something."""
    model = load_base(build_tiny_model(folder, family, hidden=256), quantization, device_of(GPU()))
    torch.manual_seed(0)
    roles = Roles(model, Lora(rank=4, layers=layers, target_modules="all-linear"), critic=False)
    for parameter in roles.parameters("policy"):
        parameter.data.normal_(0, 0.1)
    roles.activate("policy")
    return roles


def prompts(rows: int, longest: int = 9) -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, VOCABULARY, (rows, longest), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(longest)[None] >= (torch.arange(rows) % (longest - 1))[:, None]
    return ids.masked_fill(~mask, PAD).cuda(), mask.cuda()


@gpu
@pytest.mark.parametrize("rows", [1, 8, 20])
@pytest.mark.parametrize("quantization", [Quantization(), Quantization(type="none")], ids=["nf4", "bf16"])
@pytest.mark.parametrize("family", ["gpt_neox", "llama", "qwen2", "qwen3"])
def test_a_step_gives_the_logits_of_the_models_own_forward(
    family: Family, quantization: Quantization, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are held against float32 on the same weights: rounding differs, and ours is not further off."""
    roles = fused_roles(tmp_path, family, quantization)
    exact = fused_roles(tmp_path, family, quantization.model_copy(update={"compute_dtype": "float32"}))
    monkeypatch.setattr(decoders.Choice, "best", property(lambda choice: next(iter(choice.tiles), None)))
    monkeypatch.setattr(rollouts, "AGREEMENT", 1.0)
    ids, mask = prompts(rows)
    with torch.no_grad():
        decoder, reference = (_Decoder(each.model, ids, mask, Sampling(24, EOS, PAD)) for each in (roles, exact))
        decoder._prefill()
        reference._prefill()
        fused = decoder._fused()
        assert fused
        if quantization.type == "nf4":
            assert any(linear.tile for linear in fused.linears())
        errors = []
        for _ in range(12):
            reference.token.copy_(decoder.token)
            restore = decoder._keep()
            own = decoder._own_logits()
            restore()
            ours = fused.step(decoder.token[:, 0], decoder.session)
            restore()
            expected = reference._own_logits()
            errors.append((relative(ours, expected), relative(own, expected)))
            decoder._step()  # by the model's own forward: errors do not add up
            reference.position.add_(1)
            reference.slot.add_(1)
        ours_mean, own_mean = (sum(column) / len(errors) for column in zip(*errors, strict=True))
        assert ours_mean < 1.3 * own_mean + 2e-3, errors


@gpu
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_the_trunk_that_sampling_keeps_is_that_of_the_layers_below(family: Family, tmp_path: Path) -> None:
    roles = fused_roles(tmp_path, family, Quantization())
    ids, mask = prompts(8)
    responses = rollout(roles.model, ids, mask, Sampling(24, EOS, PAD), trunk_layers=roles.bottom)
    expected = roles.trunk(responses.ids, responses.mask).hidden
    assert responses.trunk is not None
    assert expected is not None
    assert relative(responses.trunk[responses.mask], expected[responses.mask]) < 0.05


@gpu
def test_the_adapter_of_the_moment_is_used(tmp_path: Path) -> None:
    roles = fused_roles(tmp_path, "gpt_neox", Quantization(), layers="all")
    ids, mask = prompts(8)
    greedy = Sampling(24, EOS, PAD, temperature=0)
    policy = rollout(roles.model, ids, mask, greedy).ids
    roles.activate("reference")
    reference = rollout(roles.model, ids, mask, greedy).ids
    assert not torch.equal(policy, reference)
    roles.activate("policy")
    assert torch.equal(rollout(roles.model, ids, mask, greedy).ids, policy)


@gpu
def test_a_step_that_disagrees_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    roles = fused_roles(tmp_path, "gpt_neox", Quantization())
    decoder = decoder_of(roles.model)
    assert decoder
    decoder.scale *= 3.0
    monkeypatch.setattr(rollouts, "AGREEMENT", 1e-3)
    ids, mask = prompts(8)
    rollout(roles.model, ids, mask, Sampling(12, EOS, PAD))
    assert decoder_of(roles.model) is None
    assert "logits differ" in caplog.text
