"""Several ranks on a CPU: what they train is what one process trains, and how they end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
from rlhf_api.run import GPU, PPO, SFT, Lora, Quantization, Reward
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
    started: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def sft(self, steps: int = 3, rate: float = 0.02) -> StageConfig:
        inputs = {"model": self.inputs["model"], "data": self.inputs["sft-data"]}
        sft = SFT(steps=steps, batch_size=4, micro_batch_size=1, sequence_length=16, learning_rate=rate)
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
        return self.runs.config("ppo", inputs, ppo=PPO(**settings | changes), lora=LORA, quantization=NONE, seed=5)

    def start(self, config: StageConfig, ranks: int, work: Path) -> "subprocess.Popen[bytes]":
        work.mkdir(parents=True, exist_ok=True)
        (work / STAGE_CONFIG_FILE).write_text(config.model_dump_json(by_alias=True, exclude_none=True))
        files = ["--config", work / STAGE_CONFIG_FILE, "--work", work, "--result", work / STAGE_RESULT_FILE]
        environment = os.environ | {ENV_RANKS: str(ranks), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with (work / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "rlhf_pipeline", *map(str, files)], env=environment, stdout=log, stderr=log
            )
        self.started.append(process)
        return process

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
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
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
    yield found
    for process in found.started:
        process.kill()
        process.wait()


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
            # TRL's extremes are of what passes at a time, on all ranks together.
            if "second" not in name and name not in ("time", "min_reward", "max_reward"):
                assert its[name] == pytest.approx(value, abs=10 * tolerance, rel=100 * tolerance), name


def steps_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]


ADAPTER = "adapter/adapter_model.safetensors"


@pytest.mark.slow
def test_two_ranks_fine_tune_what_one_does(bench: Bench) -> None:
    one, two = bench.both(bench.sft())
    assert_alike(one, two, [ADAPTER])
    reports = [json.loads((folder / "report.json").read_text()) for folder in (one, two)]
    assert reports[1]["held_out_loss_after"] == pytest.approx(reports[0]["held_out_loss_after"], abs=1e-5)
    assert reports[0]["held_out_loss_after"] < reports[0]["held_out_loss_before"] - 0.02


@pytest.mark.slow
def test_ranks_stopped_in_fine_tuning_go_on_to_the_same_adapter(bench: Bench) -> None:
    config = bench.sft(steps=60, rate=0.001)  # small: rounding must not grow from step to step
    one = bench.run(config, 1, bench.runs.root / "sft-60")
    config, work = elsewhere(config, "b"), bench.runs.root / "sft-stopped"
    process = bench.start(config, 2, work)
    wait_until(lambda: (work / "output" / "logs" / "metrics.jsonl").exists(), process, work)
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == EXIT_INTERRUPTED, (work / "log").read_text()
    (saved,) = bench.runs.checkpoints(config)
    assert {file.name for file in saved.parent.rglob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert_alike(one, bench.run(config, 2, work), [ADAPTER], tolerance=1e-4)


@pytest.mark.slow
def test_two_ranks_train_the_reward_that_one_does(bench: Bench) -> None:
    one, two = bench.both(bench.reward())
    assert_alike(one, two, [ADAPTER, "head.safetensors"])
    assert json.loads((two / "report.json").read_text())["held_out_scores"] != {}


@pytest.fixture(scope="module")
def alone(bench: Bench) -> Path:
    """What PPO makes in one process."""
    return bench.run(bench.ppo(), 1, bench.runs.root / "alone")


def elsewhere(config: StageConfig, digit: str) -> StageConfig:
    """The same work at another address, so that nothing is found there."""
    return config.model_copy(update={"output": config.output.model_copy(update={"digest": digit * 64})})


POLICY = [ADAPTER, "critic/adapter/adapter_model.safetensors", "critic/head.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_align_the_policy_that_one_does(bench: Bench, alone: Path, ranks: int) -> None:
    other = bench.run(elsewhere(bench.ppo(), str(ranks)), ranks, bench.runs.root / f"ppo-{ranks}")
    assert_alike(alone, other, POLICY)
    assert (alone / "samples.jsonl").read_text().count("\n") == (other / "samples.jsonl").read_text().count("\n")
    assert abs(steps_of(alone)[-1]["kl"]) > 0.01  # it did train


@pytest.mark.slow
def test_a_function_scores_each_rank_its_rows(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vowels.py").write_text(
        "def score(prompts, responses):\n    return [float(sum(r.count(v) for v in 'aeiou')) for r in responses]\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    card = tmp_path / "reward"
    card.mkdir()
    (card / "reward.json").write_text('{"function": "vowels:score", "mean": 0.0, "std": 1.0, "type": "function"}')
    plain = bench.ppo(episodes=16)
    inputs = plain.inputs | {"reward": bench.runs.put("reward-model", card)}
    one, two = (
        bench.run(elsewhere(plain.model_copy(update={"inputs": inputs}), digit), ranks, tmp_path / digit)
        for digit, ranks in (("c", 1), ("d", 2))
    )
    assert_alike(one, two, POLICY)
    assert steps_of(one)[0]["score_raw"] > 0


@pytest.mark.slow
def test_stopped_ranks_save_a_checkpoint_and_go_on_to_the_same_policy(bench: Bench, alone: Path) -> None:
    config, work = elsewhere(bench.ppo(), "a"), bench.runs.root / "stopped"
    process = bench.start(config, 2, work)
    wait_until(lambda: (work / "output" / "logs" / "metrics.jsonl").exists(), process, work)
    ranks = children_of(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == EXIT_INTERRUPTED, (work / "log").read_text()
    failure = StageResult.model_validate_json((work / STAGE_RESULT_FILE).read_bytes()).failure
    assert failure is not None
    assert failure.message == "asked to stop; run again to continue"
    (saved,) = bench.runs.checkpoints(config)  # by the signal alone: checkpointSteps is out of reach
    assert failure.checkpoint is not None
    assert Path(failure.checkpoint.removeprefix("file://")) == saved.parent
    assert len(ranks) == 2
    assert not any(map(lives, ranks))
    other = bench.run(config, 2, work)
    assert_alike(alone, other, POLICY)
    assert [step["step"] for step in steps_of(other)] == list(range(1, 7))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("program", ["sft", "reward", "ppo"])
def test_two_gpus_train_what_one_does(bench: Bench, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = {"sft": bench.sft, "reward": bench.reward, "ppo": bench.ppo}
    plain = configs[program]()
    settings = plain.settings.model_copy(update={"quantization": Quantization(type="none", compute_dtype="float32")})
    found = []
    for gpus in (1, 2):
        config = elsewhere(plain, str(gpus)).model_copy(update={"settings": settings, "gpu": GPU(count=gpus)})
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1"[: 2 * gpus - 1])
        found.append(bench.run(config, 1, bench.runs.root / f"{program}-gpus-{gpus}"))
    assert_alike(*found, [ADAPTER], tolerance=1e-3)


# ---- how ranks end --------------------------------------------------------------------------------------------------

LAUNCH = """
import os, sys
folder = sys.argv.pop(1)
sys.path.insert(0, folder)
from rlhf_pipeline import __main__ as process
process.PROGRAMS["sft"] = "toy:run"
code = process.main(command=[sys.executable, "-c", open(folder + "/launch.py").read(), folder])
sys.stdout.flush()
os._exit(code)  # as the stage process does: gloo's threads abort a Python that is taken apart
"""
LOCKSTEP = """
import os, time
from rlhf_api.errors import TrainingError, UserError
from rlhf_pipeline.stage_process import Interrupted

