"""The evaluate stage: the SFT policy (the base, adapters off) against the PPO policy, on prompts that PPO never saw."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_api.canonical import canonical_json
from rlhf_api.errors import UserError
from rlhf_pipeline.losses import chunked_logprobs
from rlhf_pipeline.models import device_of, load_base, load_tokenizer
from rlhf_pipeline.prompts import Prompts
from rlhf_pipeline.roles import Role, Roles, Trunk
from rlhf_pipeline.rollout import Responses, Sampling, rollout
from rlhf_pipeline.scorers import IndependentScorer, load_scorers
from rlhf_pipeline.scoring import Score, load_score, texts_of
from rlhf_pipeline.stage_process import Stage
from rlhf_pipeline.statistics import distinct_n, mean_of, paired_rise, win_rate

POLICIES: tuple[Role, Role] = ("reference", "policy")
GENERATIONS_FILE = "generations.jsonl"


@dataclass(frozen=True)
class Generated:
    """What one policy says to every prompt, and how it is judged. Lists run over the prompts."""

    texts: list[str]
    rewards: list[float]  # of the run's reward, normalised as in PPO, without the penalty for a missing EOS
    kl: list[float]  # nats a response: log policy - log reference of what was sampled; 0 for the reference
    tokens: list[int]  # EOS included
    ended: list[bool]
    scores: dict[str, list[float]]  # by each independent scorer


def run(stage: Stage) -> dict[str, float]:
    """Write report.json, generations.jsonl and logs/report.html. Returns the headline figures."""
    settings, ppo = stage.settings.evaluate, stage.settings.ppo
    lora, quantization = stage.settings.lora, stage.settings.quantization
    if not (settings and ppo and lora and quantization):
        raise UserError("stage.settings: evaluate needs the sections evaluate, ppo, lora and quantization")

    began = time.monotonic()

    # 1. Independent scorers first: they fail soonest and cost least.
    stage.progress.update(phase="fitting scorers")
    scorers = load_scorers(settings.scorers, stage.input("data") if stage.has("data") else None)

    # 2. One base; the PPO policy and the reward as adapters on it.
    stage.progress.update(phase="loading")
    device = device_of(stage.config.gpu)
    folder = stage.input("model")
    tokenizer = load_tokenizer(folder)
    roles = Roles(load_base(folder, quantization, device), lora, critic=False)
    policy = stage.input("policy", include=["adapter/*", "report.json"])
    roles.load_adapter("policy", policy / "adapter")
    trained = json.loads((policy / "report.json").read_bytes())
    score, card = load_score(stage.input("reward"), roles, tokenizer, ppo.micro_batch_size)
    scale = (float(trained["score_mean"]), float(trained["score_std"]))
    prompts = Prompts(stage.input("prompts"), "heldout", tokenizer.pad_token_id, stage.settings.seed)
    rows, texts = prompts.rows[: settings.samples], prompts.texts[: settings.samples]
    if len(rows) < 2:
        raise UserError(
            f"evaluate: {len(rows)} held-out prompt gives no interval; raise data.prompts.heldOut, or add prompts"
        )

    # 3. Both policies on the same prompts with the same random numbers.
    sampling = Sampling(ppo.response_tokens, tokenizer.eos_token_id, tokenizer.pad_token_id, settings.temperature)
    bench = Bench(roles, tokenizer, score, scale, sampling, ppo.micro_batch_size)
    parts = [rows[start : start + settings.batch_size] for start in range(0, len(rows), settings.batch_size)]
    generated: dict[str, Generated] = {}
    for turn, role in enumerate(POLICIES):
        judged: list[Generated] = []
        for index, part in enumerate(parts):
            phase = "SFT policy" if role == "reference" else "PPO policy"
            stage.progress.update(step=turn * len(parts) + index, total=len(POLICIES) * len(parts), phase=phase)
            ids, mask = prompts.padded(part, device)
            judged.append(bench.judge(role, ids, mask, stage.settings.seed * 1_000_003 + index))
        generated[role] = _joined(judged, texts, scorers)

    # 4. The figures, and what they are figures of.
    before, after = (generated[role] for role in POLICIES)
    report = figures(before, after, {scorer.name: scorer.about for scorer in scorers})
    report |= {
        "temperature": settings.temperature,
        "response_tokens": ppo.response_tokens,
        "reward_type": card.type,
        "score_mean": scale[0],
        "score_std": scale[1],
    }
    (stage.output / "report.json").write_bytes(canonical_json(report))
    write_generations(stage.output / GENERATIONS_FILE, texts, before, after)

    # 5. The page.
    stage.progress.update(step=len(POLICIES) * len(parts), total=len(POLICIES) * len(parts), phase="report")
    from rlhf_pipeline.report.page import write_stage_report

    write_stage_report(stage, began)
    return headline(report)


@dataclass(frozen=True)
class Bench:
    """Samples from a policy and judges what came out, on one base."""

    roles: Roles
    tokenizer: Any
    score: Score
    scale: tuple[float, float]  # mean and deviation of the raw score, as PPO measured them
    sampling: Sampling
    micro_batch_size: int

    @torch.no_grad()
    def judge(self, role: Role, ids: Tensor, mask: Tensor, seed: int) -> Generated:
        """One batch. ids, mask: (batch, prompt), padded on the left."""
        torch.manual_seed(seed)
        self.roles.activate(role)
        responses = rollout(self.roles.model, ids, mask, self.sampling)
        trunk = self.roles.trunk(responses.ids, responses.mask)
        raw = self.score(trunk, responses)
        return Generated(
            texts=texts_of(self.tokenizer, responses)[1],
            rewards=((raw - self.scale[0]) / self.scale[1]).tolist(),
            kl=[0.0] * len(ids) if role == "reference" else self._kl(trunk, responses),
            tokens=responses.response_mask.sum(-1).tolist(),
            ended=responses.ended.tolist(),
            scores={},
        )

    def _kl(self, trunk: Trunk, responses: Responses) -> list[float]:
        both = [self._logprobs(role, trunk, responses) for role in ("policy", "reference")]
        return ((both[0] - both[1]) * responses.response_mask).sum(-1).tolist()

    def _logprobs(self, role: Role, trunk: Trunk, responses: Responses) -> Tensor:
        temperature = self.sampling.temperature or 1.0  # greedy choices come from the distribution at 1
        found = []
        for start in range(0, len(responses.ids), self.micro_batch_size):
            part = slice(start, start + self.micro_batch_size)
            targets = responses.response_ids[part]
            # The state before a token is the hidden state one position to its left.
            hidden = self.roles.hidden(role, trunk.rows(part))[:, -targets.shape[1] - 1 : -1]
            found.append(chunked_logprobs(hidden, targets, self.roles.logits, temperature))
        return torch.cat(found)


def figures(before: Generated, after: Generated, about: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The contents of report.json: every figure for both policies, its paired rise and win rate with 95 % intervals.

    about: name of each independent scorer -> what is known of it.
    """
    return {
        "samples": len(before.texts),
        "reward": _compared(before.rewards, after.rewards),
        "kl": asdict(mean_of(after.kl)),
        "scorers": {name: _compared(before.scores[name], after.scores[name]) | about[name] for name in about},
        "response_tokens_mean": _compared(before.tokens, after.tokens, winner=False),
        "eos_rate": {"reference": _share(before.ended), "policy": _share(after.ended)},
        "distinct_1": {"reference": distinct_n(before.texts, 1), "policy": distinct_n(after.texts, 1)},
        "distinct_2": {"reference": distinct_n(before.texts, 2), "policy": distinct_n(after.texts, 2)},
        "identical_responses": sum(a == b for a, b in zip(before.texts, after.texts, strict=True)),
    }


