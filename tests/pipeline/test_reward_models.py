"""Classifiers and functions as rewards, and the figures of agreement."""

import random
import sys
from pathlib import Path

import pytest
import torch
from tiny import build_tokenizer, tiny_config
from transformers import AutoModelForSequenceClassification

from rlhf_api.errors import UserError
from rlhf_pipeline.agreement import pair_accuracy, rank_correlation, wilson_interval
from rlhf_pipeline.reward_models import ClassifierReward, FunctionReward, RewardCard, load_reward

torch.set_num_threads(1)
CPU = torch.device("cpu")

MODULE = '''
"""Rewards that behave and misbehave."""
import math
constant = 3
def length(prompts, responses): return [len(p) + len(r) for p, r in zip(prompts, responses)]
def tensor(prompts, responses):
    import torch
    return torch.arange(len(responses))
def short(prompts, responses): return [0.0]
def nan(prompts, responses): return [math.nan if "bad" in r else 1.0 for r in responses]
def word(prompts, responses): return ["high" for _ in responses]
def raises(prompts, responses): return [1 / (r != "bad") for r in responses]
'''


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an importable module of reward functions."""
    name = f"rewards_{random.randrange(10**9)}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / f"{name}_broken.py").write_text("import no_such_module_of_ours\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


def test_function_scores_prompts_and_responses(rewards: str) -> None:
    assert FunctionReward(f"{rewards}:length")(["ab", ""], ["cde", "f"]) == [5.0, 1.0]
    assert FunctionReward(f"{rewards}:tensor")(["", ""], ["", ""]) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (":missing", "missing is not there"),
        (":constant", "is a int, not callable"),
        (":short", "returned 1 numbers for 3 samples"),
        (":nan", "returned nan for sample 1, 'bad'"),
        (":word", "returned 'high' for sample 0"),
        (":raises", r"raised ZeroDivisionError: .*\(sample 1: 'bad'\)"),
        ("_broken:length", "importing .* failed with ModuleNotFoundError: No module named 'no_such_module_of_ours'"),
        ("_nowhere:length", "importing .* failed with ModuleNotFoundError"),
    ],
)
def test_a_function_that_misbehaves_is_named_with_the_sample(rewards: str, name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^reward.function: {rewards}{name}.*{message}"):
        FunctionReward(rewards + name)(["", "", ""], ["fine", "bad", "fine"])


def classifier(folder: Path) -> Path:
    config = tiny_config("llama")
    config.id2label, config.label2id = {0: "NEGATIVE", 1: "POSITIVE"}, {"NEGATIVE": 0, "POSITIVE": 1}
    torch.manual_seed(0)
    config.initializer_range = 0.2
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    build_tokenizer(folder)
    return folder


def test_classifier_gives_the_logit_of_the_named_label(tmp_path: Path) -> None:
    folder = classifier(tmp_path)
    positive, negative = (ClassifierReward(folder, label, CPU) for label in ("POSITIVE", "NEGATIVE"))
    prompts, responses = ["the film", "a"], [" is warm and funny", " dull movie"]
    texts = [p + r for p, r in zip(prompts, responses, strict=True)]
    for index, text in enumerate(texts):
        with torch.no_grad():
            logits = positive.model(**positive.tokenizer(text, return_tensors="pt")).logits[0]
        assert negative(prompts, responses)[index] == pytest.approx(logits[0].item(), abs=1e-5)
        assert positive(prompts, responses)[index] == pytest.approx(logits[1].item(), abs=1e-5)


def test_classifier_cuts_texts_that_are_too_long(tmp_path: Path) -> None:
    reward = ClassifierReward(classifier(tmp_path), "POSITIVE", CPU)
    long = "warm " * 1000
    assert reward([""], [long]) == reward([""], [long + "dull"])


def test_unknown_label_lists_the_labels(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reward.classifier.label: 'positive' .* NEGATIVE, POSITIVE"):
        ClassifierReward(classifier(tmp_path), "positive", CPU)


def test_card_survives_the_round_trip_and_chooses_the_reward(tmp_path: Path, rewards: str) -> None:
    for card in (
        RewardCard("adapter", mean=0.5, std=2.0),
        RewardCard("function", function=f"{rewards}:length"),
        RewardCard("classifier", label="POSITIVE"),
    ):
        card.save(tmp_path)
        assert RewardCard.load(tmp_path) == card
    classifier(tmp_path / "classifier")
    assert isinstance(load_reward(tmp_path, CPU), ClassifierReward)
    RewardCard("function", function=f"{rewards}:length").save(tmp_path)
    assert isinstance(load_reward(tmp_path, CPU), FunctionReward)
    RewardCard("adapter").save(tmp_path)
    assert load_reward(tmp_path, CPU) is None


def test_pair_accuracy_counts_a_tie_as_wrong() -> None:
    assert pair_accuracy(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [3.0, 1.0]])) == 0.5


def test_wilson_interval_matches_the_quadratic_it_solves() -> None:
    for share, count in [(0.85, 128), (0.0, 10), (1.0, 10), (0.5, 4)]:
        for bound in wilson_interval(share, count):
            # Each end p of the interval satisfies (share - p)^2 = z^2 p (1 - p) / count.
            assert (share - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / count, abs=1e-12)
    assert wilson_interval(0.85, 128) == pytest.approx((0.7779, 0.9017), abs=5e-4)


def test_rank_correlation_is_spearmans() -> None:
    scipy = pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    a, b = torch.randn(50), torch.randn(50)
    b[:10] = a[:10].round()
    b[10:20] = 0.0  # ties
    assert rank_correlation(a, b) == pytest.approx(scipy.spearmanr(a, b).statistic, abs=1e-12)
    assert rank_correlation(a, a.exp()) == pytest.approx(1.0)
    assert rank_correlation(a, -a) == pytest.approx(-1.0)
