"""Supervised fine-tuning: a LoRA adapter on every layer of the quantised base, trained by TRL on the texts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_api.canonical import canonical_json
from rlhf_api.errors import UserError
from rlhf_api.run import SFT, Lora
from rlhf_pipeline.adapters import save_adapter
from rlhf_pipeline.losses import chunked_logprobs
from rlhf_pipeline.models import device_of, load_base, load_tokenizer, lora_config, vocabulary_logits
from rlhf_pipeline.stage_process import Stage
from rlhf_pipeline.training import (
    encode,
    float32_adapters,
    held_out_count,
    longest_first,
    read_columns,
    row_count,
    train,
    trainer_arguments,
    training_order,
)


def run(stage: Stage) -> dict[str, float]:
    """Train the adapter and write it with its report. Returns the held-out loss before and after, and tokens seen."""
    from peft import get_peft_model_state_dict

    settings = stage.settings
    sft, lora, quantization = settings.sft, settings.lora, settings.quantization
    if not (sft and lora and quantization):
        raise UserError("stage.settings: sft needs the sections sft, lora and quantization")
    stage.progress.update(total=sft.steps, phase="loading")

    # 1. the rows, in the order they are trained on
    folder, data = stage.input("model"), stage.input("data")
    tokenizer = load_tokenizer(folder)
    draws = sft.steps * sft.batch_size
    order = training_order(row_count(data / "train.parquet"), draws, settings.seed)
    texts = read_columns(data / "train.parquet", ["text"], order)["text"]
    rows = longest_first(encode(tokenizer, texts, sft.sequence_length), sft.batch_size, len)
    held_out_texts = read_columns(data / "heldout.parquet", ["text"], slice(held_out_count(draws, at_least=64)))["text"]
    held_out = encode(tokenizer, held_out_texts, sft.sequence_length)

    # 2. the base, and an adapter on all of its layers
    model = load_base(folder, quantization, device_of(stage.config.gpu, stage.ranks.rank))
    trainer = trainer_of(stage, sft, lora, model, tokenizer, rows)

    # 3. train, between two looks at held-out texts
    stage.progress.update(phase="held-out loss")
    before = held_out_loss(trainer, held_out, tokenizer.pad_token_id)
    train(trainer, stage)
    if not stage.ranks.first:
        return {}
    stage.progress.update(phase="held-out loss")
    after = held_out_loss(trainer, held_out, tokenizer.pad_token_id)

    # 4. the artifact
    config = trainer.model.peft_config["default"]
    tensors = get_peft_model_state_dict(trainer.model, save_embedding_layers=False)
    save_adapter(model, config, tensors, stage.output / "adapter")
    tokens = sum(len(row) for row in rows)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    report = {
        "held_out_rows": len(held_out),
        "train_loss_first": losses[0],
        "train_loss_last": losses[-1],
        "loss_curve": losses,
        "steps": sft.steps,
        "rows": len(set(order)),
        "tokens": tokens,
        "cut_rows": sum(row[-1] != tokenizer.eos_token_id for row in rows),
        "adapter_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "target_modules": sorted(config.target_modules),
    }
    metrics = {"tokens": float(tokens)}
    if before and after:
        losses_held_out = {"held_out_loss_before": before.mean, "held_out_loss_after": after.mean}
        report |= {**losses_held_out, "held_out_tokens": before.tokens}
        metrics |= {**losses_held_out, "held_out_perplexity": math.exp(min(after.mean, 50.0))}
    (stage.output / "report.json").write_bytes(canonical_json(report))
    return metrics


def trainer_of(stage: Stage, sft: SFT, lora: Lora, model: Any, tokenizer: Any, rows: list[list[int]]) -> Any:
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import Trainer
    from trl import SFTConfig, SFTTrainer

    class _PlainLossTrainer(SFTTrainer):
        # TRL's fused head never holds a batch's logits, but computes them twice: a fifth of a small model's step.
        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            return Trainer.compute_loss(self, *arguments, **named)

    torch.manual_seed(stage.settings.seed)  # the adapter's first weights
    arguments = SFTConfig(**trainer_arguments(stage, model, sft), dataset_kwargs={"skip_prepare_dataset": True})
    adapted = get_peft_model(model, lora_config(lora, model, top=False, dropout=True))
    trainer = (_PlainLossTrainer if model.device.type == "cpu" else SFTTrainer)(
        adapted, args=arguments, train_dataset=Dataset.from_dict({"input_ids": rows}), processing_class=tokenizer
    )
    float32_adapters(trainer.model)
    return trainer


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean negative log-likelihood, nats a token, over `tokens` tokens."""

    mean: float
    tokens: int


def held_out_loss(trainer: Any, rows: Sequence[Sequence[int]], pad: int) -> HeldOutLoss | None:
    """The loss of the trainer's model on token ids, each token after the first counting once; None without any.

    It never holds all logits. TRL's fused head would do so too, but compiles itself at its first call.
    """
    if not rows:
        return None
    model, size = trainer.model.get_base_model(), max(1, 4096 // max(len(row) for row in rows))
    training = trainer.model.training
    trainer.model.eval()
    total, tokens = 0.0, 0
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        width = max(len(row) for row in batch)
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in batch], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=model.device)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            logprobs = chunked_logprobs(hidden[:, :-1], ids[:, 1:], lambda h: vocabulary_logits(model, h), 1.0)
        total -= (logprobs.double() * mask[:, 1:]).sum().item()
        tokens += int(mask[:, 1:].sum())
    trainer.model.train(training)
    return HeldOutLoss(total / max(tokens, 1), tokens)
