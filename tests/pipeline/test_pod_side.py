"""What a stage's process does because it is a pod: its config and port from the environment, its result in place."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from rlhf_api import names
from rlhf_api.stage import (
    MAX_RESULT_BYTES,
    ArtifactRef,
    RunIdentity,
    StageConfig,
    StageFailure,
    StageResult,
    StageSettings,
    StoreConfig,
    stage_digest,
)
from rlhf_pipeline.result_file import write_result

LAUNCH = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from rlhf_pipeline import __main__ as process
process.PROGRAMS["sft"] = "toy:run"
sys.exit(process.main())
"""
TRAIN = """
import time
from rlhf_pipeline.stage_process import Interrupted

def run(stage):
    stage.progress.update(step=2, total=12, phase="training")
    stage.log(3, loss=0.25, grad_norm=1.5)
    stage.progress.update(step=3, total=12, phase="training", loss=0.25)
    while not stage.stopping:
        time.sleep(0.01)
    folder = stage.work / "mine"
    folder.mkdir()
    stage.checkpoints.save(3, folder)
    raise Interrupted("stopped in training")
"""
WAIT = 60  # seconds, at most, for what takes one


class Pod:
    """A process started as a stage's container is: `environment` beside its config, its result at `result`."""

    def __init__(self, folder: Path, program: str = "def run(stage): return {'loss': 1.0}") -> None:
        self.folder, self.result = folder, folder / "termination-log"
        self.environment: dict[str, str] = {}
        self.arguments = ["--config", f"env:{names.ENV_STAGE_CONFIG}", "--work", str(folder / "work")]
        (folder / "toy.py").write_text(program)
        self.config = StageConfig(
            run=RunIdentity(name="toy", namespace="team"),
            stage="sft",
            program="sft",
            settings=StageSettings(),
            output=ArtifactRef(kind="sft-adapter", digest=stage_digest("sft", StageSettings(), {})),
            attempt="2",
            store=StoreConfig(url=f"file://{folder}/store"),
        )

    def start(self, *before: str) -> "subprocess.Popen[str]":
        command = [*before, sys.executable, "-c", LAUNCH, str(self.folder), *self.arguments, "--result"]
        config = {names.ENV_STAGE_CONFIG: self.config.model_dump_json(by_alias=True)}
        return subprocess.Popen(
            [*command, str(self.result)],
            env={**os.environ, **config, **self.environment},
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *before: str) -> tuple[int, StageResult]:
        process = self.start(*before)
        _, errors = process.communicate(timeout=WAIT)
        assert self.result.exists(), errors
        return process.returncode, StageResult.model_validate_json(self.result.read_bytes())

    def failure(self) -> tuple[int, StageFailure]:
        code, result = self.run()
        assert result.failure is not None
        return code, result.failure


def test_the_config_comes_from_the_environment(tmp_path: Path) -> None:
    pod = Pod(tmp_path)
    code, result = pod.run()
    assert (code, result.artifact, result.failure) == (names.EXIT_OK, pod.config.output, None)


def test_a_config_that_is_not_there_is_named(tmp_path: Path) -> None:
    pod = Pod(tmp_path)
    pod.arguments[1] = "env:NO_SUCH"
    code, failure = pod.failure()
    assert (code, failure.failure) == (names.EXIT_USER, "user")
    assert "--config env:NO_SUCH: the environment has no variable 'NO_SUCH'" in failure.message
    pod.arguments[1] = str(tmp_path / "none.json")
    code, failure = pod.failure()
    assert (code, failure.failure) == (names.EXIT_USER, "user")
    assert "none.json: cannot be read (No such file or directory)" in failure.message


def test_a_mounted_result_is_written_in_place(tmp_path: Path) -> None:
    """As the kubelet mounts /dev/termination-log: a file of another place, which rename cannot replace."""
    pod, behind = Pod(tmp_path), tmp_path / "behind"
    pod.result.touch()
    behind.write_text("x" * 9000)
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this kernel lets no one make a mount namespace")
    mount = 'mount --bind "$0" "$1"; shift; exec "$@"'
    process = pod.start(*namespace, "sh", "-c", mount, str(behind), str(pod.result))
    _, errors = process.communicate(timeout=WAIT)
    assert process.returncode == names.EXIT_OK, errors
    assert StageResult.model_validate_json(behind.read_bytes()).artifact == pod.config.output
    assert pod.result.read_bytes() == b""  # what lies below the mount
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=3000), st.integers(0, 400))
def test_a_result_never_exceeds_what_kubernetes_keeps(message: str, figures: int) -> None:
    failure = StageFailure(failure="bug", message=message * 3)
    result = StageResult(stage="sft", failure=failure, metrics={f"figure{i}": i / 7 for i in range(figures)})
    path = Path(f"/dev/shm/rlhf-result-{os.getpid()}")
    try:
        write_result(path, result)
        data = path.read_bytes()
    finally:
        path.unlink(missing_ok=True)
    assert len(data) <= MAX_RESULT_BYTES
    written = StageResult.model_validate_json(data).failure
    assert written is not None
    whole = written.message == failure.message
    assert whole or (written.message.endswith(" …") and failure.message.startswith(written.message[:-2]))


