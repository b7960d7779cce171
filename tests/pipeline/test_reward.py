"""The reward stage on tiny models: trained, classifier, function."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import serve_hub
from safetensors.torch import load_file
from stage_runs import StageRuns
from tiny import PAD, TEXTS, build_tiny_model, build_tokenizer, tiny_config
from transformers import AutoModelForSequenceClassification

from rlhf_api.errors import GateError, UserError
from rlhf_api.run import Classifier, Lora, Quantization, Reward
from rlhf_api.stage import StageConfig, StoreConfig
from rlhf_pipeline.models import load_base
from rlhf_pipeline.reward_models import ClassifierReward, RewardCard, load_reward
from rlhf_pipeline.roles import Roles
from rlhf_store.artifacts import open_artifacts

torch.set_num_threads(1)
CPU = torch.device("cpu")
LORA = Lora(rank=4, layers="top:1")
GOOD, BAD = TEXTS[::2], TEXTS[1::2]


@pytest.fixture
def runs(tmp_path: Path) -> StageRuns:
    return StageRuns(tmp_path)


def reward_config(runs: StageRuns, quantization: str = "none", **changes: Any) -> StageConfig:
    model = runs.put("merged-model", build_tiny_model(runs.root / "model", layers=2))
    pairs = {"prompt": ["see: "] * 9, "chosen": GOOD * 3, "rejected": [*BAD, *BAD[1:], BAD[0], *BAD[2:], *BAD[:2]]}
    held_out = {"prompt": ["see: "] * 4, "chosen": [*GOOD, "same"], "rejected": [*BAD[::-1], "same"]}
    data = runs.put_tables("preference-data", pairs, held_out)
    texts = runs.put_tables("sft-data", {"text": TEXTS}, {"text": TEXTS})
    settings = {"steps": 12, "batch_size": 4, "micro_batch_size": 2, "sequence_length": 24, "learning_rate": 0.02}
    return runs.config(
        "reward",
        {"model": model, "data": data, "sft-data": texts},
        reward=Reward(**settings | {"checkpoint_steps": 100} | changes),
        lora=LORA,
        quantization=Quantization(type=quantization),
        seed=1,
    )


def test_trained_reward_prefers_the_chosen_texts_and_is_normalised(runs: StageRuns) -> None:
    manifest = runs.run(reward_config(runs))
    folder = runs.fetch(manifest)
    report = json.loads((folder / "report.json").read_text())
    card = RewardCard.load(folder)
    assert report["train_loss_first"] == pytest.approx(0.6931, abs=1e-3)
    assert report["train_loss_last"] < 0.3
    assert report["held_out_pairs"] == 3  # the fourth pair is one text twice
    assert report["accuracy"] == 1.0
    assert manifest.metadata["metrics"]["accuracy_low"] == pytest.approx(0.4385, abs=1e-3)

    # Scored as PPO does it, the texts of the SFT data have mean 0 and deviation 1.
    roles = Roles(load_base(runs.root / "model", Quantization(type="none"), CPU), LORA)
    roles.add_reward(folder)
    tokenizer = build_tokenizer(runs.root / "tokenizer")
    rows = [tokenizer(text)["input_ids"][:24] for text in TEXTS]
    ids = torch.tensor([[PAD] * (24 - len(row)) + row for row in rows])
    with torch.no_grad():
        scores = (roles.scores(roles.trunk(ids, ids != PAD)) - card.mean) / card.std
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(1.0, abs=1e-4)


def test_artifact_holds_what_the_next_stages_read(runs: StageRuns) -> None:
    manifest = runs.run(reward_config(runs, steps=2, min_accuracy=0.0))
    assert {path for path in manifest.files if not path.startswith("logs/tensorboard/")} == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "head.safetensors",
        "reward.json",
        "report.json",
        "logs/metrics.jsonl",
    }
    folder = runs.fetch(manifest)
    assert {name: tuple(t.shape) for name, t in load_file(folder / "head.safetensors").items()} == {"weight": (1, 32)}
    names = set(load_file(folder / "adapter" / "adapter_model.safetensors"))
    assert len(names) == 8  # two matrices for each of four projections, on the top layer alone
    assert all(name.startswith("base_model.model.model.layers.1.self_attn.") for name in names)
    assert str(runs.root) not in (folder / "adapter" / "adapter_config.json").read_text()


def test_micro_batches_leave_the_result_alone(runs: StageRuns) -> None:
    folders = [
        runs.fetch(runs.run(reward_config(runs, steps=3, min_accuracy=0.0, micro_batch_size=size))) for size in (1, 4)
    ]
    one, four = (load_file(folder / "head.safetensors")["weight"] for folder in folders)
    assert one.abs().max() > 0.01
    torch.testing.assert_close(one, four, atol=1e-4, rtol=1e-3)


def test_a_killed_run_resumes_to_the_same_bytes(runs: StageRuns) -> None:
    killed = reward_config(runs, steps=40, checkpoint_steps=4, min_accuracy=0.0)
    runs.kill_after_checkpoint(killed)
    resumed = runs.run(killed)
    # The same work at another address, so that nothing is found there.
    whole = runs.run(killed.model_copy(update={"output": killed.output.model_copy(update={"digest": "0" * 64})}))
    assert resumed.content == whole.content


def test_gate_stops_the_run_below_min_accuracy(runs: StageRuns) -> None:
    config = reward_config(runs)
    swapped = {"prompt": ["see: "] * 3, "chosen": BAD, "rejected": GOOD}
    data = runs.put_tables("preference-data", {"prompt": ["see: "] * 3, "chosen": GOOD, "rejected": BAD}, swapped)
    config = config.model_copy(update={"inputs": config.inputs | {"data": data}})
    with pytest.raises(
        GateError,
        match=r"^reward.minAccuracy: held-out pair accuracy is 0\.000 \(95 % interval 0\.000 to 0\.561, 3 pairs\), "
        r"below 0.6; train longer \(reward.steps\)",
    ):
        runs.run(config)
    assert runs.artifacts.find(config.output) is None


def test_cost_of_quantisation_is_measured(runs: StageRuns) -> None:
    manifest = runs.run(reward_config(runs, quantization="nf4"))
    cost = json.loads((runs.fetch(manifest) / "report.json").read_text())["quantization_cost"]
    assert cost["pairs"] == 3
    assert cost["accuracy_16_bit"] == 1.0
    assert 0.8 < cost["rank_correlation"] <= 1.0
    assert manifest.metadata["metrics"]["rank_correlation"] == cost["rank_correlation"]
    assert "quantization_cost" not in json.loads(
        (runs.fetch(runs.run(reward_config(runs, compare_base=True, min_accuracy=0.1))) / "report.json").read_text()
    )


def test_pairs_that_the_cut_makes_equal_are_an_error(runs: StageRuns) -> None:
    config = reward_config(runs)
    same = {"prompt": ["a long prompt that leaves no room: "] * 2, "chosen": GOOD[:2], "rejected": BAD[:2]}
    inputs = config.inputs | {"data": runs.put_tables("preference-data", same, same)}
    with pytest.raises(UserError, match=r"^reward.sequenceLength: 8 cuts every held-out pair"):
        runs.run(
            runs.config(
                "reward",
                inputs,
                reward=Reward(steps=1, batch_size=1, sequence_length=8),
                lora=LORA,
                quantization=Quantization(type="none"),
            )
        )


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A folder with a tiny classifier."""
    folder = tmp_path / "classifier"
    config = tiny_config("llama")
    config.id2label, config.label2id = {0: "NEGATIVE", 1: "POSITIVE"}, {"NEGATIVE": 0, "POSITIVE": 1}
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    build_tokenizer(folder)
    return folder


