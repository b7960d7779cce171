"""The PPO algorithm on one base with four roles, as numbered steps: `Trainer.step`.

Every detail follows "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031), N+ below; the formulas are in
losses.py, the roles in roles.py, the sampling in rollout.py.

Several ranks share a batch by its rows. Each samples, scores and trains its own; what is small (log-probabilities,
values, scores) all have of the whole batch, so that all compute the same rewards, advantages and figures. Gradients are
added up before each step of the optimisers, which is then the same everywhere.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_api.errors import RLHFError, TrainingError
from rlhf_api.estimate import SPARE_BYTES
from rlhf_api.run import PPO
from rlhf_pipeline.losses import (
    chunked_logprobs,
    chunked_logprobs_and_entropy,
    explained_variance,
    gae,
    masked_mean,
    masked_whiten,
    next_kl_coefficient,
    policy_loss,
    token_rewards,
    value_loss,
)
from rlhf_pipeline.models import memory_limit
from rlhf_pipeline.ranks import ALONE, Ranks
from rlhf_pipeline.roles import Role, Roles, Trunk
from rlhf_pipeline.rollout import Responses, Sampling, rollout
from rlhf_pipeline.scoring import AdapterScore, Score, micro_batches

TRAINED: tuple[Role, ...] = ("policy", "critic")
SHARES = 840  # any number of ranks from 1 to 8 divides it
ADAM_EPSILON = 1e-5  # N+, detail "Adam's epsilon"
# How far the first update may be from "policy = reference, ratio = 1" by rounding alone, in nats, by activation type.
START_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


@dataclass
class Running:
    """What training carries from one rollout to the next, besides weights and optimisers."""

    rollouts: int = 0  # finished
    kl_coefficient: float = 0.0
    score_mean: float = 0.0
    score_std: float = 1.0
    samples: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Scored:
    """What the roles say of a rollout."""

    trunk: Trunk  # of this rank's rows alone
    logprobs: Tensor  # of the policy, (batch, response)
    entropy: Tensor  # of the policy, (batch, response)
    reference: Tensor  # log-probabilities, (batch, response)
    values: Tensor  # of the critic, (batch, response)
    raw: Tensor  # score, (batch,)


@dataclass(frozen=True)
class Batch:
    """One rollout, scored: everything the epochs over it need."""

    own: slice  # this rank's rows
    trunk: Trunk  # of these alone
    response_ids: Tensor  # (batch, response)
    mask: Tensor  # (batch, response)
    logprobs: Tensor  # of the policy that sampled, (batch, response)
    values: Tensor  # (batch, response)
    advantages: Tensor  # (batch, response)
    returns: Tensor  # (batch, response)


@dataclass(frozen=True)
class Last:
    """The rollout just finished, for logs and samples."""

    responses: Responses
    score: Tensor  # (batch,), normalised
    kl: Tensor  # (batch,), nats a response
    figures: dict[str, float]  # what does not depend on the clock


class Trainer:
    """PPO on given prompts; knows nothing of files or stores."""

    def __init__(
        self,
        roles: Roles,
        settings: PPO,
        score: Score,
        eos: int,
        pad: int,
        seed: int,
        rollouts: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.roles, self.settings, self.score, self.seed, self.ranks = roles, settings, score, seed, ranks
        ranks.copy_first(self._trained())
        self.total = rollouts or settings.rollouts
        self.mini = settings.effective_mini_batch_size
        self.sampling = Sampling(settings.response_tokens, eos, pad, settings.temperature)
        self.running = Running(kl_coefficient=settings.kl_coefficient)
        self.optimizers = {
            "policy": _optimizer(roles, "policy", settings.learning_rate),
            "critic": _optimizer(roles, "critic", settings.critic_learning_rate or settings.learning_rate),
        }
        self._rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in self.optimizers.items()}
        self.last: Last
        self.spent = False

    def step(self, ids: Tensor, mask: Tensor) -> dict[str, float]:
        """One rollout and the epochs over it. Returns what practitioners watch.

        ids, mask: (batch, prompt), of the whole batch on every rank, which takes its share.
        """
        clock = _Clock(ids.device)
        first = self.running.rollouts == 0
        self._set_learning_rates()

        # 1. Roll out. The seeds count the groups decoded together, from the first one of the run: a resumed run draws
        # what an uninterrupted one does, and several ranks what one would.
        rows, own = self.settings.effective_rollout_batch_size(self.ranks.size), self.ranks.share(len(ids))
        group = (self.running.rollouts * len(ids) + own.start) // rows
        seeds = [self.seed * 1_000_003 + group + each for each in range(math.ceil((own.stop - own.start) / rows))]
        self.roles.activate("policy")
        sampled = rollout(
            self.roles.model, ids[own], mask[own], self.sampling, rows, trunk_layers=self.roles.bottom, seeds=seeds
        )
        _release(ids.device)  # the cache is gone; hand its memory to training
        clock.lap("rollout")

        # 2. Score: the trunk once, unless sampling has left it, then policy, reference, critic and reward in one pass.
        scored = self._score(sampled)
        responses = self._gathered(sampled)
        trunk, logprobs, reference, values, raw = (
            scored.trunk,
            scored.logprobs,
            scored.reference,
            scored.values,
            scored.raw,
        )
        response_mask = responses.response_mask
        difference = (logprobs - reference) * response_mask
        kl = difference.sum(-1)  # k1, nats a response
        if first:
            self._check_start(difference, "KL of policy to reference")
            if self.settings.normalize_reward:
                # The policy still is the reference: these are the reference's statistics (N+, "reward normalisation").
                spread = float(raw.std()) if len(raw) > 1 else 0.0
                # Scores that are all alike, as a sparse reward's are at first, say nothing of the scale.
                self.running.score_mean, self.running.score_std = float(raw.mean()), spread if spread > 1e-6 else 1.0
            if "reward" in self.roles.heads:
                self.roles.start_critic(self.running.score_mean, self.running.score_std)
                values = self.ranks.gather(self._values(trunk))
        score = (raw - self.running.score_mean) / self.running.score_std
        if self.settings.missing_eos_penalty is not None:
            score = torch.where(responses.ended, score, -self.settings.missing_eos_penalty)
        clock.lap("score")

        # 3. Rewards, advantages, returns.
        rewards = token_rewards(score, logprobs, reference, response_mask, self.running.kl_coefficient)
        if self.settings.whiten_rewards:
            rewards = masked_whiten(rewards, response_mask, shift_mean=False)
        advantages, returns = gae(rewards, values, response_mask, self.settings.gamma, self.settings.gae_lambda)
        advantages = masked_whiten(advantages, response_mask)
        batch = Batch(own, trunk, responses.response_ids, response_mask, logprobs, values, advantages, returns)

        # 4. Update policy and critic.
        with self._memory_spent() as measured:
            metrics = self._update(batch, first, whole=measured)
        clock.lap("train")

        # 5. Adapt the KL coefficient, and say how it went.
        mean_kl = float(kl.mean())
        metrics |= {
            "episodes": float((self.running.rollouts + 1) * len(ids)),
            "reward": float(score.mean()) - self.running.kl_coefficient * mean_kl,
            "score": float(score.mean()),
            "score_raw": float(raw.mean()),
            "kl": mean_kl,
            "kl_coefficient": self.running.kl_coefficient,
            "entropy": float(masked_mean(scored.entropy, response_mask)),
            "explained_variance": explained_variance(values, returns, response_mask),
            "value_mean": float(masked_mean(values, response_mask)),
            "return_mean": float(masked_mean(returns, response_mask)),
            "response_tokens": float(response_mask.sum(-1).float().mean()),
            "eos_rate": float(responses.ended.float().mean()),
            "learning_rate": self.optimizers["policy"].param_groups[0]["lr"],
        }
        metrics = self.ranks.from_first(metrics)  # whether to go on is decided by them
        self.last = Last(responses, score, kl, dict(metrics))
        metrics |= {f"{name}_seconds": seconds for name, seconds in clock.seconds.items()}
        metrics["tokens_per_second"] = float(response_mask.sum()) / max(clock.seconds["rollout"], 1e-9)
        if adaptive := self.settings.adaptive_kl:
            self.running.kl_coefficient = next_kl_coefficient(
                self.running.kl_coefficient, metrics["kl"], adaptive.target, adaptive.horizon, len(ids)
            )
        self.running.rollouts += 1
        return metrics

    def state(self) -> dict[str, Any]:
        """Weights and optimisers of policy and critic, as tensors and plain values."""
        return {
            role: {"weights": self.roles.state(role), "optimizer": self.optimizers[role].state_dict()}
            for role in TRAINED
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        for role in TRAINED:
            self.roles.load_state(role, state[role]["weights"])
            self.optimizers[role].load_state_dict(state[role]["optimizer"])

    # ---- the steps' details ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _score(self, responses: Responses) -> Scored:
        roles: list[Role] = ["policy", "reference", "critic"]
        shared = isinstance(self.score, AdapterScore)  # the reward is read off the same pass as everything else
        if shared:
            roles.append("reward")
        trunks: list[Tensor] = []
        columns: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
        for part in micro_batches(len(responses.ids), self.settings.micro_batch_size):
            trunk = self._trunk(responses, part)
            hidden = dict(zip(roles, self.roles.hidden_of(roles, trunk), strict=True))
            (logprobs, entropy), (reference, _) = (
                chunked_logprobs_and_entropy(
                    self._before_response(hidden[role]),
                    responses.response_ids[part],
                    self.roles.logits,
                    self.settings.temperature,
                )
                for role in ("policy", "reference")
            )
            values = self._before_response(self.roles.scalar("critic", hidden["critic"]))
            raw = self.roles.read_scores(hidden["reward"], trunk, self.sampling.eos) if shared else values.new_empty(0)
            columns.append((logprobs, entropy, reference, values, raw))
            if trunk.hidden is not None:
                trunks.append(trunk.hidden)
        whole = Trunk(responses.ids, responses.mask, torch.cat(trunks) if trunks else None)
        logprobs, entropy, reference, values, raw = (torch.cat(column) for column in zip(*columns, strict=True))
        if not shared:
            raw = self.score(whole, responses).float()
        return Scored(whole, *(self.ranks.gather(each) for each in (logprobs, entropy, reference, values, raw)))

    def _gathered(self, sampled: Responses) -> Responses:
        """The responses of all ranks; their trunk stays where it is."""
        ids, mask, ended = (self.ranks.gather(each) for each in (sampled.ids, sampled.mask, sampled.ended))
        return replace(sampled, ids=ids, mask=mask, ended=ended, trunk=None)

    def _trunk(self, responses: Responses, part: slice) -> Trunk:
        ids, mask = responses.ids[part], responses.mask[part]
        if responses.trunk is None:
            return self.roles.trunk(ids, mask)
        return Trunk(ids, mask, responses.trunk[part])

    def _values(self, trunk: Trunk) -> Tensor:
        with torch.no_grad():
            parts = micro_batches(len(trunk.ids), self.settings.micro_batch_size)
            return torch.cat([self._response_values(trunk.rows(part)) for part in parts])

    def _logprobs(self, role: Role, trunk: Trunk, response_ids: Tensor) -> Tensor:
        hidden = self._before_response(self.roles.hidden(role, trunk), response_ids.shape[1])
        return chunked_logprobs(hidden, response_ids, self.roles.logits, self.settings.temperature)

    def _before_response(self, of_positions: Tensor, tokens: int | None = None) -> Tensor:
        """What stands at the position before each response token, which is where the token is foretold.

        tokens: of the response, at the end of the sequences; all that are sampled, if left out.
        """
        return of_positions[:, -(tokens or self.settings.response_tokens) - 1 : -1]

    def _response_values(self, trunk: Trunk, tokens: int | None = None) -> Tensor:
        return self._before_response(self.roles.values(trunk), tokens)

    def _update(self, batch: Batch, first: bool, *, whole: bool) -> dict[str, float]:
        """The epochs over a batch. whole: at full length, not without what is padding in a whole micro-batch."""
        settings = self.settings
        lengths = batch.mask.sum(-1).cpu()
        totals: dict[str, float] = {}
        minis = 0
        ratio_max = 0.0
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.running.rollouts)
        stopped = False
        for epoch in range(settings.epochs):
            for rows in mini_batches(len(batch.mask), self.mini, generator):
                sums = dict.fromkeys(("policy_loss", "value_loss", "clip_fraction", "value_clip_fraction"), 0.0)
                sums |= {"approx_kl": 0.0, "ratio_mean": 0.0}
                tokens = batch.mask[rows].sum()
                mine = rows[(rows >= batch.own.start) & (rows < batch.own.stop)]
                # Responses of like length together: their sum is the same, and less of it is padding.
                for part in mine[lengths[mine].argsort(descending=True, stable=True)].split(settings.micro_batch_size):
                    longest = settings.response_tokens if whole else int(lengths[part].max())
                    at = part.to(batch.mask.device), slice(longest)
                    mask, old = batch.mask[at], batch.logprobs[at]
                    trunk = batch.trunk.rows(at[0] - batch.own.start)
                    if not whole:
                        trunk = trunk.trimmed(settings.response_tokens - longest)
                    new = self._logprobs("policy", trunk, batch.response_ids[at])
                    if first and epoch == 0 and minis == 0:
                        self._check_start((new - old) * mask, "log ratio of the first mini-batch")
                    loss, clipped = policy_loss(new, old, batch.advantages[at], mask, settings.clip_range)
                    (loss / tokens).backward()  # before another role is activated: see Roles.hidden
                    with torch.no_grad():
                        log_ratio = (new - old) * mask
                        ratio = log_ratio.exp()
                        sums["policy_loss"] += float(loss / tokens)
                        sums["clip_fraction"] += float(clipped / tokens)
                        sums["approx_kl"] += float(((ratio - 1 - log_ratio) * mask).sum() / tokens)  # k3
                        sums["ratio_mean"] += float((ratio * mask).sum() / tokens)
                        ratio_max = max(ratio_max, float(ratio.max()))
                    values = self._response_values(trunk, longest)
                    loss, clipped = value_loss(
                        values, batch.values[at], batch.returns[at], mask, settings.value_clip_range
                    )
                    (settings.value_coefficient * loss / tokens).backward()
                    sums["value_loss"] += float(loss.detach() / tokens)
                    sums["value_clip_fraction"] += float(clipped / tokens)
                self.ranks.add_gradients(self._trained())
                sums = dict(zip(sums, self.ranks.add(list(sums.values())), strict=True))
                for name in TRAINED:
                    norm = torch.nn.utils.clip_grad_norm_(self.roles.parameters(name), settings.max_grad_norm)
                    sums["grad_norm" if name == "policy" else "critic_grad_norm"] = float(norm)
                    if not math.isfinite(float(norm)):
                        raise TrainingError(f"ppo: the gradient of the {name} is {float(norm)} in {self._where()}")
                    self.optimizers[name].step()
                    self.optimizers[name].zero_grad(set_to_none=True)
                minis += 1
                for key, value in sums.items():
                    totals[key] = totals.get(key, 0.0) + value
                if settings.update_kl is not None and sums["approx_kl"] > settings.update_kl:
                    stopped = True
                    break
            if stopped:
                break
        means = {key: value / minis for key, value in totals.items()}
        return means | {"ratio_max": self.ranks.most(ratio_max), "updates": float(minis)}

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for role in TRAINED for parameter in self.roles.parameters(role)]

    @contextmanager
    def _memory_spent(self) -> Iterator[bool]:
        """In a process's first update on a GPU: let the later ones keep what activations the memory holds.

        Gives whether it is that one, which must be as large as any may become.
        """
        if self.roles.device.type == "cuda" and not self.spent:
            self.spent = True
            with self.roles.choosing_kept_layers(memory_limit(self.roles.device) - SPARE_BYTES):
                yield True
            # All go on together, so one that kept more than the others would have nothing from it.
            self.roles.kept_layers = int(self.ranks.least(self.roles.kept_layers))
        else:
            yield False

    def _check_start(self, difference: Tensor, what: str) -> None:
        """Before any update, policy and reference are the same function; if not, a role or a mask is wrong."""
        worst = float(difference.detach().abs().max())
        if not worst <= START_TOLERANCE[self.roles.model.dtype]:
            raise RLHFError(f"ppo: {what} is {worst:.3g} nats before the first update, and must be 0")

    def _where(self) -> str:
        return f"rollout {self.running.rollouts + 1} of {self.total}"

    def _set_learning_rates(self) -> None:
        left = 1.0 - self.running.rollouts / self.total if self.settings.schedule == "linear" else 1.0
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self._rates[name] * left


def mini_batches(rows: int, size: int, generator: torch.Generator) -> Tensor:
    """All of `rows` rows in a random order, as mini-batches of `size`, which divides them: (minis, size).

    Each takes equally many from each of gcd(size, SHARES) blocks of neighbouring rows, and has them in the order of the
    blocks. So ranks that share the rows share each mini-batch equally, and how many there are changes no mini-batch.
    """
    blocks = math.gcd(size, SHARES)
    each = rows // blocks
    order = torch.rand(blocks, each, generator=generator).argsort(-1) + each * torch.arange(blocks)[:, None]
    return order.view(blocks, -1, size // blocks).transpose(0, 1).reshape(-1, size)


def _optimizer(roles: Roles, role: Role, rate: float) -> torch.optim.Optimizer:
    parameters = roles.parameters(role)
    if roles.device.type == "cuda":
        from bitsandbytes.optim import PagedAdamW8bit

        paged: torch.optim.Optimizer = PagedAdamW8bit(parameters, lr=rate, eps=ADAM_EPSILON, weight_decay=0.0)
        return paged
    return torch.optim.AdamW(parameters, lr=rate, eps=ADAM_EPSILON, weight_decay=0.0)


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


class _Clock:
    """Seconds of each part of a step, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now