def run(stage):
    (stage.work / f"pid-{stage.ranks.rank}").write_text(str(os.getpid()))
    for step in range(1, 100000):
        if stage.all_stopping():
            stage.checkpoints.save(step, stage.output)
            raise Interrupted
        stage.progress.update(step=step, phase=f"step {step}")
        if step == 3:
            third(stage)
        time.sleep(0.01)

def third(stage):
"""


class Toy:
    """A stage of a toy program whose ranks meet at every step."""

    def __init__(self, folder: Path, third: str) -> None:
        self.folder, self.work, self.log = folder, folder / "work", folder / "log"
        (folder / "toy.py").write_text(LOCKSTEP + f"    {third}\n")
        (folder / "launch.py").write_text(LAUNCH)
        output = ArtifactRef(kind="sft-adapter", digest=stage_digest("sft", StageSettings(seed=1), {}))
        config = StageConfig(
            run=RunIdentity(name="toy"), stage="sft", program="sft", settings=StageSettings(seed=1), output=output,
            store=StoreConfig(url=f"file://{folder}/store"), gpu=GPU(count=0),
        )  # fmt: skip
        (folder / STAGE_CONFIG_FILE).write_text(config.model_dump_json(by_alias=True))
        files = ["--config", STAGE_CONFIG_FILE, "--work", "work", "--result", STAGE_RESULT_FILE]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, str(folder), *files],
                cwd=folder, env=os.environ | {ENV_RANKS: "2", "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log,
            )  # fmt: skip

    def ranks(self) -> list[int]:
        """The process ids of the ranks, once they have begun."""
        files = [self.work / f"pid-{rank}" for rank in range(2)]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files), self.process, self.folder)
        return [int(file.read_text()) for file in files]

    def end(self) -> tuple[int, str, str]:
        """Exit code, the failure's class and message, and the log. No rank is left."""
        self.process.wait(SECONDS)
        failure = StageResult.model_validate_json((self.folder / STAGE_RESULT_FILE).read_bytes()).failure
        assert failure is not None
        assert not any(lives(int(file.read_text())) for file in self.work.glob("pid-*"))
        return self.process.returncode, f"{failure.failure}: {failure.message}", self.log.read_text()


