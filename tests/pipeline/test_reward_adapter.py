"""The reward adapter that TRL trains on a sequence classifier scores the same on the causal model that PPO uses."""

from pathlib import Path

import pytest
import torch
from tiny import EOS, FAMILIES, PAD, Family, build_tiny_model

from rlhf_api.run import Lora, Quantization
from rlhf_pipeline.models import load_base
from rlhf_pipeline.reward_adapter import (
    keep_trunk_frozen,
    load_reward_adapter,
    save_reward_adapter,
    score,
    score_pairs,
    with_reward_adapter,
)
from rlhf_pipeline.roles import Roles

torch.set_num_threads(1)
PLAIN = Quantization(type="none")
CPU = torch.device("cpu")
TEXTS = [[5, 9, 200, 17, EOS], [300, 11], [40, 41, 42, 43, 44, 45, 46, 47], [7, EOS]]


def trained(folder: Path, lora: Lora):
    """A classifier with a reward adapter and head whose weights are all random, none zero."""
    model = with_reward_adapter(load_base(folder, PLAIN, CPU, classifier=True), lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model


def left_padded(texts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, texts)) + 2
    ids = torch.tensor([[PAD] * (width - len(text)) + text for text in texts])
    return ids, ids != PAD


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", ["all", "top:1"])
def test_saved_adapter_scores_alike_on_the_causal_model(tmp_path: Path, family: Family, layers: str) -> None:
    folder, lora = build_tiny_model(tmp_path / "model", family), Lora(rank=4, layers=layers)
    model = trained(folder, lora)
    expected = score(model, TEXTS, PAD)
    save_reward_adapter(model, tmp_path)

    roles = Roles(load_base(folder, PLAIN, CPU), lora)
    roles.add_reward(tmp_path)
    with torch.no_grad():
        scores = roles.scores(roles.trunk(*left_padded(TEXTS)))

    assert expected.std() > 0.1
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_eos_at_the_end_of_a_response_leaves_its_score_alone(tmp_path: Path) -> None:
    folder, lora = build_tiny_model(tmp_path / "model"), Lora(rank=4, layers="top:1")
    save_reward_adapter(trained(folder, lora), tmp_path)
    roles = Roles(load_base(folder, PLAIN, CPU), lora)
    roles.add_reward(tmp_path)
    bare = [[5, 9, 200], [300, 11, 8]]
    with torch.no_grad():
        plain = roles.scores(roles.trunk(*left_padded(bare)), eos=EOS)
        ended = roles.scores(roles.trunk(*left_padded([bare[0], [*bare[1], EOS]])), eos=EOS)
    torch.testing.assert_close(ended, plain, atol=1e-5, rtol=1e-5)


def test_saved_adapter_scores_alike_on_the_classifier(tmp_path: Path) -> None:
    folder, lora = build_tiny_model(tmp_path / "model"), Lora(rank=4)
    model = trained(folder, lora)
    save_reward_adapter(model, tmp_path)
    again = load_reward_adapter(load_base(folder, PLAIN, CPU, classifier=True), lora, tmp_path)
    torch.testing.assert_close(score(again, TEXTS, PAD), score(model, TEXTS, PAD), atol=0, rtol=0)


def test_score_is_that_of_the_last_token_whatever_the_padding(tmp_path: Path) -> None:
    model = trained(build_tiny_model(tmp_path / "model"), Lora(rank=4))
    alone = torch.cat([score(model, [text], PAD) for text in TEXTS])
    torch.testing.assert_close(score(model, TEXTS, PAD), alone, atol=1e-5, rtol=1e-5)
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[3])]
    torch.testing.assert_close(score_pairs(model, pairs, PAD), alone.view(2, 2), atol=1e-5, rtol=1e-5)


def test_an_untrained_reward_scores_zero(tmp_path: Path) -> None:
    model = with_reward_adapter(load_base(build_tiny_model(tmp_path / "model"), PLAIN, CPU, classifier=True), Lora())
    assert score(model, TEXTS, PAD).tolist() == [0.0] * len(TEXTS)


@pytest.mark.parametrize("ask_for_gradients", [False, True])
def test_backward_stops_at_the_trunk(tmp_path: Path, ask_for_gradients: bool) -> None:
    base = load_base(build_tiny_model(tmp_path / "model", layers=4), PLAIN, CPU, classifier=True)
    model = with_reward_adapter(base, Lora(rank=4, layers="top:2"))
    if ask_for_gradients:  # as TRL does for checkpointing
        model.enable_input_require_grads()
        keep_trunk_frozen(model)
    needs_grad: list[bool] = []
    for layer in base.model.layers:
        layer.register_forward_hook(lambda _, __, out: needs_grad.append(out.requires_grad))
    model(input_ids=torch.tensor([[5, 9, 200]])).logits.sum().backward()
    assert needs_grad == [False, False, True, True]