def headline(report: dict[str, Any]) -> dict[str, float]:
    """The few figures that status and the command line show."""
    found = {
        "samples": float(report["samples"]),
        "kl": report["kl"]["mean"],
        "reward_before": report["reward"]["reference"]["mean"],
        "reward_after": report["reward"]["policy"]["mean"],
    }
    for name, compared in {"reward": report["reward"], **report["scorers"]}.items():
        found |= {
            f"{name}_rise": compared["rise"]["mean"],
            f"{name}_rise_low": compared["rise"]["low"],
            f"{name}_rise_high": compared["rise"]["high"],
            f"{name}_win_rate": compared["win_rate"]["share"],
        }
    return found


def write_generations(path: Path, prompts: Sequence[str], before: Generated, after: Generated) -> None:
    """One JSON object a prompt: {prompt, reference: {...}, policy: {...}}."""
    with path.open("w", encoding="utf-8") as file:
        for index, prompt in enumerate(prompts):
            row = {"prompt": prompt, "reference": _row(before, index), "policy": _row(after, index)}
            file.write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")


def _row(generated: Generated, index: int) -> dict[str, Any]:
    return {
        "text": generated.texts[index],
        "reward": generated.rewards[index],
        "kl": generated.kl[index],
        "tokens": generated.tokens[index],
        "ended": generated.ended[index],
        "scores": {name: scores[index] for name, scores in generated.scores.items()},
    }


def _joined(parts: Sequence[Generated], prompts: list[str], scorers: Sequence[IndependentScorer]) -> Generated:
    texts = [text for part in parts for text in part.texts]
    return Generated(
        texts=texts,
        rewards=[reward for part in parts for reward in part.rewards],
        kl=[kl for part in parts for kl in part.kl],
        tokens=[tokens for part in parts for tokens in part.tokens],
        ended=[ended for part in parts for ended in part.ended],
        scores={scorer.name: scorer(prompts, texts) for scorer in scorers},
    )


def _compared(before: Sequence[float], after: Sequence[float], winner: bool = True) -> dict[str, Any]:
    compared = {
        "reference": asdict(mean_of(before)),
        "policy": asdict(mean_of(after)),
        "rise": asdict(paired_rise(before, after)),
    }
    return compared | ({"win_rate": asdict(win_rate(before, after))} if winner else {})


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)
