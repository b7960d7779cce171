"""The ppo stage on a tiny model: its artifact, and its ends: killed, stopped, exploded, misled, early."""

import json
import random
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from stage_runs import StageRuns
from tiny import TEXTS, build_tiny_model, build_tokenizer
from transformers import AutoModelForCausalLM

from rlhf_api.errors import TrainingError, UserError
from rlhf_api.names import EXIT_INTERRUPTED, EXIT_OK, EXIT_USER, STAGE_RESULT_FILE
from rlhf_api.run import PPO, Lora, Quantization, Reward
from rlhf_api.stage import ArtifactRef, StageConfig, StageResult
from rlhf_store.artifacts import Manifest

torch.set_num_threads(1)
ROLLOUTS = 12
LORA = Lora(rank=4, layers="top:1")
SECONDS = 240.0  # until a process of a busy machine must have got somewhere
REWARDS = """
import math

def vowels(prompts, responses):
    assert len(prompts) == len(responses)
    return [float(sum(response.count(vowel) for vowel in "aeiou")) for response in responses]

def broken(prompts, responses):
    return [0.5] * (len(responses) - 1) + [math.nan]
"""


@dataclass(frozen=True)
class Bench:
    """A store with what ppo reads, and stages on it."""

    runs: StageRuns
    inputs: dict[str, ArtifactRef]

    def config(self, copy: int = 0, reward: ArtifactRef | None = None, **changes: Any) -> StageConfig:
        """The stage; `copy` gives equal work another address, so that nothing is found there."""
        settings: dict[str, Any] = {
            "episodes": 4 * ROLLOUTS,
            "batch_size": 4,
            "micro_batch_size": 2,
            "epochs": 2,
            "prompt_tokens": 8,
            "response_tokens": 8,
            "learning_rate": 0.02,
            "checkpoint_steps": 2,
            "sample_steps": 5,
        }
        config = self.runs.config(
            "ppo",
            self.inputs | ({"reward": reward} if reward else {}),
            ppo=PPO(**settings | changes),
            lora=LORA,
            quantization=Quantization(type="none"),
            seed=5,
        )
        digest = f"{copy:08x}{config.output.digest[8:]}"
        return config.model_copy(update={"output": ArtifactRef(kind="policy", digest=digest)}) if copy else config

    def finish(self, config: StageConfig, work: Path) -> StageResult:
        """Run the stage in a process of its own to its end; returns its result."""
        process = self.runs.start(config, work)
        code = process.wait(SECONDS)
        assert code == EXIT_OK, (work / "log").read_text()
        return StageResult.model_validate_json((work / STAGE_RESULT_FILE).read_bytes())

    def manifest(self, config: StageConfig) -> Manifest:
        """The manifest that the stage committed."""
        found = self.runs.artifacts.find(config.output)
        assert found is not None
        return found

    def steps(self, config: StageConfig) -> list[int]:
        """The steps of the artifact's metrics.jsonl."""
        return steps_in(self.runs.fetch(self.manifest(config)) / "logs" / "metrics.jsonl")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    runs = StageRuns(tmp_path_factory.mktemp("ppo"))
    model = runs.put("merged-model", build_tiny_model(runs.root / "model", layers=2))
    tokenizer = build_tokenizer(runs.root / "tokenizer")
    prompts = [" ".join(text.split()[:3]) for text in TEXTS]
    table = pa.table({"prompt": prompts, "input_ids": [tokenizer(text)["input_ids"][:8] for text in prompts]})
    pairs = {"prompt": [""] * 3, "chosen": TEXTS[::2], "rejected": TEXTS[1::2]}
    reward = runs.config(
        "reward",
        {
            "model": model,
            "data": runs.put_tables("preference-data", pairs, pairs),
            "sft-data": runs.put_tables("sft-data", {"text": TEXTS}, {"text": TEXTS}),
        },
        reward=Reward(steps=4, batch_size=2, sequence_length=24, learning_rate=0.02, min_accuracy=0.0),
        lora=LORA,
        quantization=Quantization(type="none"),
    )
    inputs = {"model": model, "reward": runs.run(reward).ref, "prompts": runs.put_tables("prompt-data", table, table)}
    return Bench(runs, inputs)


@pytest.fixture(scope="module")
def whole(bench: Bench) -> Manifest:
    """What an uninterrupted run in this process makes."""
    return bench.runs.run(bench.config())


def steps_in(metrics: Path) -> list[int]:
    """The steps of a metrics.jsonl, of which the last line may be half written."""
    if not metrics.exists():
        return []
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]


