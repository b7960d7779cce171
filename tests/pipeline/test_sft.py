"""The sft stage on a tiny model."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from stage_runs import StageRuns
from tiny import EOS, PAD, TEXTS, build_tiny_model, build_tokenizer
from transformers import AutoModelForCausalLM

from rlhf_api.errors import TrainingError, UserError
from rlhf_api.run import SFT, Lora, Quantization
from rlhf_api.stage import StageConfig
from rlhf_pipeline.stage_process import Interrupted
from rlhf_pipeline.training import encode, held_out_count, longest_first, training_order

torch.set_num_threads(1)


def sft_config(
    runs: StageRuns, family: str = "llama", quantization: str = "none", dropout: float = 0.1, **changes: Any
) -> StageConfig:
    model = runs.put("model", build_tiny_model(runs.root / f"model-{family}", family, layers=2))
    texts = [f"{text}, {word}" for word in ("they say", "we think", "it seems") for text in TEXTS]
    data = runs.put_tables("sft-data", {"text": texts}, {"text": TEXTS})
    settings = {"steps": 6, "batch_size": 4, "micro_batch_size": 2, "sequence_length": 16, "learning_rate": 0.02}
    sft = SFT(**settings | {"checkpoint_steps": 100} | changes)
    lora = Lora(rank=4, dropout=dropout)
    return runs.config(
        "sft", {"model": model, "data": data}, sft=sft, lora=lora, quantization=Quantization(type=quantization), seed=3
    )


@pytest.fixture
def runs(tmp_path: Path) -> StageRuns:
    return StageRuns(tmp_path)


def log_probabilities(model: torch.nn.Module, rows: list[list[int]]) -> tuple[float, int]:
    """Sum and count of the log-probabilities of all tokens but each row's first, one row at a time."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].double()
        total += logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).sum().item()
        count += len(row) - 1
    return total, count


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapter_lowers_the_held_out_loss_by_as_much_as_reported(runs: StageRuns, family: str) -> None:
    folder = runs.fetch(runs.run(sft_config(runs, family)))
    report = json.loads((folder / "report.json").read_text())

    base = AutoModelForCausalLM.from_pretrained(runs.root / f"model-{family}", dtype=torch.float32)
    rows = encode(build_tokenizer(runs.root / "tokenizer"), TEXTS, 16)
    total, count = log_probabilities(base, rows)
    assert count == report["held_out_tokens"]
    assert report["held_out_loss_before"] == pytest.approx(-total / count, abs=1e-5)
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    total, _ = log_probabilities(adapted, rows)
    assert report["held_out_loss_after"] == pytest.approx(-total / count, abs=1e-5)
    assert report["held_out_loss_after"] < report["held_out_loss_before"] - 0.05


def test_artifact_holds_what_the_next_stages_read(runs: StageRuns) -> None:
    manifest = runs.run(sft_config(runs))
    assert {path for path in manifest.files if not path.startswith("logs/tensorboard/")} == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "report.json",
        "logs/metrics.jsonl",
    }
    assert set(manifest.metadata["metrics"]) == {
        "held_out_loss_before",
        "held_out_loss_after",
        "held_out_perplexity",
        "tokens",
    }
    folder = runs.fetch(manifest)
    steps = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in steps] == json.loads((folder / "report.json").read_text())["loss_curve"]
    text = (folder / "adapter" / "adapter_config.json").read_text()
    assert str(runs.root) not in text
    assert json.loads(text)["target_modules"] == [f"self_attn.{x}_proj" for x in "koqv"]


def test_micro_batches_leave_the_result_alone(runs: StageRuns) -> None:
    # Texts of unequal length: every token counts once, wherever its micro-batch was cut.
    folders = [runs.fetch(runs.run(sft_config(runs, steps=3, dropout=0.0, micro_batch_size=size))) for size in (1, 4)]
    one, four = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, four[name], atol=1e-4, rtol=1e-3, msg=name)


def test_a_killed_run_resumes_to_the_same_bytes(runs: StageRuns) -> None:
    killed = sft_config(runs, steps=40, checkpoint_steps=4)
    runs.kill_after_checkpoint(killed)
    resumed = runs.run(killed)
    # The same work at another address, so that nothing is found there.
    whole = runs.run(killed.model_copy(update={"output": killed.output.model_copy(update={"digest": "0" * 64})}))
    assert resumed.content == whole.content
    assert runs.fetch(resumed).joinpath("adapter/adapter_model.safetensors").read_bytes() == (
        runs.fetch(whole).joinpath("adapter/adapter_model.safetensors").read_bytes()
    )