def run_classifier(runs: StageRuns, source: str, label: str = "POSITIVE", revision: str | None = None) -> Path:
    """The artifact of a reward stage with this classifier."""
    reward = Reward(classifier=Classifier(source=source, label=label, revision=revision))
    return runs.fetch(runs.run(runs.config("reward", {}, reward=reward)))


def assert_mirrored(folder: Path, classifier: Path) -> None:
    mirrored = load_reward(folder, CPU)
    assert isinstance(mirrored, ClassifierReward)
    prompts, responses = ["the film"] * 2, [" is warm", " is dull"]
    scores = mirrored(prompts, responses)
    assert scores == ClassifierReward(classifier, "POSITIVE", CPU)(prompts, responses)
    assert scores[0] != scores[1]


def test_classifier_is_mirrored_into_the_artifact(runs: StageRuns, classifier: Path) -> None:
    assert_mirrored(run_classifier(runs, f"file://{classifier}"), classifier)
    with pytest.raises(UserError, match="label: 'good' is no label of the model; it has NEGATIVE, POSITIVE"):
        run_classifier(runs, f"file://{classifier}", label="good")


def test_classifier_comes_from_the_hub(runs: StageRuns, classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub(monkeypatch) as hub:
        hub.models["me/judge"] = classifier
        assert_mirrored(run_classifier(runs, "hf://me/judge", revision="main"), classifier)
        assert "model.safetensors" in hub.asked
        with pytest.raises(UserError, match="revision: 'v9' is no commit, tag or branch of hf://me/judge"):
            run_classifier(runs, "hf://me/judge", revision="v9")
        (classifier / "model.safetensors").rename(classifier / "pytorch_model.bin")
        with pytest.raises(
            UserError, match=r"^reward\.classifier\.source: hf://me/judge has its weights only as pytorch"
        ):
            run_classifier(runs, "hf://me/judge")
        assert "pytorch_model.bin" not in hub.asked


@pytest.mark.s3
def test_classifier_comes_from_a_bucket(runs: StageRuns, classifier: Path, s3_store: StoreConfig) -> None:
    runs.store, runs.artifacts = s3_store, open_artifacts(s3_store)
    for file in classifier.iterdir():
        runs.artifacts.objects.put_file(f"models/judge/{file.name}", file)
    assert_mirrored(run_classifier(runs, f"{s3_store.url}/models/judge"), classifier)
    with pytest.raises(UserError, match=rf"source: {s3_store.url}/models/none holds no objects"):
        run_classifier(runs, f"{s3_store.url}/models/none")


def test_function_is_tried_and_recorded(runs: StageRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    (runs.root / "loudness.py").write_text(
        "def count(prompts, responses): return [r.count('!') for r in responses]\n"
        "def bad(prompts, responses): return []\n"
    )
    monkeypatch.syspath_prepend(str(runs.root))
    texts = runs.put_tables("sft-data", {"text": ["a"]}, {"text": ["a!", "b!!!"]})
    folder = runs.fetch(runs.run(runs.config("reward", {"sft-data": texts}, reward=Reward(function="loudness:count"))))
    assert RewardCard.load(folder) == RewardCard("function", function="loudness:count")
    report = json.loads((folder / "report.json").read_text())
    assert (report["mean"], report["std"], report["samples"]) == (2.0, 1.0, 2)
    with pytest.raises(UserError, match=r"reward.function: loudness:bad returned 0 numbers for 2 samples"):
        runs.run(runs.config("reward", {}, reward=Reward(function="loudness:bad")))