def wait_for_step(process: "subprocess.Popen[bytes]", work: Path, step: int) -> None:
    """Wait until a running stage has logged `step`."""
    deadline = time.monotonic() + SECONDS
    while max(steps_in(work / "output" / "logs" / "metrics.jsonl"), default=0) < step:
        assert process.poll() is None, f"ended before step {step}: {(work / 'log').read_text()}"
        assert time.monotonic() < deadline, f"step {step} not in time"
        time.sleep(0.005)


def test_artifact_holds_what_the_design_says(bench: Bench, whole: Manifest) -> None:
    assert {path for path in whole.files if not path.startswith("logs/tensorboard/")} == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "critic/adapter/adapter_config.json",
        "critic/adapter/adapter_model.safetensors",
        "critic/head.safetensors",
        "samples.jsonl",
        "report.json",
        "logs/metrics.jsonl",
    }
    assert [path for path in whole.files if path.startswith("logs/tensorboard/events.out")]
    assert bench.steps(bench.config()) == list(range(1, ROLLOUTS + 1))
    folder = bench.runs.fetch(whole)
    report = json.loads((folder / "report.json").read_text())
    assert (report["rollouts"], report["episodes"], report["shared_trunk_layers"]) == (ROLLOUTS, 4 * ROLLOUTS, 1)
    assert whole.metadata["metrics"]["kl"] == report["last"]["kl"]
    assert abs(report["last"]["kl"]) > 0.01  # it did train
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert sorted({row["rollout"] for row in samples}) == [1, 6, 11, 12]
    assert {row["prompt"] for row in samples} <= {" ".join(text.split()[:3]) for text in TEXTS}
    assert bench.runs.checkpoints(bench.config()) == []  # a committed artifact needs none


