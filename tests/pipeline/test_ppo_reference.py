"""One update of the trainer against an independent one: NumPy loops and PEFT's own switches, no code of the engine's.

Written from "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031), on fixed responses of different
lengths, some without EOS, with a policy that has moved away from its reference and mini-batches that clip.
"""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import EOS, PAD, VOCABULARY, build_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_api.run import PPO, Lora
from rlhf_pipeline import ppo_trainer
from rlhf_pipeline.losses import truncate_at_eos
from rlhf_pipeline.ppo_trainer import Trainer
from rlhf_pipeline.roles import Roles
from rlhf_pipeline.rollout import Responses
from rlhf_pipeline.scoring import AdapterScore

ROWS, PROMPT, RESPONSE, TEMPERATURE = 6, 5, 7, 0.7
MEAN, STD, KL, PENALTY = 0.3, 1.7, 0.11, 2.0
RANK, ALPHA = 4, 8


def fixed_responses() -> Responses:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(2, VOCABULARY, (ROWS, PROMPT + RESPONSE), generator=generator)
    mask = torch.ones(ROWS, PROMPT, dtype=torch.bool)
    mask[0, :3] = mask[4, :1] = False
    ids[:, :PROMPT].masked_fill_(~mask, PAD)
    for row, at in {1: 2, 3: 0, 4: 6}.items():  # the others have no EOS
        ids[row, PROMPT + at] = EOS
    cut, real, ended = truncate_at_eos(ids[:, PROMPT:], EOS, PAD)
    return Responses(torch.cat([ids[:, :PROMPT], cut], 1), torch.cat([mask, real], 1), PROMPT, ended)


def roles_with_a_reward(folder: Path, layers: str) -> Roles:
    """Policy, critic and reward adapters that all do something."""
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model(folder)).requires_grad_(False)
    roles = Roles(model, Lora(rank=RANK, alpha=ALPHA, layers=layers))  # type: ignore[arg-type]
    roles._peft.add_adapter("reward", roles._peft.peft_config["policy"])
    roles.heads["reward"] = torch.nn.Linear(roles.width, 1)
    roles._after_injection()
    torch.manual_seed(11)
    for role in ("policy", "critic", "reward"):
        for parameter in roles.parameters(role):  # type: ignore[arg-type]
            parameter.data.normal_(std=0.15)
    return roles