def test_a_running_stage_serves_its_progress_and_a_stopped_one_saves_it(tmp_path: Path) -> None:
    pod, port = Pod(tmp_path, TRAIN), _free_port()
    pod.environment = {names.ENV_METRICS_PORT: str(port)}
    process = pod.start()
    try:
        served = _scrape_until_step(port, 3, process)
    finally:
        process.terminate()
        process.communicate(timeout=WAIT)
    value = {name: family.samples[0].value for name, family in served.items() if len(family.samples) == 1}
    assert (value[names.METRIC_STEP], value[names.METRIC_STEPS]) == (3, 12)
    assert _labels(served[names.METRIC_PHASE]) == [{"phase": "training"}]
    assert _labels(served[names.METRIC_INFO]) == [
        {
            "run": "toy",
            "namespace": "team",
            "stage": "sft",
            "program": "sft",
            "attempt": "2",
            "artifact": str(pod.config.output),
        }
    ]
    assert _figures(served[names.METRIC_FIGURE]) == {"loss": 0.25}
    assert _figures(served[names.METRIC_LOGGED]) == {"loss": 0.25, "grad_norm": 1.5}
    assert value[names.METRIC_ETA] >= 0
    assert 0 <= time.time() - value[names.METRIC_UPDATED] < WAIT
    assert value[names.METRIC_STARTED] <= value[names.METRIC_UPDATED]
    assert 10e6 < value[names.METRIC_HOST_MEMORY] < 2e9
    assert names.METRIC_GPU_MEMORY not in served
    failure = StageResult.model_validate_json(pod.result.read_bytes()).failure
    assert process.returncode == names.EXIT_INTERRUPTED
    assert failure is not None
    assert failure.checkpoint is not None
    assert failure.checkpoint.endswith("checkpoints/00000003/")


@pytest.mark.parametrize("port", ["http", "0", "65536", "-1", "9090.5"])
def test_a_port_that_is_none_is_named(tmp_path: Path, port: str) -> None:
    pod = Pod(tmp_path)
    pod.environment = {names.ENV_METRICS_PORT: port}
    code, failure = pod.failure()
    assert (code, failure.failure) == (names.EXIT_USER, "user")
    assert failure.message == f"RLHF_METRICS_PORT: {port!r} is no port; set a number from 1 to 65535"


def test_a_port_in_use_is_no_fault_of_the_run(tmp_path: Path) -> None:
    pod = Pod(tmp_path)
    with socket.create_server(("", 0)) as taken:
        pod.environment = {names.ENV_METRICS_PORT: str(taken.getsockname()[1])}
        code, failure = pod.failure()
    assert (code, failure.failure) == (names.EXIT_INFRASTRUCTURE, "infrastructure")
    assert "Address already in use" in failure.message


@pytest.fixture
def first_process() -> list[str]:
    """A command that makes what follows the first process of a namespace, as a container's is."""
    namespace = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this kernel lets no one make a process namespace")
    return namespace


def test_a_stage_told_to_stop_before_it_began_stops(tmp_path: Path, first_process: list[str]) -> None:
    """The kernel drops a signal that a container's first process has no handler for."""
    pod = Pod(tmp_path)
    pipe = tmp_path / "config"
    os.mkfifo(pipe)
    pod.arguments[1] = str(pipe)
    process = pod.start(*first_process)
    writer = _open_when_read(pipe, process)
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)
        process.communicate(timeout=WAIT)
    finally:
        os.close(writer)
        process.kill()
    assert process.returncode == names.EXIT_INTERRUPTED
    failure = StageResult.model_validate_json(pod.result.read_bytes()).failure
    assert failure is not None
    assert failure.message == "stopped by SIGTERM before it began; run again to continue"


def _open_when_read(pipe: Path, process: "subprocess.Popen[str]") -> int:
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads yet
            time.sleep(0.01)
    raise AssertionError("the process never read its config")


def _free_port() -> int:
    with socket.create_server(("", 0)) as free:
        return int(free.getsockname()[1])


def _scrape_until_step(port: int, step: int, process: "subprocess.Popen[str]") -> dict[str, Metric]:
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                families = {each.name: each for each in text_string_to_metric_families(answer.read().decode())}
        except (urllib.error.URLError, ConnectionError):
            families = {}
        if families and families[names.METRIC_STEP].samples[0].value == step:
            return families
        time.sleep(0.05)
    raise AssertionError(f"step {step} was never served; exit code {process.poll()}")


def _labels(family: Metric) -> list[dict[str, str]]:
    return [dict(sample.labels) for sample in family.samples]


def _figures(family: Metric) -> dict[str, float]:
    return {sample.labels["name"]: sample.value for sample in family.samples}


def test_a_result_for_a_pipe_goes_through_it(tmp_path: Path) -> None:
    pipe, result = tmp_path / "pipe", StageResult(stage="sft")
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDWR)
    try:
        write_result(pipe, result)
        assert os.read(end, 4096) == result.to_bytes()
    finally:
        os.close(end)
    assert pipe.is_fifo()
