"""The merge stage: what it commits, and the drift it reports."""

import json
import math
import threading
from pathlib import Path

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from stage_runs import OUTPUTS, StageRuns
from tiny import TEXTS, build_tiny_model
from transformers import AutoModelForCausalLM

from rlhf_api.run import SFT, Lora, Merge, Quantization
from rlhf_api.stage import StageConfig
from rlhf_pipeline.__main__ import run_stage
from rlhf_pipeline.adapters import save_adapter
from rlhf_pipeline.drift import BATCH_TOKENS, TOKENS, few_rows
from rlhf_pipeline.models import load_tokenizer, lora_config
from rlhf_pipeline.stored_weights import Shipping

torch.set_num_threads(1)
LORA = Lora(rank=4, alpha=8)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageRuns:
    monkeypatch.setitem(OUTPUTS, "merge", "merged-model")
    return StageRuns(tmp_path)


def config(
    runs: StageRuns, quantization: Quantization, held_out: list[str], shards: str = "1GB", shard_size: str = "2Gi"
) -> StageConfig:
    base = build_tiny_model(runs.root / "base", hidden=64)
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size=shards)
    adapted = get_peft_model(model, lora_config(LORA, model, top=False))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    save_adapter(model, adapted.peft_config["default"], tensors, runs.root / "sft" / "adapter")
    inputs = {
        "model": runs.put("model", base),
        "adapter": runs.put("sft-adapter", runs.root / "sft"),
        "data": runs.put_tables("sft-data", {"text": TEXTS}, {"text": held_out}),
    }
    merge = Merge(dtype="float32", shard_size=shard_size)
    return runs.config("merge", inputs, quantization=quantization, lora=LORA, sft=SFT(), merge=merge)


def test_without_quantisation_there_is_no_drift(runs: StageRuns) -> None:
    manifest = runs.run(config(runs, Quantization(type="none"), TEXTS))
    folder = runs.fetch(manifest)
    drift = json.loads((folder / "report.json").read_text())["drift"]
    assert drift["difference"] == pytest.approx(0, abs=1e-4)
    # the loss is that of the merged model, computed another way
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    total, tokens = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert drift["tokens"] == tokens
    assert drift["merged_loss"] == pytest.approx(total / tokens, abs=1e-4)


def test_with_nf4_there_is_a_drift_and_the_same_bytes_every_time(runs: StageRuns) -> None:
    stage = config(runs, Quantization(type="nf4"), TEXTS)
    first = runs.run(stage)
    drift = json.loads((runs.fetch(first) / "report.json").read_text())["drift"]
    assert math.isfinite(drift["difference"])
    assert drift["difference"] != 0
    again = StageRuns(runs.root / "again")
    second = again.run(config(again, Quantization(type="nf4"), TEXTS))
    assert second.content == first.content


def test_without_held_out_texts_the_model_is_merged_and_no_drift_reported(runs: StageRuns) -> None:
    folder = runs.fetch(runs.run(config(runs, Quantization(type="none"), [])))
    assert "drift" not in json.loads((folder / "report.json").read_text())
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize(("held_out", "at_once"), [([], 3), (TEXTS, None)], ids=["no drift", "drift"])
def test_weight_files_pass_one_by_one(
    runs: StageRuns, monkeypatch: pytest.MonkeyPatch, held_out: list[str], at_once: int | None
) -> None:
    stage_config = config(runs, Quantization(type="none"), held_out, shards="20KB", shard_size="20k")
    stage = runs.stage(stage_config)
    most = 0

    def look(**_: object) -> None:
        nonlocal most
        most = max(most, len(list(stage.work.rglob("model*.safetensors"))))

    monkeypatch.setattr(stage.progress, "update", look)
    manifest = run_stage(stage)
    stage.close()
    base = [path for path in runs.artifacts.need(stage_config.inputs["model"]).files if path.endswith(".safetensors")]
    merged = [path for path in manifest.files if path.endswith(".safetensors")]
    assert len(base) > 3
    assert len(merged) > 3
    # without a drift to measure: one file of the base, one being written, one being sent
    assert most <= (at_once or len(base) + len(merged))
    assert at_once or most == len(base) + len(merged)
    whole = StageRuns(runs.root / "whole")
    expected = whole.fetch(whole.run(config(whole, Quantization(type="none"), held_out)))
    states = [AutoModelForCausalLM.from_pretrained(each).state_dict() for each in (runs.fetch(manifest), expected)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_a_file_that_waits_to_be_sent_is_sent_unless_the_stage_fails(runs: StageRuns) -> None:
    stage = runs.stage(config(runs, Quantization(type="none"), []))
    names = ("kept.safetensors", "dropped.safetensors")
    for name in names:
        (stage.output / name).write_bytes(b"weights")
    go_on = threading.Event()
    with Shipping(stage, keep=False) as shipping:
        shipping._pool.submit(go_on.wait)  # so that the file waits when the block ends
        shipping.send(stage.output / names[0])
        threading.Timer(0.2, go_on.set).start()
    assert not (stage.output / names[0]).exists()
    go_on.clear()
    with pytest.raises(ValueError, match="broke"), Shipping(stage, keep=False) as shipping:  # noqa: PT012
        shipping._pool.submit(go_on.wait)
        shipping.send(stage.output / names[1])
        threading.Timer(0.2, go_on.set).start()
        raise ValueError("broke")
    assert (stage.output / names[1]).exists()
    stage.close()


def test_few_rows_bound_the_work() -> None:
    rows = few_rows([[1] * 5000] + [[1] * 30] * 100 + [[1]])
    assert len(rows[0]) == BATCH_TOKENS
    assert sum(map(len, rows)) <= TOKENS
    assert all(len(row) > 1 for row in rows)
