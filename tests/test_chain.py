"""The whole chain on a tiny model, driven by the command `rlhf`: run once, run again, and with every stage killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import build_tiny_model

from rlhf_api.names import PROGRESS_FILE
from rlhf_api.stage import StoreConfig
from rlhf_operator.local import Home
from rlhf_store.artifacts import Manifest, open_artifacts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

RLHF = Path(sys.executable).with_name("rlhf")
NAME = "tiny"
STAGES = (
    "import-model", "import-sft", "import-preferences", "import-prompts", "import-evaluation",
    "sft", "merge", "reward", "ppo", "evaluate",
)  # fmt: skip
KINDS = {
    "model", "sft-data", "preference-data", "prompt-data", "evaluation-data",
    "sft-adapter", "merged-model", "reward-model", "policy", "evaluation",
}  # fmt: skip
CHAIN_SECONDS = 900.0  # a calm machine needs a tenth
TRAINED = ("sft", "reward", "ppo")
STEPS = 8  # of each trained stage

GOOD = ("warm", "funny", "moving", "sharp", "tender")
BAD = ("dull", "flat", "boring", "awful", "lifeless")
THINGS = ("film", "story", "cast", "script", "picture", "plot", "movie", "scene", "ending", "dialogue")
TURNS = ("and nothing else", "as they say")


def spec(data: Path) -> dict[str, Any]:
    """A chain of few and short steps."""
    source = {"source": (data / "reviews.csv").as_uri(), "heldOut": 0.2}
    steps = {"batchSize": 4, "microBatchSize": 2, "sequenceLength": 24, "learningRate": 0.01}
    return {
        "model": {"source": (data / "model").as_uri()},
        "data": {
            "sft": source | {"rows": "0%:40%"},
            "preferences": source | {"rows": "40%:70%", "textColumn": "text", "labelColumn": "label", "chosenLabel": 1},
            "prompts": source | {"rows": "0%:40%", "promptColumn": "text", "overflow": "truncate"},
            "evaluation": source | {"rows": "70%:100%"},
        },
        "quantization": {"type": "none"},
        "lora": {"rank": 4, "layers": "top:1"},
        "sft": steps | {"steps": STEPS, "checkpointSteps": 2},
        "reward": steps | {"steps": STEPS, "checkpointSteps": 2, "minAccuracy": 0},
        "ppo": {
            "episodes": 4 * STEPS,
            "batchSize": 4,
            "microBatchSize": 2,
            "epochs": 2,
            "promptTokens": 6,
            "responseTokens": 8,
            "learningRate": 0.01,
            "checkpointSteps": 2,
        },
        "evaluate": {"samples": 8, "batchSize": 4, "scorers": [{"name": "bag-of-words", "fitted": True}]},
        "gpu": {"count": 0},
        "seed": 7,
    }


@dataclass
class Folder:
    """A working folder with a run's file and its .rlhf."""

    path: Path
    data: Path
    options: tuple[str, ...] = ()
    """Of `rlhf run`."""
    seconds: float = 0.0
    phases: dict[str, dict[str, float]] = field(default_factory=dict)
    """Stage -> phase that its first process was seen in -> seconds it stayed there."""

    def write(self, file: str = "run.yaml", **sections: dict[str, Any]) -> str:
        """Write the run's file, with some fields of some sections changed."""
        document = spec(self.data)
        for name, changes in sections.items():
            document[name] = document[name] | changes
        resource = {"apiVersion": "rlhf.dev/v1alpha1", "kind": "RLHFRun", "metadata": {"name": NAME}, "spec": document}
        (self.path / file).write_text(yaml.safe_dump(resource))
        return file

    def rlhf(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run the command in this folder to its end."""
        return subprocess.run(
            [RLHF, *arguments], cwd=self.path, text=True, capture_output=True, timeout=CHAIN_SECONDS, check=False
        )

    def drive(self, seen: Callable[[str, int], None]) -> None:
        """`rlhf run` to its end; calls `seen(stage, pid)` for the first process of each stage again and again."""
        began = last = time.monotonic()
        with (self.path / "log").open("w") as log:
            process = subprocess.Popen(
                [RLHF, "run", self.write(), *self.options], cwd=self.path, stdout=log, stderr=log
            )
        try:
            while process.poll() is None:
                now = time.monotonic()
                assert now - began < CHAIN_SECONDS, self.words()
                for stage in STAGES:
                    if pid := self._first_process(stage):
                        phases, phase = self.phases.setdefault(stage, {}), self._phase(stage)
                        phases[phase] = phases.get(phase, 0.0) + now - last
                        seen(stage, pid)
                last = now
                time.sleep(0.01)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        self.seconds = time.monotonic() - began
        assert process.returncode == 0, self.words()

    def steps(self, stage: str) -> int:
        """Steps that a running stage has logged."""
        try:
            return (self._run / stage / "work" / "output" / "logs" / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def attempts(self) -> dict[str, int]:
        """Stage -> the number of processes it ever had."""
        folder = Home(self.path / ".rlhf").run_folder(NAME)
        return {stage: len(folder.attempts(stage)) for stage in STAGES}

    def manifests(self) -> dict[str, Manifest]:
        """Kind -> manifest of the run's artifact."""
        store = open_artifacts(Home(self.path / ".rlhf").run_folder(NAME).store())
        found = list(store.list())
        assert len(found) == len(KINDS)
        return {manifest.kind: manifest for manifest in found}

    def words(self) -> str:
        """What the run and its stages printed last."""
        logs = [self.path / "log", *sorted((self.path / ".rlhf" / "runs" / NAME).glob("*/*/stage.log"))]
        return "\n".join(f"{log}:\n{log.read_text(errors='replace')[-1500:]}" for log in logs)

    @property
    def _run(self) -> Path:
        return self.path / ".rlhf" / "runs" / NAME

    def _first_process(self, stage: str) -> int | None:
        try:
            if json.loads((self._run / stage / "1" / "attempt.json").read_text()).get("finished") is not None:
                return None
            return int((self._run / stage / "1" / "process.lock").read_text())
        except (OSError, ValueError):  # not begun
            return None

    def _phase(self, stage: str) -> str:
        try:
            return str(json.loads((self._run / stage / "work" / PROGRESS_FILE).read_text()).get("phase", ""))
        except (OSError, ValueError):
            return ""


@dataclass
class Killer:
    """Kills the first process of every stage once: a trained one after a random step, others in a random phase."""

    folder: Folder
    moments: random.Random
    calm: dict[str, dict[str, float]]  # Folder.phases of a run that nothing disturbed
    plans: dict[str, tuple[str, float]] = field(default_factory=dict)  # stage -> phase, seconds into it
    killed: dict[str, str] = field(default_factory=dict)  # stage -> where

    def __post_init__(self) -> None:
        for stage, phases in self.calm.items():
            phase = self.moments.choice(list(phases)[:-1])  # the last one may be over before it is seen
            self.plans[stage] = phase, self.moments.uniform(0, 0.9 * phases[phase])
        self.after = {stage: self.moments.randint(1, STEPS - 1) for stage in TRAINED}

    def __call__(self, stage: str, pid: int) -> None:
        """Kill the process if its moment has come."""
        if stage in self.killed or not self._due(stage):
            return
        where = f"{list(self.folder.phases[stage].items())[-1]}, step {self.folder.steps(stage)}"
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.killed[stage] = where

    def _due(self, stage: str) -> bool:
        if stage in TRAINED:
            return self.folder.steps(stage) >= self.after[stage]
        phase, seconds = self.plans[stage]
        order, seen = list(self.calm[stage]), self.folder.phases[stage]
        gone_by = any(order.index(other) > order.index(phase) for other in seen if other in order)
        return gone_by or seen.get(phase, 0.0) >= seconds


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and 200 short labelled texts."""
    folder = tmp_path_factory.mktemp("data")
    build_tiny_model(folder / "model", layers=2)
    rows = [
        f"the {thing} is {word} {turn},{label}"
        for label, words in ((1, GOOD), (0, BAD))
        for word in words
        for thing in THINGS
        for turn in TURNS
    ]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Folder:
    """A chain that nothing disturbed."""
    folder = Folder(tmp_path_factory.mktemp("finished"), data)
    folder.drive(lambda *_: None)
    print(f"chain: {folder.seconds:.0f} s; seconds in each phase: {folder.phases}")
    return folder


def test_the_chain_makes_every_artifact_and_a_report(finished: Folder) -> None:
    assert finished.attempts() == dict.fromkeys(STAGES, 1)
    manifests = finished.manifests()
    assert set(manifests) == KINDS
    report = (finished.path / ".rlhf" / "runs" / NAME / "report.html").read_text()
    assert NAME in report
    assert "bag-of-words" in report
    figures = manifests["evaluation"].metadata["metrics"]
    assert figures["samples"] == 8
    assert figures["kl"] != 0  # the policy is not the reference


def test_a_second_run_reuses_everything(finished: Folder) -> None:
    before, began = finished.attempts(), time.monotonic()
    done = finished.rlhf("run", finished.write(), "--json")
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    assert {stage["state"] for stage in json.loads(done.stdout)["stages"]} <= {"Reused", "Succeeded"}
    assert finished.attempts() == before
    assert seconds < 15, f"{seconds:.1f} s"


def test_a_change_of_ppo_reuses_what_comes_before_it(finished: Folder) -> None:
    def actions(**sections: dict[str, Any]) -> dict[str, str]:
        done = finished.rlhf("plan", finished.write("changed.yaml", **sections), "--json")
        assert done.returncode == 0, done.stderr
        return {row["stage"]: row["action"] for row in json.loads(done.stdout)["stages"]}

    reuse = dict.fromkeys(STAGES, "reuse")
    assert actions() == reuse
    assert actions(ppo={"klCoefficient": 0.1}) == reuse | {"ppo": "run", "evaluate": "run"}
    assert actions(evaluate={"samples": 4}) == reuse | {"evaluate": "run"}


def test_generate_samples_with_and_without_the_adapter(finished: Folder) -> None:
    arguments = ["generate", NAME, "--prompt", "the film is", "--prompt", "the plot is", "--tokens", "6", "--json"]
    done = finished.rlhf(*arguments)
    assert done.returncode == 0, done.stderr
    assert "the plot is" in done.stdout
    json.loads(done.stdout)


def test_killed_at_random_moments_every_stage_ends_with_the_same_content(
    finished: Folder, data: Path, tmp_path: Path
) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    folder = Folder(tmp_path, data)
    killer = Killer(folder, random.Random(seed), finished.phases)
    folder.drive(killer)
    attempts = folder.attempts()
    print(f"{folder.seconds:.0f} s; killed in (phase, seconds): {killer.killed}; processes: {attempts}")
    assert set(killer.killed) == set(STAGES)
    # A process killed between its commit and its end is not run again.
    assert set(attempts.values()) <= {1, 2}
    assert {stage: attempts[stage] for stage in TRAINED} == dict.fromkeys(TRAINED, 2)
    expected, found = finished.manifests(), folder.manifests()
    assert {kind: m.digest for kind, m in found.items()} == {kind: m.digest for kind, m in expected.items()}
    assert {kind: m.content for kind, m in found.items()} == {kind: m.content for kind, m in expected.items()}


@pytest.mark.s3
def test_over_s3_the_content_is_the_same_and_a_second_run_reuses_it(
    finished: Folder, data: Path, s3_store: StoreConfig, tmp_path: Path
) -> None:
    assert s3_store.endpoint
    folder = Folder(tmp_path, data, ("--store", s3_store.url, "--endpoint", s3_store.endpoint))
    folder.drive(lambda *_: None)
    expected, found = finished.manifests(), folder.manifests()
    assert {kind: m.digest for kind, m in found.items()} == {kind: m.digest for kind, m in expected.items()}
    assert {kind: m.content for kind, m in found.items()} == {kind: m.content for kind, m in expected.items()}
    elsewhere = Folder(tmp_path / "elsewhere", data)  # a machine that has nothing but the store
    elsewhere.path.mkdir()
    done = elsewhere.rlhf("run", elsewhere.write(), *folder.options, "--json")
    assert done.returncode == 0, done.stderr
    assert {stage["state"] for stage in json.loads(done.stdout)["stages"]} == {"Reused"}
    report = (elsewhere.path / ".rlhf" / "runs" / NAME / "report.html").read_text()
    assert "bag-of-words" in report


def test_verify_names_a_file_with_one_byte_flipped(finished: Folder) -> None:
    done = finished.rlhf("artifacts", "verify")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(": whole") == len(KINDS)
    (weights,) = (finished.path / ".rlhf" / "store").glob("artifacts/policy/*/*/adapter/adapter_model.safetensors")
    whole = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        done = finished.rlhf("artifacts", "verify")
    finally:
        weights.write_bytes(whole)
    assert done.returncode == 2
    (line,) = [line for line in done.stdout.splitlines() if not line.endswith(": whole")]
    assert line.startswith(f"policy/{finished.manifests()['policy'].digest[:12]}: ")
    assert "adapter/adapter_model.safetensors" in line
