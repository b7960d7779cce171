"""The PPO algorithm: where it starts, what it may change, and that it finds a known optimum."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tiny import EOS, PAD, VOCABULARY, build_tiny_model, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_api.errors import RLHFError
from rlhf_api.run import PPO, Lora
from rlhf_pipeline import ppo_trainer
from rlhf_pipeline.ppo_trainer import TRAINED, Batch, Trainer
from rlhf_pipeline.roles import Role, Roles, Trunk
from rlhf_pipeline.rollout import Responses

SETTINGS: dict[str, Any] = {
    "episodes": 64,
    "batch_size": 8,
    "mini_batch_size": 4,
    "micro_batch_size": 2,
    "epochs": 2,
    "prompt_tokens": 5,
    "response_tokens": 6,
    "learning_rate": 1e-2,
    "missing_eos_penalty": None,
}


def even_tokens(trunk: Trunk, responses: Responses) -> Tensor:
    """A score that any policy can raise: the share of even token ids."""
    mask = responses.response_mask
    return ((responses.response_ids % 2 == 0) & mask).sum(-1) / mask.sum(-1)


def trainer_of(
    folder: Path, score: Callable[[Trunk, Responses], Tensor] = even_tokens, layers: str = "top:1", **changed: Any
) -> Trainer:
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model(folder)).requires_grad_(False)
    torch.manual_seed(0)
    roles = Roles(model, Lora(rank=4, layers=layers))
    return Trainer(roles, PPO(**SETTINGS | changed), score, EOS, PAD, seed=1)


def prompts(rows: int = 8) -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, VOCABULARY, (rows, 5), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(rows, 5, dtype=torch.bool)
    mask[0, :3] = False
    return ids.masked_fill(~mask, PAD), mask


@pytest.mark.parametrize("layers", ["all", "top:1"])
def test_the_first_rollout_has_no_kl_and_all_ratios_one(
    layers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ppo_trainer, "START_TOLERANCE", {torch.float32: 1e-5})
    metrics = trainer_of(tmp_path, layers=layers, epochs=1, mini_batch_size=8, learning_rate=1e-9).step(*prompts())
    assert metrics["kl"] == 0
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-5)
    assert metrics["clip_fraction"] == 0


def test_a_policy_that_is_not_the_reference_at_the_start_is_a_bug(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    for parameter in trainer.roles.parameters("policy"):
        parameter.data.normal_()
    with pytest.raises(RLHFError, match=r"KL of policy to reference is .* and must be 0"):
        trainer.step(*prompts())


def test_training_changes_policy_and_critic_and_nothing_else(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    roles = trainer.roles
    roles._peft.add_adapter("reward", roles._peft.peft_config["policy"])
    roles._after_injection()
    ids, mask = prompts()
    before = {name: p.detach().clone() for name, p in roles.model.named_parameters()}
    reference = roles.logits(roles.hidden("reference", roles.trunk(ids, mask)))
    for _ in range(2):
        trainer.step(ids, mask)
    changed = {name for name, p in roles.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(".policy." in name or ".critic." in name for name in changed)
    assert any(".policy." in name for name in changed)
    assert any(".critic." in name for name in changed)
    assert {name for name, p in roles.model.named_parameters() if p.requires_grad} >= changed
    assert not any(p.requires_grad for name, p in roles.model.named_parameters() if "lora_" not in name)
    assert not any(p.requires_grad for p in roles.parameters("reward"))
    assert torch.equal(roles.logits(roles.hidden("reference", roles.trunk(ids, mask)))[mask], reference[mask])
    assert not any(module.training for module in roles.model.modules())


def test_micro_batches_add_up_to_the_same_update(tmp_path: Path) -> None:
    after = []
    for micro in (1, 2, 4):
        trainer = trainer_of(tmp_path / str(micro), micro_batch_size=micro, epochs=1)
        trainer.step(*prompts())
        after.append(torch.cat([p.detach().flatten() for p in trainer.roles.parameters("policy")]))
    assert torch.allclose(after[0], after[1], atol=1e-4)
    assert torch.allclose(after[0], after[2], atol=1e-4)


@pytest.mark.parametrize("layers", ["all", "top:1"])
def test_an_update_leaves_padding_out_and_comes_to_the_same(layers: str, tmp_path: Path) -> None:
    after, seen = [], []
    for whole in (True, False):
        trainer = trainer_of(tmp_path / str(whole), layers=layers, response_tokens=64, mini_batch_size=8, epochs=1)
        update, hidden = trainer._update, trainer.roles.hidden
        trained: list[Tensor] = []

        def noted(role: Role, trunk: Trunk, hidden: Any = hidden, trained: list[Tensor] = trained) -> Tensor:
            if torch.is_grad_enabled() and role == "policy":
                trained.append(trunk.mask)
            return cast(Tensor, hidden(role, trunk))

        def updated(
            batch: Batch, first: bool, forced: bool = whole, update: Any = update, **_: bool
        ) -> dict[str, float]:
            return cast(dict[str, float], update(batch, first, whole=forced))

        trainer.roles.hidden, trainer._update = noted, updated  # type: ignore[method-assign, assignment]
        trainer.step(*prompts())
        seen.append(trained)
        after.append(torch.cat([p.detach().flatten() for role in TRAINED for p in trainer.roles.parameters(role)]))
    assert torch.allclose(*after, atol=1e-4)
    assert {mask.shape[1] for mask in seen[0]} == {5 + 64}
    assert len({mask.shape[1] for mask in seen[1]}) > 1, "all responses are alike: they show nothing"
    assert all(mask.any(0).all() for mask in seen[1])
    assert sum(mask.sum() for mask in seen[0]) == sum(mask.sum() for mask in seen[1])


def test_a_trainer_put_back_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    whole = trainer_of(tmp_path / "whole", adaptive_kl={"target": 1.0, "horizon": 50})
    for _ in range(4):
        expected = whole.step(*prompts())
    first = trainer_of(tmp_path / "first", adaptive_kl={"target": 1.0, "horizon": 50})
    for _ in range(2):
        first.step(*prompts())
    torch.save(first.state(), tmp_path / "state.pt")
    second = trainer_of(tmp_path / "second", adaptive_kl={"target": 1.0, "horizon": 50})
    second.running = first.running
    second.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(2):
        second.step(*prompts())
    for role in ("policy", "critic"):
        ours, theirs = second.roles.state(role), whole.roles.state(role)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert second.last.figures == {key: expected[key] for key in second.last.figures}


def test_a_missing_eos_costs_the_penalty(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, missing_eos_penalty=3.0, normalize_reward=False)
    trainer.step(*prompts())
    ended = trainer.last.responses.ended
    assert not ended.all()
    assert (trainer.last.score[~ended] == -3.0).all()


def test_scores_that_are_all_alike_are_not_blown_up(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, score=lambda _, responses: torch.full((len(responses.ids),), 3.0))
    trainer.step(*prompts())
    assert (trainer.running.score_mean, trainer.running.score_std) == (3.0, 1.0)
    assert not trainer.last.score.any()


def test_the_critic_starts_as_the_scaled_reward_model(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, score=lambda trunk, _: trainer.roles.scores(trunk), learning_rate=1e-9)
    roles = trainer.roles
    roles._peft.add_adapter("reward", roles._peft.peft_config["policy"])
    roles.heads["reward"] = torch.nn.Linear(roles.width, 1)
    roles._after_injection()
    for parameter in roles.parameters("reward"):
        parameter.data.normal_(std=0.2)
    trainer.step(*prompts())
    last, running = trainer.last, trainer.running
    trunk = roles.trunk(last.responses.ids, last.responses.mask)
    ends = last.responses.mask.shape[1] - 1 - last.responses.mask.long().flip(-1).argmax(-1)
    values = roles.values(trunk)[torch.arange(8), ends]
    assert running.score_std > 0.01
    assert torch.allclose(values, (roles.scores(trunk) - running.score_mean) / running.score_std, atol=1e-3)
    assert torch.allclose(last.score.mean(), torch.tensor(0.0), atol=1e-5)
    assert last.score.std().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_it_finds_the_known_optimum_of_a_two_action_task(tmp_path: Path) -> None:
    """One token; score 1 if it is the wanted one, else 0. The optimum of E[score] - beta KL is known in closed form.

    Where the reference gives it probability p, it is p e^(1/beta) / (p e^(1/beta) + 1 - p). A wrong sign of the
    advantage, or of the KL penalty, or a penalty of another size, ends elsewhere.
    """
    beta, wanted, rollouts, batch_size = 0.5, 0, 40, 64

    def score(trunk: Trunk, responses: Responses) -> Tensor:
        return (responses.response_ids[:, 0] == wanted).float()

    # Eight tokens in 32 dimensions: the adapter can move one probability and leave the others' ratios alone.
    config = tiny_config("llama", layers=2)
    config.vocab_size, config.initializer_range = 8, 0.15
    torch.manual_seed(0)
    roles = Roles(AutoModelForCausalLM.from_config(config).requires_grad_(False), Lora(rank=4, layers="top:1"))
    whole = {"batch_size": batch_size, "mini_batch_size": batch_size, "micro_batch_size": batch_size, "epochs": 4}
    task = {"response_tokens": 1, "normalize_reward": False, "kl_coefficient": beta, "episodes": batch_size * rollouts}
    trainer = Trainer(roles, PPO(**SETTINGS | whole | task), score, EOS, PAD, seed=1)
    ids = torch.tensor([[3, 4, 5]]).expand(batch_size, -1)
    mask = torch.ones_like(ids, dtype=torch.bool)

    @torch.no_grad()
    def probabilities(role: Role) -> Tensor:
        logits = roles.logits(roles.hidden(role, roles.trunk(ids[:1], mask[:1])))
        return torch.softmax(logits[0, -1], -1)

    wanted = int(probabilities("reference").argsort()[4])
    p = float(probabilities("reference")[wanted])
    optimum = p * math.exp(1 / beta) / (p * math.exp(1 / beta) + 1 - p)
    assert p < 0.15 < 0.35 < optimum < 0.6
    for _ in range(rollouts):
        trainer.step(ids, mask)
    assert float(probabilities("policy")[wanted]) == pytest.approx(optimum, abs=0.06)
    assert float(probabilities("reference")[wanted]) == p
