"""Models come into the store whole, with PAD ≠ EOS, from a folder, a package, a bucket, the hub or a GGUF file."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import COMMIT, Hub, serve_hub
from safetensors.torch import load_file
from stage_runs import OUTPUTS, StageRuns
from tiny import build_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_api.errors import StoreError, UserError
from rlhf_api.run import Model
from rlhf_api.stage import StoreConfig
from rlhf_pipeline.models import load_tokenizer
from rlhf_pipeline.sources import fetch_model
from rlhf_store.artifacts import Manifest, open_artifacts


class ModelImports:
    """Runs import-model."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.runs = root, StageRuns(root)
        monkeypatch.setitem(OUTPUTS, "import-model", "model")

    def run(self, source: str, **model: Any) -> tuple[Path, Manifest]:
        """The imported folder and its manifest."""
        settings = {"model": Model(source=source, **model)}
        manifest = self.runs.run(self.runs.config("import-model", {}, **settings))
        return self.runs.fetch(manifest), manifest


@pytest.fixture
def imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelImports:
    return ModelImports(tmp_path, monkeypatch)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "base")


def set_tokens(base: Path, **tokens: str | None) -> None:
    """Change special tokens in a tokenizer's files."""
    file = base / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | tokens))


def assert_same_model(imported: Path, base: Path) -> None:
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (imported, base))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_folder_is_imported_with_a_report(imports: ModelImports, base: Path) -> None:
    folder, manifest = imports.run(f"file://{base}")
    assert_same_model(folder, base)
    report = json.loads((folder / "report.json").read_text())
    weights = load_file(base / "model.safetensors")
    assert report["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert report["bytes"] == sum(tensor.nbytes for tensor in weights.values())
    assert report["dtypes"] == {"float32": report["parameters"]}
    assert report["model"]["num_hidden_layers"] == 3
    assert report["tokenizer"]["pad_token"] == "<pad>"
    assert manifest.metadata["metrics"]["parameters"] == report["parameters"]
    assert load_tokenizer(folder).padding_side == "left"


def test_shards_are_imported_and_others_left(imports: ModelImports, base: Path) -> None:
    sharded = imports.root / "sharded"
    shutil.copytree(base, sharded)
    (sharded / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(sharded, max_shard_size="20KB")
    shutil.copy(base / "model.safetensors", sharded / "consolidated.safetensors")
    (sharded / "pytorch_model.bin").write_bytes(b"pickle")
    folder, manifest = imports.run(f"file://{sharded}")
    assert_same_model(folder, base)
    assert not {"consolidated.safetensors", "pytorch_model.bin"} & set(manifest.files)
    assert all((sharded / name).exists() for name in ("config.json", "model.safetensors.index.json"))


def test_the_same_import_gives_the_same_bytes(imports: ModelImports, base: Path) -> None:
    first = imports.run(f"file://{base}")[1].content
    imports.runs = StageRuns(imports.root / "again")
    assert imports.run(f"file://{base}")[1].content == first


def test_a_path_in_a_package_is_found_without_importing_it(
    imports: ModelImports, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = imports.root / "site" / "tiny_weights"
    shutil.copytree(base, package / "model")
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(imports.root / "site")
    assert_same_model(imports.run("package://tiny_weights/model")[0], base)
    assert "tiny_weights" not in sys.modules


def test_an_absent_package_is_an_error(imports: ModelImports) -> None:
    with pytest.raises(UserError, match="no Python package 'no_such_package'"):
        imports.run("package://no_such_package/model")


@pytest.mark.s3
def test_a_model_in_a_bucket_is_imported(imports: ModelImports, base: Path, s3_store: StoreConfig) -> None:
    objects = open_artifacts(s3_store).objects
    for file in base.iterdir():
        objects.put_file(f"models/tiny/{file.name}", file)
    imports.runs.store, imports.runs.artifacts = s3_store, open_artifacts(s3_store)
    assert_same_model(imports.run(f"{s3_store.url}/models/tiny")[0], base)
    with pytest.raises(UserError, match="holds no objects"):
        imports.run(f"{s3_store.url}/models/none")


# ---- PAD and EOS ----------------------------------------------------------------------------------------------------


def test_a_pad_that_is_eos_is_replaced_by_another_special_token(imports: ModelImports, base: Path) -> None:
    set_tokens(base, pad_token="<eos>")
    folder, _ = imports.run(f"file://{base}")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == tokenizer.pad_token_id
    assert AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.shape[0] == 384


def test_the_pad_token_that_the_run_names_is_used(imports: ModelImports, base: Path) -> None:
    folder, _ = imports.run(f"file://{base}", pad_token="~")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token == "~"
    assert tokenizer.pad_token_id == AutoTokenizer.from_pretrained(base).get_vocab()["~"]


@pytest.mark.parametrize(
    ("pad", "message"), [("<eos>", r"model\.padToken: '<eos>' is EOS"), ("<no>", "'<no>' is not in the tokenizer")]
)
def test_a_pad_token_that_cannot_be_is_an_error(imports: ModelImports, base: Path, pad: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        imports.run(f"file://{base}", pad_token=pad)


def test_a_tokenizer_without_a_free_special_token_is_an_error(imports: ModelImports, base: Path) -> None:
    set_tokens(base, pad_token="<eos>", bos_token="<pad>")
    with pytest.raises(UserError, match=r"model\.padToken.*no other special token"):
        imports.run(f"file://{base}")


def test_a_tokenizer_without_eos_is_an_error(imports: ModelImports, base: Path) -> None:
    set_tokens(base, eos_token=None)
    with pytest.raises(UserError, match="no EOS"):
        imports.run(f"file://{base}")


# ---- what is no model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        (["model.safetensors"], ["pytorch_model.bin"], r"only as pytorch_model\.bin.*save_pretrained"),
        (["model.safetensors"], ["model.Q4_0.gguf"], r"name one of them: .*/model\.Q4_0\.gguf"),
        (["model.safetensors"], [], r"no \*\.safetensors file"),
        (["config.json"], [], r"no config\.json"),
        (["tokenizer.json", "tokenizer_config.json"], [], "no tokenizer"),
    ],
)
def test_a_folder_that_lacks_a_part_is_an_error(
    imports: ModelImports, base: Path, remove: list[str], add: list[str], message: str
) -> None:
    for name in remove:
        (base / name).unlink()
    for name in add:
        (base / name).write_bytes(b"x")
    with pytest.raises(UserError, match=message):
        imports.run(f"file://{base}")


def test_a_truncated_weight_file_is_an_error(imports: ModelImports, base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated"):
        imports.run(f"file://{base}")


def test_a_model_that_is_quantised_already_is_an_error(imports: ModelImports, base: Path) -> None:
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError, match="already quantised with gptq"):
        imports.run(f"file://{base}")


@pytest.mark.parametrize("source", ["file:///no/such/folder", "file://relative/folder"])
def test_a_folder_that_is_not_there_is_an_error(imports: ModelImports, source: str) -> None:
    with pytest.raises(UserError, match=r"no folder|not absolute"):
        imports.run(source)


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def write_gguf(base: Path, file: Path, leave_out: str = "nothing") -> None:
    """Write a tiny Llama as an unquantised GGUF file, with the names and permutation of llama.cpp's converter."""
    import gguf

    model = AutoModelForCausalLM.from_pretrained(base)
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = json.loads((base / "tokenizer.json").read_text())["model"]
    vocabulary = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token.startswith("<") and token.endswith(">") else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(1)
    writer.add_pad_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in state.items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        if name != leave_out:
            writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_bfloat16_model(imports: ModelImports, base: Path) -> None:
    write_gguf(base, imports.root / "tiny.gguf")
    folder, _ = imports.run(f"file://{imports.root}/tiny.gguf")
    expected = AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16).state_dict()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    tokenizer = load_tokenizer(folder)
    text = "the film is a warm story"
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(base)(text)["input_ids"]
    assert tokenizer.pad_token == "<pad>"


def test_a_gguf_file_that_lacks_a_weight_is_an_error(imports: ModelImports, base: Path) -> None:
    write_gguf(base, imports.root / "tiny.gguf", leave_out="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(UserError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        imports.run(f"file://{imports.root}/tiny.gguf")


def test_a_file_that_is_no_gguf_is_an_error(imports: ModelImports) -> None:
    (imports.root / "bad.gguf").write_bytes(b"not a GGUF file at all" * 10)
    with pytest.raises(UserError, match=r"bad\.gguf is no GGUF file"):
        imports.run(f"file://{imports.root}/bad.gguf")


# ---- the hub, as its client sees it ---------------------------------------------------------------------------------


@pytest.fixture
def hub(base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that holds me/tiny."""
    with serve_hub(monkeypatch) as hub:
        hub.models["me/tiny"] = base
        yield hub


@pytest.mark.usefixtures("hub")
def test_a_hub_model_is_imported_at_its_commit(imports: ModelImports, base: Path) -> None:
    folder, _ = imports.run("hf://me/tiny", revision="main")
    assert_same_model(folder, base)
    assert json.loads((folder / "report.json").read_text())["revision"] == COMMIT


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [("hf://me/tiny", "v9", "revision: 'v9' is no commit"), ("hf://me/none", None, "not on the hub")],
)
def test_what_the_hub_lacks_is_an_error(imports: ModelImports, source: str, revision: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        imports.run(source, revision=revision)


def test_a_hub_that_cannot_be_reached_is_worth_another_try(
    imports: ModelImports, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="could not be reached"):
        imports.run("hf://me/tiny")


def test_offline_mode_is_named(imports: ModelImports, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        imports.run("hf://me/tiny")


def test_a_model_elsewhere_is_fetched_for_use(base: Path, tmp_path: Path) -> None:
    assert fetch_model(f"file://{base}", None, tmp_path / "into") == base
