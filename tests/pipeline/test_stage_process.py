"""The stage process from outside: real processes that run toy programs against a real store."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_api import names
from rlhf_api.errors import UserError
from rlhf_api.stage import (
    MAX_RESULT_BYTES,
    ArtifactRef,
    Progress,
    RunIdentity,
    StageConfig,
    StageResult,
    StageSettings,
    StoreConfig,
    stage_digest,
)
from rlhf_pipeline.failures import classify
from rlhf_pipeline.progress import INTERVAL, LINE_INTERVAL, ProgressFile
from rlhf_store.artifacts import Manifest, open_artifacts

LAUNCH = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from rlhf_pipeline import __main__ as process
process.PROGRAMS["sft"] = "toy:run"
sys.exit(process.main())
"""
TRAIN = """
import json, os, time
from rlhf_pipeline.stage_process import Interrupted

def run(stage):
    resumed = stage.checkpoints.latest()
    first, total = 1, 0.0
    if resumed:
        first, total = resumed[0] + 1, json.loads((resumed[1] / "state.json").read_text())
    def save(step):
        folder = stage.work / "mine"
        folder.mkdir(exist_ok=True)
        (folder / "state.json").write_text(json.dumps(total))
        stage.checkpoints.save(step, folder)
    for step in range(first, 13):
        total += step * 0.1
        stage.log(step, loss=total)
        stage.progress.update(step=step, total=12, phase=f"step {step}", loss=total)  # a new phase is written at once
        with open(stage.output / "samples.jsonl", "a") as file:
            file.write(f"{step}\\n")
        if step % 3 == 0:
            save(step)
        if str(step) == os.environ.get("PAUSE_AT"):
            while not stage.stopping:
                time.sleep(0.01)
        if stage.stopping:
            save(step)
            raise Interrupted("stopped in training")
    (stage.output / "report.json").write_text(json.dumps({"total": total}))
    return {"loss": total}
"""
REF = ArtifactRef(kind="sft-adapter", digest=stage_digest("sft", StageSettings(seed=1), {}))


