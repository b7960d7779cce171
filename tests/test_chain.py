"""The whole chain on a tiny model, driven by the command `rlhf`: run once, run again, and with every stage killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import build_tiny_model

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
TICKS = os.sysconf("SC_CLK_TCK")

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
        "sft": steps | {"steps": 8, "checkpointSteps": 2},
        "reward": steps | {"steps": 8, "checkpointSteps": 2, "minAccuracy": 0},
        "ppo": {
            "episodes": 32,
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
    seconds: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)
    """Stage -> CPU seconds that its process had used when last seen."""

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

    def drive(self, seen: Callable[[str, int, float], None]) -> None:
        """`rlhf run`; calls `seen(stage, pid, CPU seconds)` for each process of a first attempt again and again."""
        began = time.monotonic()
        with (self.path / "log").open("w") as log:
            process = subprocess.Popen([RLHF, "run", self.write()], cwd=self.path, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                assert time.monotonic() - began < CHAIN_SECONDS, self.words()
                for stage in STAGES:
                    if (pid := self._first_process(stage)) and (used := cpu_seconds(pid)) is not None:
                        self.cpu[stage] = used
                        seen(stage, pid, used)
                time.sleep(0.01)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        self.seconds = time.monotonic() - began
        assert process.returncode == 0, self.words()

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

    def _first_process(self, stage: str) -> int | None:
        attempt = self.path / ".rlhf" / "runs" / NAME / stage / "1"
        try:
            if json.loads((attempt / "attempt.json").read_text()).get("finished") is not None:
                return None
            return int((attempt / "process.lock").read_text())
        except (OSError, ValueError):  # not begun
            return None


def cpu_seconds(pid: int) -> float | None:
    """CPU seconds a process has used; None once it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else (int(fields[11]) + int(fields[12])) / TICKS


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
    print(f"chain: {folder.seconds:.0f} s; CPU seconds of its stages: {folder.cpu}")
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
    assert set(finished.cpu) == set(STAGES)


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
    moments = random.Random(seed)
    share = {stage: moments.uniform(0.02, 0.95) for stage in STAGES}
    killed: dict[str, float] = {}
    print(f"seed {seed}")

    def kill(stage: str, pid: int, used: float) -> None:
        if stage not in killed and used >= share[stage] * finished.cpu[stage]:
            os.kill(pid, signal.SIGKILL)
            killed[stage] = used

    folder = Folder(tmp_path, data)
    folder.drive(kill)
    print(f"{folder.seconds:.0f} s; killed at CPU seconds: {killed}")
    assert set(killed) == set(STAGES)
    assert folder.attempts() == dict.fromkeys(STAGES, 2)
    expected, found = finished.manifests(), folder.manifests()
    assert {kind: m.digest for kind, m in found.items()} == {kind: m.digest for kind, m in expected.items()}
    assert {kind: m.content for kind, m in found.items()} == {kind: m.content for kind, m in expected.items()}


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
