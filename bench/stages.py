"""Seconds and memory of a step of SFT and of reward training on GPT-NeoX-20B in NF4: the stages' against TRL's own.

python bench/stages.py [--stages sft reward] [--batch 32] [--micro 4] [--lengths 32 256] [--layers all top:11]

Both are TRL's trainers with the same settings: paged 8-bit AdamW, checkpointing, adapters of rank 16. The stage builds
its trainer as `rlhf_pipeline` does; the peer is what a person writes with peft_config. Lengths are drawn evenly, the
same rows for both. --layers is for the reward: what SFT trains is merged, and has adapters on every layer. Figures are
medians of steps after one to warm up.
"""

import argparse
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from big_model import GIB, big_classifier, big_model, keep_within, plain_tokenizer
from transformers import PrinterCallback, TrainerCallback

from rlhf_api.run import SFT, Lora, Reward
from rlhf_pipeline import reward, sft
from rlhf_pipeline.models import lora_config
from rlhf_pipeline.passes import fuse
from rlhf_pipeline.passes.rotary import unfuse_rotary
from rlhf_pipeline.ranks import ALONE
from rlhf_pipeline.reward_adapter import keep_trunk_frozen, with_reward_adapter
from rlhf_pipeline.training import float32_adapters, longest_first, trainer_arguments

WARM_UP = 1
TOKEN_IDS = (5, 50000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt-neox-20b")
    parser.add_argument("--stages", nargs="+", default=["sft", "reward"], choices=["sft", "reward"])
    parser.add_argument("--layers", nargs="+", default=["all", "top:11"], help="of the reward's adapter")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs=2, default=[32, 256], metavar=("LEAST", "MOST"))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cap", type=float, default=23.0)
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), flush=True)
    keep_within(arguments.cap)
    for stage in arguments.stages:
        for layers in arguments.layers if stage == "reward" else ["all"]:
            makers = (ours_sft, trl_sft) if stage == "sft" else (ours_reward, trl_reward)
            ours, peer = (measured(arguments, f"{stage}, {layers}", maker, layers) for maker in makers)
            if ours and peer:
                faster, memory = peer[0] / ours[0], ours[1] / peer[1]
                print(f"[ratio] {stage}, {layers}: {faster:.2f} times as fast as TRL's, {memory:.2f} times its memory")


Maker = Callable[[argparse.Namespace, SimpleNamespace, Lora], Any]
"""A trainer, ready to train."""


def measured(arguments: argparse.Namespace, what: str, maker: Maker, layers: str) -> tuple[float, float] | None:
    """Median seconds of a step and peak reserved GiB; None where memory runs out."""
    name = maker.__name__.split("_")[0]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            _wait()
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        stage = SimpleNamespace(work=Path(folder), ranks=ALONE, settings=SimpleNamespace(seed=1))
        found = None
        trainer = None
        try:
            trainer = maker(arguments, stage, Lora(rank=16, alpha=32, layers=layers))  # type: ignore[arg-type]
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(Clock())
            _forget_peaks()
            trainer.train()
            steps = [after - before for before, after in pairwise(times)]
            found = statistics.median(steps[WARM_UP - 1 :]), _peak()
            print(f"[{name}] {what}: {found[0]:.3f} s a step, peak reserved {found[1]:.2f} GiB", flush=True)
        except torch.OutOfMemoryError as error:
            print(f"[{name}] {what}: out of memory ({str(error)[:80]})", flush=True)
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def texts(arguments: argparse.Namespace, seed: int) -> list[list[int]]:
    """Token ids of as many texts as all steps take."""
    drawn = random.Random(seed)
    return [
        [drawn.randint(*TOKEN_IDS) for _ in range(drawn.randint(*arguments.lengths))]
        for _ in range(arguments.batch * (arguments.steps + WARM_UP))
    ]


def pairs(arguments: argparse.Namespace) -> list[tuple[list[int], list[int]]]:
    return list(zip(texts(arguments, 1), texts(arguments, 2), strict=True))


def section(arguments: argparse.Namespace, kind: type[SFT] | type[Reward]) -> Any:
    return kind(
        steps=arguments.steps + WARM_UP, batch_size=arguments.batch, micro_batch_size=arguments.micro,
        sequence_length=arguments.lengths[1],
    )  # fmt: skip


def ours_sft(arguments: argparse.Namespace, stage: SimpleNamespace, lora: Lora) -> Any:
    rows = longest_first(texts(arguments, 1), arguments.batch, len)
    model = big_model(arguments.model)
    fuse(model)  # as `load_base` does
    return sft.trainer_of(stage, section(arguments, SFT), lora, model, plain_tokenizer(), rows)


def trl_sft(arguments: argparse.Namespace, stage: SimpleNamespace, lora: Lora) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = big_model(arguments.model)
    unfuse_rotary(model)
    settings = SFTConfig(**_settings(arguments, stage, model, SFT), dataset_kwargs={"skip_prepare_dataset": True})
    return SFTTrainer(
        model, args=settings, train_dataset=Dataset.from_dict({"input_ids": texts(arguments, 1)}),
        processing_class=plain_tokenizer(), peft_config=lora_config(lora, model, top=False, dropout=True),
    )  # fmt: skip


def ours_reward(arguments: argparse.Namespace, stage: SimpleNamespace, lora: Lora) -> Any:
    rows = longest_first(pairs(arguments), arguments.batch, lambda pair: max(map(len, pair)))
    base = big_classifier(arguments.model)
    fuse(base)
    model = with_reward_adapter(base, lora)
    trainer = reward.trainer_of(stage, section(arguments, Reward), model, plain_tokenizer(), rows)
    float32_adapters(trainer.model)
    keep_trunk_frozen(trainer.model)
    return trainer


def trl_reward(arguments: argparse.Namespace, stage: SimpleNamespace, lora: Lora) -> Any:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    model = big_classifier(arguments.model)
    unfuse_rotary(model)
    chosen, rejected = zip(*pairs(arguments), strict=True)
    return RewardTrainer(
        model, args=RewardConfig(**_settings(arguments, stage, model, Reward)),
        train_dataset=Dataset.from_dict({"chosen_ids": chosen, "rejected_ids": rejected}),
        processing_class=plain_tokenizer(), peft_config=lora_config(lora, model, top=True, task="SEQ_CLS"),
    )  # fmt: skip


def _settings(
    arguments: argparse.Namespace, stage: SimpleNamespace, model: Any, kind: type[SFT] | type[Reward]
) -> dict[str, Any]:
    """The stage's, but for the order of the rows, which is TRL's own: random."""
    found = trainer_arguments(stage, model, section(arguments, kind))  # type: ignore[arg-type]
    del found["train_sampling_strategy"]
    return found


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _forget_peaks() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak() -> float:
    return torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_available() else float("nan")


if __name__ == "__main__":
    main()