class Process:
    """A stage's process of a toy program, and where its files are."""

    def __init__(self, folder: Path, store: StoreConfig, program: str, **config: Any) -> None:
        self.folder, self.work, self.store = folder, folder / "work", store
        folder.mkdir(exist_ok=True)
        (folder / "toy.py").write_text(program)
        document = StageConfig(
            run=RunIdentity(name="toy"),
            stage="sft",
            program="sft",
            settings=StageSettings(seed=1),
            output=REF,
            store=store,
        ).model_copy(update=config)
        (folder / "stage.json").write_text(document.model_dump_json(by_alias=True))

    def start(self, **environment: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", LAUNCH, str(self.folder)]
        return subprocess.Popen(
            [*command, "--config", "stage.json", "--work", "work", "--result", "result.json"],
            cwd=self.folder,
            env={**os.environ, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, **environment: str) -> tuple[int, StageResult, str]:
        (self.folder / "result.json").unlink(missing_ok=True)
        process = self.start(**environment)
        _, errors = process.communicate(timeout=60)
        return process.returncode, self.result(), errors

    def result(self) -> StageResult:
        data = (self.folder / "result.json").read_bytes()
        assert len(data) <= MAX_RESULT_BYTES
        return StageResult.model_validate_json(data)

    def progress(self) -> Progress:
        try:
            return Progress.model_validate_json((self.work / names.PROGRESS_FILE).read_bytes())
        except FileNotFoundError:
            return Progress(stage="sft")

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 60
        while self.progress().step < step:
            assert time.monotonic() < deadline, self.progress()
            time.sleep(0.005)

    def manifest(self) -> Manifest | None:
        return open_artifacts(self.store).find(REF)

    def steps(self) -> list[int]:
        fetched = open_artifacts(self.store).fetch(REF, self.folder / "fetched")
        return [json.loads(line)["step"] for line in (fetched / "logs" / "metrics.jsonl").read_text().splitlines()]


def test_a_stage_commits_its_output_and_a_second_run_reuses_it(store: StoreConfig, tmp_path: Path) -> None:
    process = Process(tmp_path / "a", store, TRAIN)
    code, result, errors = process.run()
    assert (code, result.artifact, result.failure) == (names.EXIT_OK, REF, None), errors
    assert result.metrics == {"loss": pytest.approx(7.8)}
    manifest = process.manifest()
    assert manifest is not None
    assert {path for path in manifest.files if "tensorboard" not in path} == {
        "report.json", "samples.jsonl", "logs/metrics.jsonl",
    }  # fmt: skip
    assert [path for path in manifest.files if path.startswith("logs/tensorboard/events.out")]
    assert manifest.metadata["metrics"] == result.metrics
    assert manifest.metadata["config"]["run"]["name"] == "toy"
    assert 10e6 < manifest.metadata["peakHostBytes"] < 1e9
    assert manifest.metadata["versions"]["torch"]
    assert "peakGpuBytes" not in manifest.metadata
    assert process.steps() == list(range(1, 13))
    keys = [info.key for info in open_artifacts(store).objects.walk("artifacts/")]
    assert not [key for key in keys if "checkpoints" in key]
    assert [file.name for file in process.work.iterdir() if file.name in ("output", "inputs", "restored")] == []
    again = Process(tmp_path / "b", store, "def run(stage): raise AssertionError('was run')")
    code, result, _ = again.run()
    assert (code, result.artifact, result.metrics) == (0, REF, {"loss": pytest.approx(7.8)})


def test_a_killed_stage_resumes_and_ends_with_the_same_content(store: StoreConfig, tmp_path: Path) -> None:
    whole = Process(tmp_path / "whole", StoreConfig(url=f"file://{tmp_path}/other"), TRAIN)
    whole.run()
    expected = whole.manifest()
    assert expected is not None
    for step in (2, 5, 10):  # 2: before any checkpoint
        process = Process(tmp_path / f"killed{step}", store, TRAIN)
        running = process.start(PAUSE_AT=str(step))
        process.wait_for_step(step)
        running.send_signal(signal.SIGKILL)
        running.communicate()
        assert process.manifest() is None
    last = Process(tmp_path / "last", store, TRAIN)  # another working folder, as in another pod
    code, _, errors = last.run()
    assert code == 0, errors
    manifest = last.manifest()
    assert manifest is not None
    assert manifest.content == expected.content
    assert last.steps() == list(range(1, 13))
    attempts = {info.key.split("/")[3] for info in open_artifacts(store).objects.walk("artifacts/")}
    assert attempts == {"manifest.json", manifest.attempt}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_stage_saves_a_checkpoint_and_goes_on(file_store: StoreConfig, tmp_path: Path, number: int) -> None:
    process = Process(tmp_path / "a", file_store, TRAIN)
    running = process.start(PAUSE_AT="5")
    process.wait_for_step(5)
    running.send_signal(number)
    running.communicate(timeout=60)
    assert running.returncode == names.EXIT_INTERRUPTED
    failure = process.result().failure
    assert failure is not None
    assert failure.checkpoint is not None
    assert failure.checkpoint.endswith("checkpoints/00000005/")
    assert failure.message == "stopped in training; run again to continue"
    code, _, _ = process.run()
    assert code == 0
    assert process.steps() == list(range(1, 13))


def test_a_program_that_does_not_poll_is_stopped_at_once(file_store: StoreConfig, tmp_path: Path) -> None:
    program = "import time\ndef run(stage):\n    stage.progress.update(step=1, phase='waiting')\n    time.sleep(60)"
    process = Process(tmp_path / "a", file_store, program)
    running = process.start()
    process.wait_for_step(1)
    running.terminate()
    running.communicate(timeout=30)
    assert running.returncode == names.EXIT_INTERRUPTED
    assert process.result().failure is not None
    assert process.manifest() is None


def test_a_damaged_checkpoint_is_passed_over(file_store: StoreConfig, tmp_path: Path) -> None:
    process = Process(tmp_path / "a", file_store, TRAIN)
    running = process.start(PAUSE_AT="7")
    process.wait_for_step(7)
    running.kill()
    running.communicate()
    objects = open_artifacts(file_store).objects
    (newest,) = [info.key for info in objects.walk("") if info.key.endswith("00000006/state/state.json")]
    objects.put(newest, b"9.9")
    code, _, errors = process.run()
    assert code == 0
    assert "warning: checkpoint" in errors
    assert "state.json was altered" in errors
    assert process.steps() == list(range(1, 13))
    manifest = process.manifest()
    assert manifest is not None
    assert manifest.metadata["metrics"]["loss"] == pytest.approx(7.8)


@pytest.mark.parametrize(
    ("program", "code", "failure", "message"),
    [
        (
            "from rlhf_api.errors import UserError as E\ndef run(s): raise E('data.sft: no rows')",
            2,
            "user",
            "data.sft: no",
        ),
        ("from rlhf_api.errors import GateError as E\ndef run(s): raise E('0.5 < 0.6')", 3, "gate", "0.5 < 0.6"),
        ("def run(s): raise ConnectionResetError('gone')", 4, "infrastructure", "connection failed"),
        ("def run(s): raise MemoryError('x')", 5, "outOfMemory", "out of memory"),
        ("import torch\ndef run(s): raise torch.OutOfMemoryError('CUDA: 2 GiB')", 5, "outOfMemory", "CUDA: 2 GiB"),
        ("def run(s): open('/dev/full', 'w').write('x' * 100000)", 4, "infrastructure", "disk full"),
        ("def run(s): return {'loss': float('nan')}", 1, "bug", "metric loss is nan"),
        ("def run(s): raise ValueError('boom ' * 3000)", 1, "bug", "ValueError: boom"),
        ("def run(s): s.input('model')", 1, "bug", "KeyError: 'model'"),
        ("import no_such_module", 1, "bug", "No module named 'no_such_module'"),
    ],
)
def test_each_failure_has_its_class_and_exit_code(
    file_store: StoreConfig, tmp_path: Path, program: str, code: int, failure: str, message: str
) -> None:
    process = Process(tmp_path / "a", file_store, program)
    got, result, errors = process.run()
    assert result.failure is not None
    assert (got, result.failure.failure) == (code, failure), errors
    assert message in result.failure.message
    assert ("Traceback" in errors) == (failure == "bug")
    assert process.manifest() is None


def test_a_config_that_is_none_is_named(file_store: StoreConfig, tmp_path: Path) -> None:
    process = Process(tmp_path / "a", file_store, TRAIN)
    document = json.loads((tmp_path / "a" / "stage.json").read_text())
    (tmp_path / "a" / "stage.json").write_text(json.dumps({**document, "attempt": "no spaces please"}))
    code, result, _ = process.run()
    assert code == names.EXIT_USER
    assert result.failure is not None
    assert "stage.json: attempt: String should match" in result.failure.message


def test_a_full_store_leaves_a_result(tmp_path: Path) -> None:
    code, result, _ = Process(tmp_path / "a", StoreConfig(url="file:///proc/store"), TRAIN).run()
    assert code == names.EXIT_INFRASTRUCTURE
    assert result.failure is not None
    assert "file:///proc/store" in result.failure.message


def test_inputs_are_fetched_and_large_files_sent_early(store: StoreConfig, tmp_path: Path) -> None:
    model = ArtifactRef(kind="model", digest="a" * 64)
    writer = open_artifacts(store).writer(model, "1")
    writer.add_bytes("config.json", b"{}")
    writer.add_bytes("w.safetensors", b"weights")
    writer.commit({})
    program = """
def run(stage):
    assert stage.has("model") and not stage.has("data")
    assert [f.name for f in stage.input("model", ["*.json"]).iterdir()] == ["config.json"]
    source = stage.input("model") / "w.safetensors"
    large = stage.work / "large"
    large.write_bytes(source.read_bytes() * 2)
    stage.writer.add_file("w.safetensors", large, settled=True)
    (stage.output / "config.json").write_text("{}")
    return {}
"""
    process = Process(tmp_path / "a", store, program, inputs={"model": model})
    code, _, errors = process.run()
    assert code == 0, errors
    fetched = open_artifacts(store).fetch(REF, tmp_path / "out")
    assert (fetched / "w.safetensors").read_bytes() == b"weightsweights"
    manifest = process.manifest()
    assert manifest is not None
    assert manifest.metadata["inputs"] == {"model": str(model)}


@pytest.mark.parametrize(
    ("field", "module", "tracking"),
    [
        ("tracking.wandbProject", "wandb", {"wandbProject": "p"}),
        ("tracking.mlflowUri", "mlflow", {"mlflowUri": "http://127.0.0.1:1"}),
    ],
)
def test_a_tracker_that_is_not_installed_is_named(
    file_store: StoreConfig, tmp_path: Path, field: str, module: str, tracking: dict[str, str]
) -> None:
    program = f"import sys\nsys.modules[{module!r}] = None\ndef run(s): s.log(1, loss=1.0); return {{}}"
    process = Process(tmp_path / "a", file_store, program)
    document = json.loads((tmp_path / "a" / "stage.json").read_text())
    (tmp_path / "a" / "stage.json").write_text(json.dumps({**document, "tracking": tracking}))
    code, result, _ = process.run()
    assert code == names.EXIT_USER
    assert result.failure is not None
    assert f"{field}: the package {module} is not installed here" in result.failure.message


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_progress_extrapolates_the_time_left_of_its_phase(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "progress.json"
    progress = ProgressFile(path, "ppo", clock)

    def written() -> Progress:
        return Progress.model_validate_json(path.read_bytes())

    clock.now += 100
    progress.update(total=10, phase="loading")
    assert (written().phase, written().eta_seconds) == ("loading", None)
    clock.now += 50
    progress.update(step=2, phase="training")  # resumed at 2
    clock.now += 8
    progress.update(step=4, reward=1.5, kl=float("nan"))
    assert written().eta_seconds == 24  # 4 s a step, six left
    assert written().metrics == {"reward": 1.5}
    assert (written().started_at, written().updated_at) == (1000, 1158)
    clock.now += INTERVAL / 2
    progress.update(step=5)
    assert written().step == 4  # too soon
    progress.update(step=10)
    assert (written().step, written().total, written().eta_seconds) == (10, 10, 0)


def test_a_log_tells_of_every_phase_and_now_and_then_of_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    progress = ProgressFile(tmp_path / "progress.json", "ppo", clock)
    progress.update(phase="loading")
    progress.update(step=0, total=10, phase="training")
    for step in range(1, 10):
        clock.now += LINE_INTERVAL / 4
        progress.update(step=step, total=10, phase="training", reward=step / 7)
    progress.update(step=10)
    progress.update(phase="saving")
    assert capsys.readouterr().out.splitlines() == [
        "ppo: begun",
        "ppo: loading",
        "ppo: training, step 0 of 10",
        "ppo: training, step 4 of 10, 45 s left, reward 0.5714",
        "ppo: training, step 8 of 10, 15 s left, reward 1.143",
        "ppo: saving, step 10 of 10, reward 1.286",
    ]


def test_the_first_of_our_own_errors_in_a_chain_counts(tmp_path: Path) -> None:
    error = RuntimeError("a worker died")
    error.__cause__ = UserError("data.sft: bad row 3")
    assert classify(error, tmp_path) == ("user", "data.sft: bad row 3")


@pytest.mark.parametrize("told", [None, "backend:native"])
def test_a_stage_has_the_allocator_that_the_budget_counts_on_unless_told_otherwise(
    told: str | None, tmp_path: Path
) -> None:
    name = "PYTORCH_ALLOC_CONF"
    source = f"""
        import os
        from rlhf_pipeline.__main__ import main
        main(["--config", "env:ABSENT", "--work", "none", "--result", "result.json"])
        print(os.environ["{name}"])
    """
    environment = {key: value for key, value in os.environ.items() if key != name} | ({name: told} if told else {})
    command = [sys.executable, "-c", textwrap.dedent(source)]
    said = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=True).stdout
    assert said == f"{told or 'expandable_segments:True'}\n"