def test_a_stop_saves_a_checkpoint_after_the_step(runs: StageRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sft_config(runs)
    stage = runs.stage(config)
    log = stage.log

    def stop_at_three(step: int, **metrics: float) -> None:
        log(step, **metrics)
        stage._stop_requested = step >= 2  # read at the end of step 3

    monkeypatch.setattr(stage, "log", stop_at_three)
    from rlhf_pipeline.sft import run

    with pytest.raises(Interrupted):
        run(stage)
    stage.close()
    assert [path.parent.name for path in runs.checkpoints(config)] == ["00000003"]


def test_nan_stops_the_stage_and_names_the_last_good_checkpoint(runs: StageRuns) -> None:
    folder = build_tiny_model(runs.root / "broken", layers=2)
    [poison] = build_tokenizer(runs.root / "tokenizer")("@")["input_ids"]
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][poison] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    texts = [*TEXTS * 2, "a film @ night"]
    data = runs.put_tables("sft-data", {"text": texts}, {"text": TEXTS})
    config = runs.config(
        "sft",
        {"model": runs.put("model", folder), "data": data},
        sft=SFT(steps=6, batch_size=4, micro_batch_size=4, sequence_length=16, checkpoint_steps=1),
        lora=Lora(rank=4),
        quantization=Quantization(type="none"),
        seed=2,
    )
    step = training_order(len(texts), 24, seed=2).index(len(texts) - 1) // 4 + 1
    assert step > 1
    with pytest.raises(
        TrainingError, match=rf"^sft: loss is nan at step {step}; .*/0000000{step - 1}/. Lower sft.learningRate"
    ):
        runs.run(config)
    assert runs.artifacts.find(config.output) is None
    assert runs.checkpoints(config)[-1].parent.name == f"0000000{step - 1}"


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_is_trained(runs: StageRuns, quantization: str) -> None:
    manifest = runs.run(sft_config(runs, quantization=quantization, steps=3))
    metrics = manifest.metadata["metrics"]
    assert metrics["held_out_loss_after"] < metrics["held_out_loss_before"]
    weights = load_file(runs.fetch(manifest) / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(tensor.abs().sum() > 0 for tensor in weights.values())


def test_eos_ends_a_whole_text_and_never_a_cut_one(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    whole = tokenizer("a dull movie")["input_ids"]
    assert encode(tokenizer, ["a dull movie"], len(whole) + 1) == [[*whole, EOS]]
    assert encode(tokenizer, ["a dull movie"], len(whole)) == [whole]
    assert encode(tokenizer, ["a dull movie"], 2) == [whole[:2]]
    assert encode(tokenizer, ["a dull movie<eos>"], 100) == [[*whole, EOS]]
    assert encode(tokenizer, ["a dull movie<eos>"], 100, end=False) == [whole]
    assert PAD not in encode(tokenizer, ["", "a dull movie"], 5)[0]


def test_no_held_out_rows_leave_their_figures_out(runs: StageRuns) -> None:
    config = sft_config(runs, steps=1)
    empty = pa.table({"text": pa.array([], pa.string())})
    data = runs.put_tables("sft-data", {"text": TEXTS}, empty)
    inputs = config.inputs | {"data": data}
    manifest = runs.run(config.model_copy(update={"inputs": inputs}))
    assert set(manifest.metadata["metrics"]) == {"tokens"}


def test_no_training_rows_are_an_error() -> None:
    with pytest.raises(UserError, match=r"train.parquet has no rows"):
        training_order(0, 4, seed=0)


def test_training_order_goes_through_all_rows_before_it_repeats() -> None:
    order = training_order(5, 12, seed=0)
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4]
    assert len(order) == 12
    assert order == training_order(5, 12, seed=0)
    assert training_order(50, 50, seed=0) != training_order(50, 50, seed=1)
    assert order[:5] != order[5:10]


def test_every_step_keeps_its_rows_and_begins_with_the_longest() -> None:
    lengths = [3, 9, 1, 5, 7, 2, 8, 4]
    assert longest_first(lengths, 4, int) == [9, 5, 3, 1, 8, 7, 4, 2]
    assert longest_first(lengths, 1, int) == lengths


def test_held_out_rows_are_bounded() -> None:
    assert held_out_count(480, 128) == 128
    assert held_out_count(16_000, 128) == 1600