def test_peft_loads_the_policy(bench: Bench, whole: Manifest) -> None:
    folder = bench.runs.fetch(whole)
    base = AutoModelForCausalLM.from_pretrained(bench.runs.root / "model", dtype=torch.float32).eval()
    ids = build_tokenizer(bench.runs.root / "tokenizer")(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        tuned = PeftModel.from_pretrained(base, folder / "adapter").eval()
        after = tuned(input_ids=ids).logits
        with tuned.disable_adapter():
            torch.testing.assert_close(tuned(input_ids=ids).logits, before)
    assert (after - before).abs().max() > 1e-3
    loaded = {name for name, _ in tuned.named_parameters() if "lora_" in name}
    assert len(loaded) == len(load_file(folder / "adapter" / "adapter_model.safetensors")) == 8
    document = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert document["target_modules"] == sorted(document["target_modules"])
    assert document["base_model_name_or_path"] is None


def test_critic_is_trained_from_the_reward_model_which_stays_as_it_was(bench: Bench, whole: Manifest) -> None:
    assert bench.runs.artifacts.verify(bench.inputs["reward"]) == []
    policy = bench.runs.fetch(whole)
    reward = bench.runs.fetch(bench.runs.artifacts.need(bench.inputs["reward"]))
    start = load_file(reward / "adapter" / "adapter_model.safetensors")
    end = load_file(policy / "critic" / "adapter" / "adapter_model.safetensors")
    assert start.keys() == end.keys()
    assert any((start[name] - end[name]).abs().max() > 1e-3 for name in start)
    head = load_file(policy / "critic" / "head.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in head.items()} == {"weight": (1, 32), "bias": (1,)}


@pytest.mark.slow
def test_a_killed_stage_resumes_to_the_same_content(bench: Bench, whole: Manifest) -> None:
    seed = random.randrange(10**6)
    moment = random.Random(seed)
    config, work = bench.config(copy=1), bench.runs.root / "killed"
    process = bench.runs.start(config, work)
    try:
        step = moment.randint(3, ROLLOUTS - 2)
        wait_for_step(process, work, step)
        pause = moment.uniform(0, 0.2)
        time.sleep(pause)  # the moment within the rollout; nothing is waited for
    finally:
        process.kill()
        process.wait()
    print(f"seed {seed}: killed {pause:.3f} s after rollout {step}")
    assert bench.runs.artifacts.find(config.output) is None
    assert bench.runs.checkpoints(config)
    bench.finish(config, work)
    assert bench.manifest(config).content == whole.content
    assert bench.steps(config) == list(range(1, ROLLOUTS + 1))


@pytest.mark.slow
def test_a_stopped_stage_saves_a_checkpoint_and_resumes_to_the_same_content(bench: Bench, whole: Manifest) -> None:
    config, work = bench.config(copy=2, checkpoint_steps=1000), bench.runs.root / "stopped"
    process = bench.runs.start(config, work)
    wait_for_step(process, work, 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == EXIT_INTERRUPTED, (work / "log").read_text()
    failure = StageResult.model_validate_json((work / STAGE_RESULT_FILE).read_bytes()).failure
    assert failure is not None
    (saved,) = bench.runs.checkpoints(config)  # by the signal alone: checkpointSteps is out of reach
    assert failure.checkpoint is not None
    assert Path(failure.checkpoint.removeprefix("file://")) == saved.parent
    assert "run again to continue" in failure.message
    assert bench.runs.run(config).content == whole.content
    assert bench.steps(config) == list(range(1, ROLLOUTS + 1))


@pytest.mark.slow
def test_an_exploding_kl_ends_the_stage_and_names_the_last_good_checkpoint(bench: Bench) -> None:
    config, work = bench.config(abort_kl=1e-6, checkpoint_steps=1), bench.runs.root / "exploded"
    assert bench.runs.start(config, work).wait(SECONDS) == EXIT_USER, (work / "log").read_text()
    failure = StageResult.model_validate_json((work / STAGE_RESULT_FILE).read_bytes()).failure
    assert failure is not None
    assert failure.failure == "user"
    assert "above ppo.abortKl 1e-06; lower ppo.learningRate or raise ppo.klCoefficient" in failure.message
    assert "last good checkpoint: rollout 1" in failure.message
    kl = float(failure.message.split("KL to the reference is ")[1].split(" ")[0])
    assert abs(kl) > 1e-6  # the figure itself is legible
    assert failure.checkpoint is not None
    (saved,) = bench.runs.checkpoints(config)
    assert Path(failure.checkpoint.removeprefix("file://")) == saved.parent
    assert bench.runs.artifacts.find(config.output) is None


def test_a_kl_that_explodes_before_any_checkpoint_says_so(bench: Bench) -> None:
    with pytest.raises(TrainingError, match=r"in rollout 2, above ppo.abortKl 1e-06.*; last good checkpoint: none$"):
        bench.runs.run(bench.config(abort_kl=1e-6, checkpoint_steps=1000))


def test_max_kl_ends_early_and_keeps_the_policy(bench: Bench) -> None:
    config = bench.config(max_kl=1e-6)
    manifest = bench.runs.run(config)
    folder = bench.runs.fetch(manifest)
    lines = (folder / "logs" / "metrics.jsonl").read_text().splitlines()
    *before, last = [json.loads(line)["kl"] > 1e-6 for line in lines]
    assert last
    assert before
    assert not any(before)
    assert len(lines) < ROLLOUTS
    assert json.loads((folder / "report.json").read_text())["rollouts"] == len(lines)
    assert load_file(folder / "adapter" / "adapter_model.safetensors")
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {row["rollout"] for row in samples} >= {1, len(lines)}  # the last one is what the policy became


def function_reward(bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str) -> ArtifactRef:
    """The reward-model artifact that the reward stage makes of a function."""
    folder = bench.runs.root / "rewards"
    folder.mkdir(exist_ok=True)
    (folder / "tiny_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(folder)
    texts = bench.runs.put_tables("sft-data", {"text": TEXTS}, {"text": TEXTS})
    config = bench.runs.config(
        "reward",
        {"model": bench.inputs["model"], "sft-data": texts},
        reward=Reward(function=f"tiny_rewards:{name}"),
        lora=LORA,
        quantization=Quantization(type="none"),
    )
    return bench.runs.run(config).ref


def test_a_function_as_the_reward(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = function_reward(bench, monkeypatch, "vowels")
    folder = bench.runs.fetch(bench.runs.run(bench.config(reward=reward, episodes=8, missing_eos_penalty=None)))
    report = json.loads((folder / "report.json").read_text())
    assert report["reward_kind"] == "function"
    first = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()][:4]
    counts = [float(sum(row["response"].count(vowel) for vowel in "aeiou")) for row in first]
    mean = sum(counts) / 4
    spread = (sum((count - mean) ** 2 for count in counts) / 3) ** 0.5
    assert spread > 0
    assert (report["score_mean"], report["score_std"]) == pytest.approx((mean, spread))
    assert [row["score"] for row in first] == pytest.approx([(count - mean) / spread for count in counts], abs=1e-5)


def test_a_reward_function_that_gives_no_number_is_named_with_its_sample(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = bench.runs.root / "broken"
    reward.mkdir()
    (reward / "reward.json").write_text(
        '{"function": "tiny_rewards:broken", "mean": 0.0, "std": 1.0, "type": "function"}'
    )
    function_reward(bench, monkeypatch, "vowels")  # puts the module on the path
    config = bench.config(reward=bench.runs.put("reward-model", reward))
    with pytest.raises(UserError, match=r"reward\.function: tiny_rewards:broken returned nan for sample 3, "):
        bench.runs.run(config)
    assert bench.runs.artifacts.find(config.output) is None
