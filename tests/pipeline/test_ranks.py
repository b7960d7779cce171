"""Several ranks on a CPU: what they train is what one process trains, and how they end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from stage_runs import StageRuns
from tiny import TEXTS, build_tiny_model, build_tokenizer

from rlhf_api import names
from rlhf_api.names import ENV_RANKS, EXIT_INTERRUPTED, EXIT_OK, STAGE_CONFIG_FILE, STAGE_RESULT_FILE
from rlhf_api.run import PPO, SFT, Lora, Quantization, Reward
from rlhf_api.stage import ArtifactRef, RunIdentity, StageConfig, StageResult, StageSettings, StoreConfig, stage_digest
from rlhf_pipeline.ppo_trainer import mini_batches
from rlhf_pipeline.ranks import Ranks

torch.set_num_threads(1)
SECONDS = 240.0  # until a process of a busy machine must have got somewhere
LORA = Lora(rank=4, layers="top:1")
NONE = Quantization(type="none")


@dataclass(frozen=True)
class Bench:
    """A store with what the training stages read, and stages on it with any number of ranks."""

    runs: StageRuns
    inputs: dict[str, ArtifactRef]

    def sft(self) -> StageConfig:
        inputs = {"model": self.inputs["model"], "data": self.inputs["sft-data"]}
        sft = SFT(steps=3, batch_size=4, micro_batch_size=1, sequence_length=16, learning_rate=0.02)
        return self.runs.config("sft", inputs, sft=sft, lora=Lora(rank=4), quantization=NONE, seed=3)

    def reward(self) -> StageConfig:
        reward = Reward(
            steps=3, batch_size=4, micro_batch_size=1, sequence_length=24, learning_rate=0.02, min_accuracy=0.0
        )
        inputs = {"model": self.inputs["model"], "data": self.inputs["pairs"], "sft-data": self.inputs["sft-data"]}
        return self.runs.config("reward", inputs, reward=reward, lora=LORA, quantization=NONE, seed=1)

    def ppo(self, **changes: Any) -> StageConfig:
        settings: dict[str, Any] = {
            "episodes": 48,
            "batch_size": 8,
            "mini_batch_size": 4,
            "micro_batch_size": 2,
            "rollout_batch_size": 2,
            "epochs": 2,
            "prompt_tokens": 8,
            "response_tokens": 8,
            "learning_rate": 0.005,
            "checkpoint_steps": 1000,
            "whiten_rewards": True,
        }
        inputs = {"model": self.inputs["model"], "reward": self.inputs["reward"], "prompts": self.inputs["prompts"]}
        return self.runs.config(
            "ppo", inputs, ppo=PPO(**settings | changes), lora=LORA, quantization=NONE, seed=5
        )

    def start(self, config: StageConfig, ranks: int, work: Path) -> "subprocess.Popen[bytes]":
        work.mkdir(parents=True, exist_ok=True)
        (work / STAGE_CONFIG_FILE).write_text(config.model_dump_json(by_alias=True, exclude_none=True))
        files = ["--config", work / STAGE_CONFIG_FILE, "--work", work, "--result", work / STAGE_RESULT_FILE]
        environment = os.environ | {ENV_RANKS: str(ranks), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with (work / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "rlhf_pipeline", *map(str, files)], env=environment, stdout=log, stderr=log
            )

    def run(self, config: StageConfig, ranks: int, work: Path) -> Path:
        """Run a stage to its end; returns the files of its artifact."""
        process = self.start(config, ranks, work)
        assert process.wait(SECONDS) == EXIT_OK, (work / "log").read_text()
        manifest = self.runs.artifacts.find(config.output)
        assert manifest is not None
        return self.runs.fetch(manifest)

    def both(self, config: StageConfig, ranks: int = 2) -> tuple[Path, Path]:
        """What one process makes, and what `ranks` make of the same at another address."""
        other = config.model_copy(update={"output": config.output.model_copy(update={"digest": "0" * 64})})
        one = self.run(config, 1, self.runs.root / f"{config.program}-1")
        return one, self.run(other, ranks, self.runs.root / f"{config.program}-{ranks}")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    runs = StageRuns(tmp_path_factory.mktemp("ranks"))
    tokenizer = build_tokenizer(runs.root / "tokenizer")
    prompts = [" ".join(text.split()[:length]) for text in TEXTS for length in (1, 2, 3)]
    table = pa.table({"prompt": prompts, "input_ids": [tokenizer(text)["input_ids"][:8] for text in prompts]})
    texts = [f"{text}{end}" for end in ("", ", they say", ", we think so too") for text in TEXTS]
    pairs = {"prompt": [""] * 9, "chosen": texts[::2], "rejected": texts[1::2]}
    inputs = {
        "model": runs.put("merged-model", build_tiny_model(runs.root / "model", layers=2)),
        "prompts": runs.put_tables("prompt-data", table, table),
        "sft-data": runs.put_tables("sft-data", {"text": texts}, {"text": TEXTS}),
        "pairs": runs.put_tables("preference-data", pairs, pairs),
    }
    found = Bench(runs, inputs)
    inputs["reward"] = runs.run(found.reward()).ref
    return Bench(StageRuns(runs.root / "more"), inputs) if False else found


def assert_alike(one: Path, other: Path, files: list[str], *, tolerance: float = 1e-5) -> None:
    """The files' tensors, and the figures of every step that do not depend on the clock, are equal to rounding."""
    for file in files:
        ours, theirs = load_file(one / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(theirs[name], tensor, atol=tolerance, rtol=1e-4, msg=f"{file}: {name}")
    ours, theirs = steps_of(one), steps_of(other)
    assert len(ours) == len(theirs) > 0
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.keys() == its.keys()
        for name, value in mine.items():
            if "second" not in name and name != "time":
                assert its[name] == pytest.approx(value, abs=1e-4, rel=1e-3), name


def steps_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]


ADAPTER = "adapter/adapter_model.safetensors"


def test_two_ranks_fine_tune_what_one_does(bench: Bench) -> None:
    one, two = bench.both(bench.sft())
    assert_alike(one, two, [ADAPTER])
    reports = [json.loads((folder / "report.json").read_text()) for folder in (one, two)]
    assert reports[1]["held_out_loss_after"] == pytest.approx(reports[0]["held_out_loss_after"], abs=1e-5)
    assert reports[0]["held_out_loss_after"] < reports[0]["held_out_loss_before"] - 0.02
