"""The reward stage: a reward adapter with a scalar head, trained by TRL on pairs; or a classifier, or a function.

The adapter sits on the merged base, where PPO's policy and critic sit too, so no second model is ever held.
"""

import gc
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_api.canonical import canonical_json
from rlhf_api.errors import GateError, UserError
from rlhf_api.run import Lora, Quantization, Reward
from rlhf_pipeline.agreement import pair_accuracy, rank_correlation, wilson_interval
from rlhf_pipeline.models import device_of, load_base, load_tokenizer, memory_limit
from rlhf_pipeline.reward_adapter import (
    Pair,
    keep_trunk_frozen,
    load_reward_adapter,
    save_reward_adapter,
    score,
    score_pairs,
    with_reward_adapter,
)
from rlhf_pipeline.reward_models import ClassifierReward, FunctionReward, RewardCard
from rlhf_pipeline.stage_process import Stage

NORMALISATION_TEXTS = 64
COMPARED_PAIRS = 256
MAX_CPU_PARAMETERS = 2e9  # scoring a larger 16-bit base on a CPU takes longer than it is worth


def run(stage: Stage) -> dict[str, float]:
    """Make the reward model that the run asks for. Returns its held-out figures. Raises GateError below minAccuracy."""
    reward = stage.settings.reward
    if not reward:
        raise UserError("stage.settings: reward needs the section reward")
    if reward.function:
        return _function(stage, reward.function)
    if reward.classifier:
        return _classifier(stage, reward)
    return _trained(stage, reward)


# ---- a trained adapter ----------------------------------------------------------------------------------------------


def _trained(stage: Stage, reward: Reward) -> dict[str, float]:
    from rlhf_pipeline.training import (
        float32_adapters,
        held_out_count,
        longest_first,
        row_count,
        stop_if_asked,
        train,
        training_order,
    )

    settings = stage.settings
    lora, quantization = settings.lora, settings.quantization
    if not (lora and quantization):
        raise UserError("stage.settings: reward needs the sections lora and quantization")
    stage.progress.update(total=reward.steps, phase="loading")

    # 1. the pairs, in the order they are trained on
    folder, data = stage.input("model"), stage.input("data")
    tokenizer = load_tokenizer(folder)
    draws = reward.steps * reward.batch_size
    order = training_order(row_count(data / "train.parquet"), draws, settings.seed)
    pairs = longest_first(
        _pairs(tokenizer, data / "train.parquet", order, reward.sequence_length),
        reward.batch_size,
        lambda pair: max(map(len, pair)),
    )
    held_out = _pairs(
        tokenizer, data / "heldout.parquet", slice(held_out_count(draws, at_least=128)), reward.sequence_length
    )
    held_out = [pair for pair in held_out if pair[0] != pair[1]]
    if not held_out:
        raise UserError(
            f"reward.sequenceLength: {reward.sequence_length} cuts every held-out pair to the same tokens, "
            "or data.preferences.heldOut leaves none; raise them"
        )

    # 2. the base as a classifier with one output, an adapter, a head
    device = device_of(stage.config.gpu, stage.ranks.rank)
    base = load_base(folder, quantization, device, classifier=True)
    torch.manual_seed(settings.seed)  # the adapter's first weights
    trainer = trainer_of(stage, reward, with_reward_adapter(base, lora), tokenizer, pairs)
    float32_adapters(trainer.model)
    keep_trunk_frozen(trainer.model)

    # 3. train
    train(trainer, stage)
    if not stage.ranks.first:
        return {}

    # 4. how good it is on held-out pairs
    stage.progress.update(phase="held-out accuracy")
    scores = score_pairs(trainer.model, held_out, tokenizer.pad_token_id)
    accuracy = pair_accuracy(scores)
    low, high = wilson_interval(accuracy, len(held_out))
    if accuracy < reward.min_accuracy:
        raise GateError(
            f"reward.minAccuracy: held-out pair accuracy is {accuracy:.3f} (95 % interval {low:.3f} to {high:.3f}, "
            f"{len(held_out)} pairs), below {reward.min_accuracy}; train longer (reward.steps), raise "
            "reward.learningRate, adapt more layers (lora.layers), or look at the pairs"
        )

    # 5. the bias taken off: mean 0, deviation 1 on texts like those of the SFT model
    stop_if_asked(stage)
    stage.progress.update(phase="normalising")
    texts, source = _normalisation_texts(stage, tokenizer, held_out, reward.sequence_length)
    plain = score(trainer.model, texts, tokenizer.pad_token_id)
    mean, std = plain.mean().item(), max(plain.std(correction=0).item(), 1e-6)

    # 6. the artifact
    save_reward_adapter(trainer.model, stage.output)
    RewardCard("adapter", mean=mean, std=std).save(stage.output)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    report: dict[str, Any] = {
        "type": "adapter",
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "held_out_pairs": len(held_out),
        "min_accuracy": reward.min_accuracy,
        "mean": mean,
        "std": std,
        "normalised_on": f"{len(plain)} {source}",
        "margin_mean": (scores[:, 0] - scores[:, 1]).mean().item(),
        "held_out_scores": {"chosen": scores[:, 0].tolist(), "rejected": scores[:, 1].tolist()},
        "train_loss_first": losses[0],
        "train_loss_last": losses[-1],
        "loss_curve": losses,
        "steps": reward.steps,
        "pairs": len(set(order)),
        "tokens": sum(len(chosen) + len(rejected) for chosen, rejected in pairs),
        "adapter_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }
    metrics = {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "mean": mean, "std": std}

    # 7. what quantisation costs
    if reward.compare_base and quantization.type != "none":
        stop_if_asked(stage)
        stage.progress.update(phase="comparing with 16 bit")
        del trainer, base  # the quantised base makes room for the 16-bit one
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        compared = _compare(
            folder,
            lora,
            stage.output,
            held_out[:COMPARED_PAIRS],
            scores[:COMPARED_PAIRS],
            device,
            tokenizer.pad_token_id,
        )
        report["quantization_cost"] = compared
        metrics |= {name: value for name, value in compared.items() if isinstance(value, float)}
    (stage.output / "report.json").write_bytes(canonical_json(report))
    return metrics


def _pairs(tokenizer: Any, path: Path, rows: Sequence[int] | slice, length: int) -> list[Pair]:
    from rlhf_pipeline.training import encode, read_columns

    # Scores are read at the last token of the text proper. With EOS on some texts and not on those that are cut, the
    # head would learn the difference between the two kinds of ending before anything else.
    columns = read_columns(path, ["prompt", "chosen", "rejected"], rows)
    both = [
        encode(
            tokenizer, [p + text for p, text in zip(columns["prompt"], columns[side], strict=True)], length, end=False
        )
        for side in ("chosen", "rejected")
    ]
    return list(zip(*both, strict=True))


def trainer_of(stage: Stage, reward: Reward, model: Any, tokenizer: Any, pairs: list[Pair]) -> Any:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    from rlhf_pipeline.training import trainer_arguments

    arguments = RewardConfig(**trainer_arguments(stage, model, reward))
    rows = Dataset.from_dict({"chosen_ids": [pair[0] for pair in pairs], "rejected_ids": [pair[1] for pair in pairs]})
    return RewardTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)


