"""What the two TRL stages share: rows in training order, trainer arguments, the tie between trainer and stage."""

import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf_api.errors import TrainingError, UserError
from rlhf_api.run import SFT, Reward
from rlhf_pipeline.stage_process import Interrupted, Stage


def training_order(rows: int, draws: int, seed: int) -> list[int]:
    """The row of each of `draws` training examples: whole permutations of `rows` rows, one after the other.

    The order depends on the seed alone, so a resumed run only has to skip what it has seen.
    """
    if rows == 0:
        raise UserError("data: train.parquet has no rows; give rows, or lower heldOut")
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < draws:
        order += torch.randperm(rows, generator=generator).tolist()
    return order[:draws]


def longest_first[T](rows: Sequence[T], batch_size: int, length: Callable[[T], int]) -> list[T]:
    """The rows of each optimiser step by length: its micro-batches are padded less, and its gradient is the same."""
    steps = (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
    return [row for step in steps for row in sorted(step, key=length, reverse=True)]


def held_out_count(trained: int, at_least: int) -> int:
    """How many held-out rows are scored at most: a tenth of the rows trained on, to cost little."""
    return max(at_least, trained // 10)


def read_columns(path: Path, columns: Sequence[str], rows: Sequence[int] | slice) -> dict[str, list[str]]:
    """Some rows of some text columns of a Parquet file, as lists."""
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=list(columns))
    table = table.slice(0, rows.stop) if isinstance(rows, slice) else table.take(list(rows))
    return {name: table.column(name).to_pylist() for name in columns}


def row_count(path: Path) -> int:
    """Rows of a Parquet file, read from its footer."""
    import pyarrow.parquet as pq

    return int(pq.read_metadata(path).num_rows)


def encode(tokenizer: Any, texts: Sequence[str], length: int, *, end: bool = True) -> list[list[int]]:
    """Token ids of each text, at most `length`. end: EOS ends a text that fits whole; a text that is cut has none.

    A cut text goes on, so an EOS there would teach the model to stop anywhere.
    """
    if not texts:  # the tokenizer fails on none
        return []
    eos = tokenizer.eos_token_id
    encoded = []
    for ids in tokenizer(list(texts), verbose=False)["input_ids"]:
        bare = ids[:-1] if ids and ids[-1] == eos else ids
        encoded.append([*bare, eos][:length] if end or not bare else bare[:length])
    return encoded


def trainer_arguments(stage: Stage, model: Any, section: SFT | Reward) -> dict[str, Any]:
    """Arguments of a TRL config that trains `model` as the stage's section asks for."""
    cuda = model.device.type == "cuda"
    return {
        "output_dir": str(stage.work / "trainer"),
        "max_steps": section.steps,
        "per_device_train_batch_size": section.micro_batch_size,
        # The ranks take the micro-batches in turn, so a step's rows are those of one process.
        "gradient_accumulation_steps": section.batch_size // (section.micro_batch_size * stage.ranks.size),
        "ddp_find_unused_parameters": False,  # every adapter is part of every pass
        "ddp_broadcast_buffers": False,  # they are alike, and stay so
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if section.schedule == "constant" else section.schedule,
        "warmup_steps": section.warmup_steps if isinstance(section, SFT) else 0,
        "optim": "paged_adamw_8bit" if cuda else "adamw_torch",
        "train_sampling_strategy": "sequential",  # the rows come in training order
        "use_cpu": not cuda,
        # Adapters stay float32; autocast runs them in the type of the base's activations.
        "bf16": model.dtype == torch.bfloat16,
        "fp16": model.dtype == torch.float16,
        "gradient_checkpointing": cuda,  # on a CPU memory is no concern and it costs a third of the speed
        "save_strategy": "steps",
        "save_steps": section.checkpoint_steps,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would hide the NaN that must stop the stage
        "max_length": None,  # `encode` has cut the texts
        "report_to": "none",
        "disable_tqdm": True,
        "seed": stage.settings.seed,
    }


def float32_adapters(model: Any) -> None:
    """Make the trainable weights of `model` float32: TRL turns them to bfloat16 on a quantised base.

    Small steps vanish in bfloat16, and without autocast a bfloat16 head fails on float32 activations.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def train(trainer: Any, stage: Stage) -> None:
    """Train to the end, from the newest checkpoint if any. Raises TrainingError on NaN, Interrupted on SIGTERM."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StageCallback(stage))
    newest = stage.checkpoints.latest()
    with warnings.catch_warnings():
        # bitsandbytes' int8 warns of its casts at every layer of every step; torch of pinned memory without a GPU.
        warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        if stage.ranks.size > 1:  # dropout of its own for each rank
            torch.manual_seed(stage.settings.seed * 1_000_003 + stage.ranks.rank)
        trainer.train(resume_from_checkpoint=str(newest[1]) if newest else None)
    stop_if_asked(stage)


def stop_if_asked(stage: Stage) -> None:
    """Raise Interrupted if the stage was asked to stop. Of use once `train` has saved its last checkpoint."""
    if stage.stopping:
        raise Interrupted("stopped after its newest checkpoint")


class StageCallback(TrainerCallback):
    """Hands a trainer's progress, losses and checkpoints to the stage, and the stage's wish to stop to the trainer."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def on_step_end(self, _args: Any, _state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop after this step, with a checkpoint, if the stage was asked to."""
        if self.stage.all_stopping():
            control.should_save = True
            control.should_training_stop = True

    def on_log(
        self, _args: Any, state: TrainerState, _control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Log one step. Raises TrainingError if its loss or gradient is not finite, before the step is saved."""
        logs = logs or {}
        if "loss" not in logs:  # the summary at the end
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(value := float(logs.get(name, 0.0))):
                raise TrainingError(self._not_finite(name, value, state.global_step))
        metrics = {name: float(value) for name, value in logs.items() if name != "epoch"}
        self.stage.log(state.global_step, **metrics)
        self.stage.progress.update(
            step=state.global_step, total=state.max_steps, phase="training", loss=metrics["loss"]
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, _control: Any, **_: Any) -> None:
        """Keep the checkpoint that the trainer has just written."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        self.stage.ranks.wait()  # each has put its generator's state there
        if self.stage.ranks.first:
            (folder / "README.md").unlink(missing_ok=True)  # TRL's model card
        self.stage.checkpoints.save(state.global_step, folder)
        if self.stage.ranks.first:
            shutil.rmtree(folder)

    def _not_finite(self, name: str, value: float, step: int) -> str:
        program = self.stage.config.program
        newest = self.stage.checkpoints.newest
        good = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
        return (
            f"{program}: {name} is {value} at step {step}; {good}. "
            f"Lower {program}.learningRate, or set quantization.computeDtype to bfloat16 or float32"
        )
