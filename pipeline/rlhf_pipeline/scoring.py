"""The run's reward as one function of a scored batch, whatever kind it is: adapter, classifier or function."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_pipeline.reward_models import RewardCard, TextReward, load_reward
from rlhf_pipeline.roles import Roles, Trunk
from rlhf_pipeline.rollout import Responses

Score = Callable[[Trunk, Responses], Tensor]
"""Raw score of each response: (batch,), float32."""


@dataclass(frozen=True)
class AdapterScore:
    """The score of the reward adapter on the same base as the policy, read at the last token before EOS."""

    roles: Roles
    eos: int
    micro_batch_size: int

    @torch.no_grad()
    def __call__(self, trunk: Trunk, _: Responses) -> Tensor:
        parts = micro_batches(len(trunk.ids), self.micro_batch_size)
        return torch.cat([self.roles.scores(trunk.rows(part), self.eos) for part in parts])


def load_score(folder: Path, roles: Roles, tokenizer: Any, micro_batch_size: int) -> tuple[Score, RewardCard]:
    """The reward of a reward-model artifact. An adapter joins `roles`; nothing else needs a second model in memory."""
    text_reward = load_reward(folder, roles.device)
    if text_reward is None:
        roles.add_reward(folder)
        return AdapterScore(roles, tokenizer.eos_token_id, micro_batch_size), RewardCard.load(folder)
    return _of_texts(text_reward, tokenizer), RewardCard.load(folder)


def micro_batches(rows: int, size: int) -> list[slice]:
    """Slices of at most `size` rows that cover `rows`."""
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def texts_of(tokenizer: Any, responses: Responses) -> tuple[list[str], list[str]]:
    """Prompts and responses as text, without special tokens."""
    prompts, answers = [], []
    for row in range(len(responses.ids)):
        cut = responses.prompt_tokens
        prompt = responses.ids[row, :cut][responses.mask[row, :cut]]
        answer = responses.response_ids[row][responses.response_mask[row]]
        prompts.append(tokenizer.decode(prompt, skip_special_tokens=True))
        answers.append(tokenizer.decode(answer, skip_special_tokens=True))
    return prompts, answers


def _of_texts(reward: TextReward, tokenizer: Any) -> Score:
    def score(trunk: Trunk, responses: Responses) -> Tensor:
        prompts, answers = texts_of(tokenizer, responses)
        return torch.tensor(reward(prompts, answers), dtype=torch.float32, device=trunk.ids.device)

    return score