def _normalisation_texts(
    stage: Stage, tokenizer: Any, held_out: list[Pair], length: int
) -> tuple[list[list[int]], str]:
    from rlhf_pipeline.training import encode, read_columns

    texts: list[str] = []
    if stage.has("sft-data"):
        path = stage.input("sft-data") / "heldout.parquet"
        texts = read_columns(path, ["text"], slice(NORMALISATION_TEXTS))["text"]
    if not texts:
        return [text for pair in held_out for text in pair], "texts of held-out pairs"
    return encode(tokenizer, texts, length, end=False), "held-out SFT texts"


def _compare(
    folder: Path, lora: Lora, adapter: Path, pairs: list[Pair], quantised: Tensor, device: torch.device, pad: int
) -> dict[str, float | str | int]:
    """Accuracy and rank agreement of the quantised base against the 16-bit one, with the same adapter."""
    place = _place_of_16_bit(folder, device)
    if isinstance(place, str):
        return {"skipped": place}
    model = load_base(folder, Quantization(type="none"), place, classifier=True)
    exact = score_pairs(load_reward_adapter(model, lora, adapter), pairs, pad)
    same = (quantised[:, 0] > quantised[:, 1]) == (exact[:, 0] > exact[:, 1])
    return {
        "pairs": len(pairs),
        "accuracy_quantised": pair_accuracy(quantised),
        "accuracy_16_bit": pair_accuracy(exact),
        "rank_correlation": rank_correlation(quantised.flatten(), exact.flatten()),
        "same_preference": same.double().mean().item(),
    }


def _place_of_16_bit(folder: Path, device: torch.device) -> torch.device | str:
    parameters = sum(_safetensors_parameters(path) for path in folder.glob("*.safetensors"))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if 2.2 * parameters + 2**30 < min(free, memory_limit(device)):
            return device
    if parameters < MAX_CPU_PARAMETERS:
        return torch.device("cpu")
    return f"{parameters / 1e9:.1f} billion weights in 16 bit do not fit the GPU, and a CPU would take too long"


def _safetensors_parameters(path: Path) -> int:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


# ---- a classifier, a function ---------------------------------------------------------------------------------------


def _classifier(stage: Stage, reward: Reward) -> dict[str, float]:
    from rlhf_pipeline.sources import fetch_model

    wanted = reward.classifier
    assert wanted
    stage.progress.update(phase="reading the classifier")
    into = stage.work / "classifier"
    source = fetch_model(wanted.source, wanted.revision, into, stage.config.store, "reward.classifier.source")
    classifier = ClassifierReward(source, wanted.label, torch.device("cpu"))
    classifier.model.save_pretrained(stage.output / "classifier")
    classifier.tokenizer.save_pretrained(stage.output / "classifier")
    RewardCard("classifier", label=wanted.label).save(stage.output)
    return _sample_report(stage, classifier, {"type": "classifier", "label": wanted.label})


def _function(stage: Stage, reference: str) -> dict[str, float]:
    stage.progress.update(phase="trying the function")
    RewardCard("function", function=reference).save(stage.output)
    return _sample_report(stage, FunctionReward(reference), {"type": "function", "function": reference})


def _sample_report(stage: Stage, scorer: Any, figures: dict[str, Any]) -> dict[str, float]:
    """Score a few texts, so that a scorer that cannot work fails here and not in PPO."""
    from rlhf_pipeline.training import read_columns

    texts = ["The film was a pleasure to watch.", "The film was a waste of time."]
    if stage.has("sft-data"):
        path = stage.input("sft-data") / "heldout.parquet"
        texts = read_columns(path, ["text"], slice(NORMALISATION_TEXTS))["text"] or texts
    scores = torch.tensor(scorer([""] * len(texts), texts))
    figures |= {
        "samples": len(texts),
        "mean": scores.mean().item(),
        "std": scores.std(correction=0).item(),
        "scores": scores.tolist(),
    }
    (stage.output / "report.json").write_bytes(canonical_json(figures))
    return {"mean": figures["mean"], "std": figures["std"]}