class Reference:
    """The same models under PEFT's own `set_adapter` and `disable_adapter`, whole logits and all."""

    def __init__(self, folder: Path, roles: Roles) -> None:
        base = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False).eval()
        config: LoraConfig = copy.deepcopy(roles._peft.peft_config["policy"])
        self.peft = get_peft_model(base, config, adapter_name="policy")
        for role in ("critic", "reward"):
            self.peft.add_adapter(role, config)
        theirs = dict(self.peft.named_parameters())
        for name, parameter in roles._peft.named_parameters():
            if "lora_" in name:
                theirs[name].data.copy_(parameter.data)
        self.heads = {role: copy.deepcopy(roles.heads[role]) for role in ("critic", "reward")}

    def hidden(self, role: str, responses: Responses) -> Tensor:
        position = (responses.mask.long().cumsum(1) - 1).clamp(min=0)
        given = {"input_ids": responses.ids, "attention_mask": responses.mask.long(), "position_ids": position}
        if role == "reference":
            with self.peft.disable_adapter():
                return self.peft.base_model.model.model(**given, use_cache=False).last_hidden_state  # type: ignore[no-any-return]
        self.peft.set_adapter(role)
        return self.peft.base_model.model.model(**given, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    def logprobs(self, role: str, responses: Responses) -> Tensor:
        logits = self.peft.base_model.model.lm_head(self.hidden(role, responses)) / TEMPERATURE
        every = torch.log_softmax(logits[:, PROMPT - 1 : -1], -1)
        return every.gather(-1, responses.response_ids[..., None])[..., 0]

    def values(self, responses: Responses) -> Tensor:
        return self.heads["critic"](self.hidden("critic", responses))[:, PROMPT - 1 : -1, 0]

    @torch.no_grad()
    def scores(self, responses: Responses) -> np.ndarray:
        read = self.heads["reward"](self.hidden("reward", responses))[..., 0]
        found = []
        for row in range(ROWS):
            real = [t for t in range(PROMPT + RESPONSE) if responses.mask[row, t] and responses.ids[row, t] != EOS]
            found.append(float(read[row, real[-1]]))
        return np.array(found)


def targets(
    score: np.ndarray, policy: np.ndarray, reference: np.ndarray, values: np.ndarray, mask: np.ndarray, s: PPO
) -> tuple[np.ndarray, np.ndarray]:
    """Whitened advantages, and returns, row by row and token by token."""
    lengths = mask.sum(1)
    rewards = np.zeros((ROWS, RESPONSE))
    for row in range(ROWS):
        for t in range(lengths[row]):
            rewards[row, t] = -KL * (policy[row, t] - reference[row, t])
        rewards[row, lengths[row] - 1] += score[row]
    if s.whiten_rewards:
        real = rewards[mask]
        rewards[mask] = (real - real.mean()) / math.sqrt(real.var(ddof=1) + 1e-8) + real.mean()
    advantages = np.zeros_like(rewards)
    for row in range(ROWS):
        running = 0.0
        for t in range(lengths[row] - 1, -1, -1):
            following = values[row, t + 1] if t + 1 < lengths[row] else 0.0
            running = rewards[row, t] + s.gamma * following - values[row, t] + s.gamma * s.gae_lambda * running
            advantages[row, t] = running
    returns = advantages + values * mask
    real = advantages[mask]
    advantages[mask] = (real - real.mean()) / math.sqrt(real.var(ddof=1) + 1e-8)
    return advantages, returns


@pytest.mark.parametrize("layers", ["all", "top:1"])
@pytest.mark.parametrize("whiten", [False, True], ids=["plain", "whitened rewards"])
def test_an_update_is_that_of_an_independent_implementation(
    whiten: bool, layers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    responses = fixed_responses()
    roles = roles_with_a_reward(tmp_path, layers)
    reference = Reference(tmp_path, roles)
    settings = PPO(
        episodes=60, batch_size=ROWS, mini_batch_size=3, micro_batch_size=1, epochs=2, prompt_tokens=PROMPT,
        response_tokens=RESPONSE, learning_rate=3e-2, temperature=TEMPERATURE, kl_coefficient=KL, gamma=0.97,
        gae_lambda=0.9, missing_eos_penalty=PENALTY, whiten_rewards=whiten, max_grad_norm=0.5, schedule="constant",
        clip_range=0.1, value_clip_range=0.1, value_coefficient=0.4,
    )  # fmt: skip
    trainer = Trainer(roles, settings, AdapterScore(roles, EOS, 2), EOS, PAD, seed=1)
    trainer.running.rollouts = 3  # past the start, at which policy and reference must be equal
    trainer.running.score_mean, trainer.running.score_std, trainer.running.kl_coefficient = MEAN, STD, KL
    monkeypatch.setattr(ppo_trainer, "rollout", lambda *_, **__: responses)
    gradients: list[dict[str, list[Tensor]]] = []
    minis: list[list[int]] = []
    for role in ("policy", "critic"):
        recorded(trainer, role, gradients)
    original = ppo_trainer.mini_batches

    def drawn(*arguments: Any) -> Tensor:
        found = original(*arguments)
        minis.extend(found.tolist())
        return found

    monkeypatch.setattr(ppo_trainer, "mini_batches", drawn)
    metrics = trainer.step(responses.ids[:, :PROMPT], responses.mask[:, :PROMPT])

    mask = responses.response_mask.numpy()
    with torch.no_grad():
        old = reference.logprobs("policy", responses)
        frozen = reference.logprobs("reference", responses)
        old_values = reference.values(responses)
    score = (reference.scores(responses) - MEAN) / STD
    score[~responses.ended.numpy()] = -PENALTY
    advantages, returns = targets(
        score, old.double().numpy(), frozen.double().numpy(), old_values.double().numpy(), mask, settings
    )
    assert metrics["score"] == pytest.approx(score.mean(), abs=1e-5)
    assert metrics["kl"] == pytest.approx(((old - frozen).numpy() * mask).sum(1).mean(), abs=1e-4)
    assert metrics["return_mean"] == pytest.approx(returns[mask].mean(), abs=1e-5)

    optimizers = {
        role: torch.optim.AdamW(parameters_of(reference, role), lr=3e-2, eps=1e-5, weight_decay=0.0)
        for role in ("policy", "critic")
    }
    a, r = torch.tensor(advantages).float(), torch.tensor(returns).float()
    m = torch.tensor(mask)
    clipped = {"policy": 0, "value": 0}
    for mini, ours in zip(minis, gradients, strict=True):
        rows = torch.tensor(mini)
        part = Responses(responses.ids[rows], responses.mask[rows], PROMPT, responses.ended[rows])
        ratio = (reference.logprobs("policy", part) - old[rows]).exp()
        worse = torch.max(-a[rows] * ratio, -a[rows] * ratio.clamp(0.9, 1.1))
        clipped["policy"] += int(((ratio < 0.9) | (ratio > 1.1))[m[rows]].sum())
        worse[m[rows]].mean().backward()
        values = reference.values(part)
        near = old_values[rows] + (values - old_values[rows]).clamp(-0.1, 0.1)
        clipped["value"] += int(((values - old_values[rows]).abs() > 0.1)[m[rows]].sum())
        squared = torch.max((values - r[rows]) ** 2, (near - r[rows]) ** 2)
        (0.4 * 0.5 * squared[m[rows]].mean()).backward()
        for role, optimizer in optimizers.items():
            parameters = parameters_of(reference, role)
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            for got, parameter in zip(ours[role], parameters, strict=True):
                assert parameter.grad is not None
                torch.testing.assert_close(got, parameter.grad, rtol=1e-3, atol=1e-5)
            optimizer.step()
            optimizer.zero_grad()
    assert len(minis) == 4
    assert min(clipped.values()) > 0  # both clips were reached


def recorded(trainer: Trainer, role: str, gradients: list[dict[str, list[Tensor]]]) -> None:
    """Write down the role's gradients, after clipping, each time its optimiser steps."""
    optimizer: Any = trainer.optimizers[role]
    step = optimizer.step

    def note() -> None:
        found = [p.grad.clone() for p in trainer.roles.parameters(role)]  # type: ignore[arg-type,union-attr]
        if role == "policy":
            gradients.append({})
        gradients[-1][role] = found
        step()

    optimizer.step = note


def parameters_of(reference: Reference, role: str) -> list[torch.nn.Parameter]:
    """In the order of `Roles.parameters`."""
    found = [p for name, p in reference.peft.named_parameters() if f".{role}." in name and "lora_" in name]
    return found + (list(reference.heads[role].parameters()) if role == "critic" else [])
