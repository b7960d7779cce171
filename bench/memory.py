"""Peaks of GPU memory in each phase of PPO, measured, beside what `rlhf plan` would have said.

PYTORCH_ALLOC_CONF=expandable_segments:True python bench/memory.py [--out FILE] [--only gpt-neox-20b]

Each line of FILE is one setting and its peaks in bytes, allocated and reserved; tests/api/test_budget.py holds the
estimate against those of tests/api/measured_peaks.jsonl. Weights are random; a setting that does not fit is told so.
"""

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import torch
from big_model import CONFIGS, GIB, big_model, four_roles, keep_within

from rlhf_api.run import PPO
from rlhf_pipeline import ppo_trainer
from rlhf_pipeline.ppo_trainer import Trainer
from rlhf_pipeline.scoring import AdapterScore

# model, quantization, lora.layers: [rollout rows, prompt, response, micro-batch, layers kept]
SETTINGS: dict[tuple[str, str, str], list[tuple[int, int, int, int, int]]] = {
    ("gpt-neox-20b", "nf4", "top:11"): [
        (8, 64, 64, 8, 11), (16, 128, 128, 16, 11), (8, 512, 512, 4, 0), (8, 512, 512, 2, 11),
    ],
    ("gpt-neox-20b", "nf4", "all"): [(8, 64, 64, 8, 0), (8, 64, 64, 8, 8), (16, 128, 128, 4, 0), (8, 512, 512, 1, 0)],
    ("gpt-neox-20b", "int8", "all"): [(4, 64, 64, 4, 0), (4, 128, 128, 1, 0)],
    ("llama-3.1-8b", "nf4", "all"): [(16, 128, 128, 8, 0), (32, 64, 192, 8, 8), (8, 512, 512, 2, 0)],
    ("llama-3.1-8b", "nf4", "top:8"): [(32, 128, 128, 16, 8)],
    ("qwen3-8b", "nf4", "all"): [(16, 128, 128, 8, 0), (8, 256, 256, 4, 12)],
    ("qwen3-8b", "nf4", "top:9"): [(32, 128, 128, 8, 9)],
    ("qwen3-1.7b", "none", "all"): [(32, 128, 128, 16, 0), (16, 128, 128, 8, 28)],
    ("opt-6.7b", "nf4", "all"): [(16, 128, 128, 8, 0), (8, 256, 256, 4, 8)],
    ("pythia-2.8b", "nf4", "all"): [(64, 64, 64, 16, 0)],
    ("pythia-2.8b", "none", "all"): [(32, 128, 128, 8, 0)],
    ("pythia-6.9b", "nf4", "top:8"): [(32, 256, 256, 8, 8)],
    ("pythia-6.9b", "int8", "all"): [(16, 128, 128, 4, 0)],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("measured_peaks.jsonl"))
    parser.add_argument("--only", nargs="*", help="models to measure")
    parser.add_argument("--cap", type=float, default=23.0)
    arguments = parser.parse_args()
    keep_within(arguments.cap)
    with arguments.out.open("w") as out:
        for (name, quantization, layers), sizes in SETTINGS.items():
            if arguments.only and name not in arguments.only:
                continue
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            model = big_model(name, quantization)
            base = torch.cuda.memory_allocated()
            for size in sizes:
                line: dict[str, Any] = {"model": name, "config": CONFIGS[name], "quantization": quantization}
                line |= {"layers": layers, "size": size, "base": base}
                try:
                    line["peaks"] = peaks(big_model(name, quantization) if model is None else model, layers, size)
                except torch.OutOfMemoryError:
                    line["peaks"] = None
                model = None
                gc.collect()
                torch.cuda.empty_cache()
                out.write(json.dumps(line) + "\n")
                out.flush()
                found = line["peaks"] or {}
                print(f"[memory] {name} {quantization} {layers} {size}: base {base / GIB:.2f}, "
                      + (", ".join(f"{phase} {most[0] / GIB:.2f} ({most[1] / GIB:.2f} reserved)"
                                   for phase, most in found.items()) or "does not fit"), flush=True)  # fmt: skip


def peaks(model: Any, layers: str, size: tuple[int, int, int, int, int]) -> dict[str, list[int]]:
    """The most that each phase of two updates held: allocated and reserved bytes."""
    rows, prompt, response, micro, kept = size
    roles = four_roles(model, layers, kept)
    settings = PPO(
        episodes=10**6, batch_size=rows, micro_batch_size=micro, rollout_batch_size=rows, prompt_tokens=prompt,
        response_tokens=response, missing_eos_penalty=None, epochs=1,
    )  # fmt: skip
    trainer = Trainer(roles, settings, AdapterScore(roles, 0, micro), eos=0, pad=1, seed=1)
    trainer.spent = True  # as many layers are kept as the setting says
    found: dict[str, list[int]] = {}

    class Clock(ppo_trainer._Clock):
        def lap(self, name: str) -> None:
            super().lap(name)
            most = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
            found[name] = [max(pair) for pair in zip(most, found.get(name, most), strict=True)]
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    kept_clock = ppo_trainer._Clock
    ppo_trainer._Clock = Clock  # type: ignore[misc]
    try:
        for _ in range(2):
            ids = torch.randint(5, 50000, (rows, prompt), device="cuda")
            trainer.step(ids, torch.ones_like(ids, dtype=torch.bool))
    finally:
        ppo_trainer._Clock = kept_clock  # type: ignore[misc]
    return found


if __name__ == "__main__":
    main()
