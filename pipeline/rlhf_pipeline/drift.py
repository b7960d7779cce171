"""Merge drift: what the held-out loss makes of quantising the merged weights anew.

SFT trained the adapter beside the quantised base; PPO starts from the merged weights, quantised again.
"""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_api.run import Quantization

ROWS = 64
TOKENS = 1024  # of all rows together: the two losses are of the same tokens, so few are enough
BATCH_TOKENS = 512  # bounds the logits: (512, vocabulary)


def measure_drift(
    base: Path, adapter: Path, merged: Path, rows: Sequence[list[int]], quantization: Quantization, device: torch.device
) -> dict[str, float]:
    """{adapter_loss, merged_loss, difference, tokens}: mean loss, nats a token, of quantised base + adapter and merged.

    rows: token ids. The models are loaded one after the other.
    """
    from peft import PeftModel

    from rlhf_pipeline.models import load_base

    model = PeftModel.from_pretrained(load_base(base, quantization, device), adapter)
    with_adapter = _mean_loss(model.eval(), rows)
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    after = _mean_loss(load_base(merged, quantization, device), rows)
    tokens = sum(len(row) - 1 for row in rows)
    return {
        "adapter_loss": with_adapter,
        "merged_loss": after,
        "difference": after - with_adapter,
        "tokens": float(tokens),
    }


def few_rows(rows: Sequence[list[int]]) -> list[list[int]]:
    """The first rows, of at most ROWS, TOKENS in all and BATCH_TOKENS each; a row of one token predicts nothing."""
    kept: list[list[int]] = []
    for row in rows:
        cut = row[:BATCH_TOKENS]
        if len(cut) < 2:
            continue
        if len(kept) == ROWS or sum(map(len, kept)) + len(cut) > TOKENS:
            break
        kept.append(cut)
    return kept


@torch.no_grad()
def _mean_loss(model: Any, rows: Sequence[list[int]]) -> float:
    total, count = 0.0, 0
    for batch in _batches(rows):
        width = max(map(len, batch))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=model.device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        total += (losses * mask[:, 1:]).double().sum().item()
        count += int(mask[:, 1:].sum())
    return total / count


def _batches(rows: Sequence[list[int]]) -> list[list[list[int]]]:
    """Rows of like length together, at most BATCH_TOKENS a batch with the padding."""
    batches: list[list[list[int]]] = []
    for row in sorted(rows, key=len, reverse=True):  # a batch's first row is its longest
        if not batches or len(batches[-1][0]) * (len(batches[-1]) + 1) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(row)
    return batches
