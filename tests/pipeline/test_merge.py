"""The streaming merge against PEFT's own, bit by bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import Family, build_tiny_model
from transformers import AutoModelForCausalLM

from rlhf_api.errors import UserError
from rlhf_api.run import Lora, Merge
from rlhf_pipeline.merge import write_merged
from rlhf_pipeline.models import lora_config
from rlhf_pipeline.sources import LocalFiles

torch.set_num_threads(1)
FLOAT32 = Merge(dtype="float32")
EVERYWHERE = Lora(rank=4, alpha=8, target_modules="all-linear")


def make_adapter(base: Path, folder: Path, config: LoraConfig | None = None, lora: Lora = EVERYWHERE) -> Path:
    """Save a random float32 adapter, none of whose matrices is zero, into `folder`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, config or lora_config(lora, model, top=False))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
        elif "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, adapter: Path, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def write(base: Path, adapter: Path, target: Path, settings: Merge) -> None:
    """write_merged with nobody looking on."""
    write_merged(LocalFiles(base), adapter, target, settings, progress=lambda *_: None, ship=lambda _: None)


def merge(base: Path, adapter: Path, target: Path, settings: Merge = FLOAT32) -> dict[str, torch.Tensor]:
    """Merge into `target` and return the state of the model that transformers loads from it."""
    target.mkdir()
    write(base, adapter, target, settings)
    model, info = AutoModelForCausalLM.from_pretrained(target, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == getattr(torch, settings.dtype)
    return model.state_dict()


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "opt", "qwen2", "gemma2"])
def test_equals_peft_bit_by_bit_in_float32(family: Family, tmp_path: Path) -> None:
    base = build_tiny_model(tmp_path / "base", family)
    adapter = make_adapter(base, tmp_path / "adapter")
    ours = merge(base, adapter, tmp_path / "merged")
    assert_same(ours, merged_by_peft(base, adapter, torch.float32).state_dict())
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert any(not torch.equal(ours[name], before[name]) for name in ours)


@pytest.mark.parametrize(
    "lora",
    [
        EVERYWHERE.model_copy(update={"use_rslora": True}),
        EVERYWHERE.model_copy(update={"use_dora": True}),
        Lora(rank=3, alpha=7, target_modules=["q_proj", "down_proj"]),
    ],
    ids=["rslora", "dora", "some"],
)
def test_equals_peft_for_every_kind_of_lora(llama: Path, tmp_path: Path, lora: Lora) -> None:
    adapter = make_adapter(llama, tmp_path / "adapter", lora=lora)
    assert_same(merge(llama, adapter, tmp_path / "merged"), merged_by_peft(llama, adapter, torch.float32).state_dict())


def test_dora_on_a_transposed_weight_equals_peft(tmp_path: Path) -> None:
    base = build_tiny_model(tmp_path / "base", "gpt2")
    adapter = make_adapter(base, tmp_path / "adapter", lora=EVERYWHERE.model_copy(update={"use_dora": True}))
    assert_same(merge(base, adapter, tmp_path / "merged"), merged_by_peft(base, adapter, torch.float32).state_dict())


def test_a_bfloat16_base_is_rounded_once(tmp_path: Path) -> None:
    base = build_tiny_model(tmp_path / "float32", "llama")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter")
    ours = merge(base, adapter, tmp_path / "merged", Merge(dtype="bfloat16"))
    assert_same(ours, merged_by_peft(base, adapter, torch.bfloat16).state_dict())
    exact = merged_by_peft(base, adapter, torch.float32).state_dict()
    assert_same(ours, {name: tensor.to(torch.bfloat16) for name, tensor in exact.items()})


def test_shards_are_small_indexed_and_hold_the_same_model(llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(llama, tmp_path / "adapter")
    whole = merge(llama, adapter, tmp_path / "whole")
    pieces = merge(llama, adapter, tmp_path / "pieces", Merge(dtype="float32", shard_size="20k"))
    assert_same(pieces, whole)
    shards = sorted((tmp_path / "pieces").glob("*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 20_000
    index = json.loads((tmp_path / "pieces" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}


def test_reads_a_base_whose_files_leave_out_the_prefix(tmp_path: Path) -> None:
    base = build_tiny_model(tmp_path / "base", "gpt2")
    adapter = make_adapter(base, tmp_path / "adapter")
    expected = merge(base, adapter, tmp_path / "a")
    file = base / "model.safetensors"
    save_file({name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}, file)
    assert_same(merge(base, adapter, tmp_path / "b"), expected)


def test_reads_a_sharded_base(llama: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    adapter = make_adapter(llama, tmp_path / "adapter")
    assert_same(merge(tmp_path / "base", adapter, tmp_path / "a"), merge(llama, adapter, tmp_path / "b"))


def test_the_same_merge_writes_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(llama, tmp_path / "adapter")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(llama, adapter, tmp_path / name, Merge())
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_an_adapted_layer_that_shares_its_weight_is_an_error(tmp_path: Path) -> None:
    base = build_tiny_model(tmp_path / "base", "gemma")  # lm_head is the embedding
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(UserError, match="lm_head shares its weight"):
        merge(base, tmp_path / "adapter", tmp_path / "merged")


def test_an_update_without_a_weight_is_an_error(llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(llama, tmp_path / "adapter")
    other = build_tiny_model(tmp_path / "other", "llama", layers=2)
    with pytest.raises(UserError, match=r"no module model\.layers\.2"):
        merge(other, adapter, tmp_path / "merged")


def test_an_update_of_another_shape_is_an_error(llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(llama, tmp_path / "adapter")
    wide = build_tiny_model(tmp_path / "wide", "llama", hidden=64)
    with pytest.raises(UserError, match="made for a weight of"):
        merge(wide, adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_what_is_no_plain_lora_is_an_error(llama: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    adapter = make_adapter(llama, tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        merge(llama, adapter, tmp_path / "merged")


def test_a_broken_adapter_is_an_error(llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(llama, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, file)
    with pytest.raises(UserError, match="not finite"):
        merge(llama, adapter, tmp_path / "merged")


def test_values_beyond_float16_are_an_error(llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(llama, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor * 1e4 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(UserError, match=r"merge\.dtype"):
        merge(llama, adapter, tmp_path / "merged", Merge(dtype="float16"))


def test_a_truncated_weight_file_is_an_error(llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(llama, tmp_path / "adapter")
    base = build_tiny_model(tmp_path / "base", "llama")
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        merge(base, adapter, tmp_path / "merged")