Make = Callable[[str], Toy]
"""A running stage whose ranks do this in their third step."""


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Make]:
    made: list[Toy] = []

    def make(third: str) -> Toy:
        made.append(Toy(tmp_path, third))
        return made[0]

    yield make
    for stage in made:
        stage.process.kill()
        stage.process.wait()


@pytest.mark.parametrize(
    ("third", "code", "message"),
    [
        ("if stage.ranks.rank == 1: raise UserError('data.sft: a bad row')", 2, "user: rank 1: data.sft: a bad row"),
        ("if stage.ranks.rank == 0: raise UserError('data.sft: a bad row')", 2, "user: data.sft: a bad row"),
        ("raise TrainingError('loss is nan')", 2, "user: loss is nan"),
        ("if stage.ranks.rank == 1: raise ValueError('boom')", 1, "bug: rank 1: ValueError: boom"),
        (
            "if stage.ranks.rank == 1: import torch; raise torch.OutOfMemoryError('CUDA: 2 GiB')",
            5,
            "outOfMemory: rank 1: out of memory: CUDA: 2 GiB",
        ),
        ("if stage.ranks.rank == 1: os._exit(7)", 1, "bug: rank 1 exited with code 7 and left no result"),
    ],
    ids=["user", "user in the first", "all alike", "bug", "memory", "exit"],
)
def test_a_rank_that_fails_ends_all_with_its_cause(toy: Make, third: str, code: int, message: str) -> None:
    got, failure, errors = toy(third).end()
    assert (got, failure) == (code, message), errors
    assert errors.count("Traceback") == (1 if "boom" in message else 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_all_and_is_named(toy: Make, rank: int) -> None:
    stage = toy("pass")
    os.kill(stage.ranks()[rank], signal.SIGKILL)
    code, failure, errors = stage.end()
    assert code == names.EXIT_INFRASTRUCTURE, errors
    assert (
        failure == f"infrastructure: rank {rank} was killed (SIGKILL) by someone other than the kernel's memory killer"
    )


def test_a_rank_that_hangs_is_ended_with_the_one_that_failed(toy: Make) -> None:
    third = "stage.ranks.rank or time.sleep(1000); raise UserError('data.sft: a bad row')"
    code, failure, _ = toy(third).end()
    assert (code, failure) == (2, "user: rank 1: data.sft: a bad row")


def test_no_rank_survives_its_parent(toy: Make) -> None:
    stage = toy("time.sleep(1000)")
    ranks = stage.ranks()
    stage.process.kill()
    stage.process.wait()
    wait_until(lambda: not any(map(lives, ranks)), None, None)


def test_a_stop_that_reaches_one_rank_stops_all_at_one_step(toy: Make) -> None:
    stage = toy("pass")
    os.kill(stage.ranks()[1], signal.SIGTERM)
    code, failure, errors = stage.end()
    assert code == EXIT_INTERRUPTED, errors
    assert "asked to stop" in failure


def test_a_stop_waits_for_the_rank_that_saves(toy: Make) -> None:
    third = "os.kill(os.getpid(), 15); stage.all_stopping(); stage.ranks.rank or time.sleep(4); raise Interrupted"
    code, failure, errors = toy(third).end()
    assert (code, failure) == (EXIT_INTERRUPTED, "infrastructure: asked to stop; run again to continue"), errors


@pytest.mark.parametrize("pause", [0.0, 0.3, 1.5])
def test_a_stop_before_the_ranks_have_met_is_a_stop(toy: Make, pause: float) -> None:
    stage = toy("pass")
    wait_until(lambda: len(children_of(stage.process.pid)) == 2, stage.process, stage.folder)
    time.sleep(pause)  # somewhere in their start; nothing is waited for
    stage.process.send_signal(signal.SIGTERM)
    code, failure, errors = stage.end()
    assert code == EXIT_INTERRUPTED, errors
    assert failure.endswith("run again to continue")


# ---- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "size"), [(64, 16), (64, 64), (8, 1), (24, 12), (6, 3), (40, 20)])
def test_mini_batches_hold_every_row_once_and_equally_many_of_each_rank(rows: int, size: int) -> None:
    found = mini_batches(rows, size, torch.Generator().manual_seed(1))
    assert found.shape == (rows // size, size)
    assert sorted(found.flatten().tolist()) == list(range(rows))
    for ranks in (count for count in range(1, 9) if size % count == 0):
        shares = [Ranks(rank, ranks).share(rows) for rank in range(ranks)]
        for mini in found:
            owners = [next(r for r, share in enumerate(shares) if row in range(rows)[share]) for row in mini.tolist()]
            assert owners == sorted(owners)
            assert {owners.count(rank) for rank in range(ranks)} == {size // ranks}
    if size < rows:
        assert not torch.equal(found, mini_batches(rows, size, torch.Generator().manual_seed(2)))


def wait_until(done: Callable[[], bool], process: "subprocess.Popen[bytes] | None", work: Path | None) -> None:
    deadline = time.monotonic() + SECONDS
    while not done():
        if process is not None:
            assert process.poll() is None, (work / "log").read_text() if work else "ended too soon"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
