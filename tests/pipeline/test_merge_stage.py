"""The merge stage: what it commits, and the drift it reports."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from stage_runs import OUTPUTS, StageRuns
from tiny import TEXTS, build_tiny_model
from transformers import AutoModelForCausalLM

from rlhf_api.run import SFT, Lora, Merge, Quantization
from rlhf_api.stage import StageConfig
from rlhf_pipeline.adapters import save_adapter
from rlhf_pipeline.drift import BATCH_TOKENS, TOKENS, few_rows
from rlhf_pipeline.models import load_tokenizer, lora_config

torch.set_num_threads(1)
LORA = Lora(rank=4, alpha=8)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageRuns:
    monkeypatch.setitem(OUTPUTS, "merge", "merged-model")
    return StageRuns(tmp_path)


def config(runs: StageRuns, quantization: Quantization, held_out: list[str]) -> StageConfig:
    base = build_tiny_model(runs.root / "base", hidden=64)
    model = AutoModelForCausalLM.from_pretrained(base)
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
    merge = Merge(dtype="float32")
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


def test_few_rows_bound_the_work() -> None:
    rows = few_rows([[1] * 5000] + [[1] * 30] * 100 + [[1]])
    assert len(rows[0]) == BATCH_TOKENS
    assert sum(map(len, rows)) <= TOKENS
    assert all(len(row) > 1 for row in rows)
