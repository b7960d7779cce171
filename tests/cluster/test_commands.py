"""`rlhf … --cluster` and `kubectl rlhf …` as processes: what they print, where, and how they exit.

On a real API server with its controllers, a real operator and a real MinIO. No pod runs: `StagePlayer` ends each as
its stage would. What needs pods that run is in test_commands_in_pods.py.
"""

import json
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from bare_plane import BarePlane, OperatorProcess, until
from minio_server import PASSWORD, USER, MinioServer
from objects import Objects
from shell import BIN, SECONDS, Done, Shell, ended
from stage_player import NOBODY, PAGE, StagePlayer

from rlhf_api.errors import FailureClass, StoreError
from rlhf_api.names import ENV_ACCESS_KEY, ENV_SECRET_KEY, EXIT_CODES, PLURAL
from rlhf_operator.cluster_options import ClusterOptions
from rlhf_operator.port_forward import forwarded

pytestmark = pytest.mark.timeout(600)

BUCKET = "rlhf"
RUNS = ("--store", "s3://rlhf/runs")  # some tests' runs have another one
SECRET = "store"
STAGES = ["import-model", "import-prompts", "reward", "ppo", "evaluate"]

Document = dict[str, Any]


@dataclass
class Desk(Shell):
    """A shell in one namespace, files of runs, and those who play the cluster's part."""

    namespace: str
    player: StagePlayer
    operator: OperatorProcess

    def write(self, name: str, **spec: Any) -> Path:
        """The file of a run that has five stages and shares none of them with a run of another name."""
        short = {
            "model": {"source": f"hf://owner/{name}"},
            "data": {"prompts": {"source": f"hf://datasets/owner/{name}"}},
            "reward": {"function": "module:callable"},
            "placement": {"podTemplate": NOBODY},
        }
        document = {"apiVersion": "rlhf.dev/v1alpha1", "kind": "RLHFRun", "metadata": {"name": name}}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**document, "spec": {**short, **spec}}))
        return path

    @cached_property
    def objects(self) -> Objects:
        """What is in the namespace."""
        return Objects(self.kubeconfig, self.namespace)

    def kubectl(self, *words: str | Path, stdin: Any = None) -> str:
        """What kubectl prints. Fails with what it says."""
        text = None if stdin is None else yaml.safe_dump(stdin)
        command = [BIN / "kubectl", "--kubeconfig", self.kubeconfig, *words]
        done = subprocess.run(command, input=text, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run(self, name: str) -> Document:
        """A run as it now is."""
        return self.objects.get(PLURAL, name)

    def phase(self, name: str) -> str | None:
        phase: str | None = self.run(name).get("status", {}).get("phase")
        return phase

    def exists(self, name: str) -> bool:
        return name in [run["metadata"]["name"] for run in self.objects.list(PLURAL)]

    def until_phase(self, name: str, phase: str) -> None:
        until(lambda: self.exists(name) and self.phase(name) == phase, SECONDS, self.operator.last_lines)

    def until_waits(self, name: str, stage: str) -> None:
        """Return once a pod of the stage is there, which the player was told to hold."""

        def waits() -> bool:
            assert not self.exists(name) or self.phase(name) not in ("Failed", "Succeeded"), self.run(name)
            return bool(self.objects.list("pods", f"rlhf.dev/run={name},rlhf.dev/stage={stage}"))

        until(waits, SECONDS, self.operator.last_lines)


def check_failed(desk: Desk, said: Done, failure: FailureClass) -> None:
    """Fails unless `rlhf run` said why its run failed, what to do about it, and exited so."""
    assert said.returncode == EXIT_CODES[failure], said
    _, why, logs, again = said.stderr.splitlines()
    assert why.startswith(f"rlhf: import-model: what a {failure} says")
    assert ("gave up after" in why) == (failure in ("infrastructure", "outOfMemory"))
    name = f"fails-{failure.lower()}"
    assert logs.split() == ["logs", *f"rlhf logs {name} --stage import-model --cluster".split()]
    assert again.split() == ["again", *f"rlhf run {desk.folder / name}.yaml --cluster".split()]


@pytest.fixture(scope="module")
def minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MinioServer]:
    """A store, with its credentials in the environment of the operator and the player."""
    with MinioServer(tmp_path_factory.mktemp("minio")) as server, pytest.MonkeyPatch.context() as patch:
        server.client().make_bucket(BUCKET)
        patch.setenv(ENV_ACCESS_KEY, USER)
        patch.setenv(ENV_SECRET_KEY, PASSWORD)
        yield server


@pytest.fixture(scope="module")
def bench(own_plane: BarePlane, minio: MinioServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A namespace with an operator, and the Secret with its store's keys."""
    folder, namespace = tmp_path_factory.mktemp("desk"), f"test-{uuid.uuid4().hex[:8]}"
    config = yaml.safe_load(own_plane.kubeconfig.read_text())
    config["contexts"][0]["context"]["namespace"] = namespace
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(config))
    store = {"STORE_BUCKET": BUCKET, "STORE_PREFIX": "runs", "STORE_ENDPOINT": minio.url, "STORE_SECRET": SECRET}
    log = folder / "operator.log"
    operator = OperatorProcess(own_plane.kubeconfig, folder, log, [namespace], settings=store)
    with StagePlayer(own_plane.kubeconfig) as player:
        desk = Desk(folder, kubeconfig, namespace, player, operator)
        desk.kubectl("create", "namespace", namespace)
        keys = {ENV_ACCESS_KEY: USER, ENV_SECRET_KEY: PASSWORD}
        literals = [f"--from-literal={name}={value}" for name, value in keys.items()]
        desk.kubectl("create", "secret", "generic", SECRET, *literals)
        operator.start()
        try:
            yield desk
        finally:
            operator.kill()
            desk.kubectl("delete", "namespace", namespace, "--wait=false")


@pytest.fixture
def desk(bench: Desk) -> Iterator[Desk]:
    # What a shell started in the background ignores, its children ignore too: Ctrl-C is to reach them.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield bench
    signal.signal(signal.SIGINT, before)
    bench.player.held.clear()
    bench.environment.clear()


@pytest.fixture(scope="module")
def failing(bench: Desk) -> Iterator[dict[str, "subprocess.Popen[str]"]]:
    """How -> `rlhf run` of a run that fails so, all at once: some are tried again for a minute."""
    begun = {}
    for failure in EXIT_CODES:
        name = f"fails-{failure.lower()}"
        bench.player.failing[name, "import-model"] = failure
        begun[failure] = bench.begin("rlhf", "run", bench.write(name), "--cluster")
    late = bench.write("late", activeDeadlineSeconds=1)
    bench.player.failing["late", "import-model"] = "infrastructure"
    begun["deadline"] = bench.begin("rlhf", "run", late, "--cluster")
    yield begun
    for process in begun.values():
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def done(bench: Desk) -> tuple[str, Done]:
    """A run that has succeeded, and what `rlhf run` did."""
    return "done", bench.rlhf("run", bench.write("done"))


# ---- run ------------------------------------------------------------------------------------------------------------


def test_run_submits_follows_to_the_end_and_sums_up(desk: Desk, done: tuple[str, Done]) -> None:
    name, said = done
    assert (said.returncode, said.stderr) == (0, f"rlhf: done in namespace {desk.namespace}: created\n")
    assert desk.phase(name) == "Succeeded"
    lines = said.stdout.splitlines()
    heading = next(number for number, line in enumerate(lines) if line.split() == ["stage", "time", "figures"])
    for stage in STAGES:
        assert any(re.match(rf"{stage} +succeeded", line) for line in lines[:heading]), said.stdout
        assert [stage, "2", "s", "loss", "0.5"] in [line.split() for line in lines[heading:]], said.stdout
    assert lines[-1] == "Report: rlhf report done --cluster"


@pytest.mark.parametrize("failure", [failure for failure in EXIT_CODES if failure != "infrastructure"])
def test_a_run_that_fails_exits_with_the_code_of_its_class(
    desk: Desk, failing: dict[str, "subprocess.Popen[str]"], failure: FailureClass
) -> None:
    check_failed(desk, ended(failing[failure]), failure)


def test_a_deadline_that_passed_exits_as_a_missed_gate(desk: Desk, failing: dict[str, "subprocess.Popen[str]"]) -> None:
    said = ended(failing["deadline"])
    assert said.returncode == EXIT_CODES["gate"], said
    assert "rlhf: spec.activeDeadlineSeconds: 1 have passed; raise it" in said.stderr


def test_a_wrong_spec_is_refused_before_anything_is_sent(desk: Desk) -> None:
    said = desk.rlhf("run", desk.write("wrong", ppo={"batchSize": 8, "microBatchSize": 3}, gpu={"count": 9}))
    assert (said.returncode, said.stdout) == (EXIT_CODES["user"], "")
    assert "spec.ppo.microBatchSize: 3 does not divide" in said.stderr
    assert "spec.gpu.count: " in said.stderr
    assert not desk.exists("wrong")


def test_what_the_cluster_refuses_says_who_refused_and_why(desk: Desk, own_plane: BarePlane) -> None:
    namespace = f"test-{uuid.uuid4().hex[:8]}"
    file = desk.write("one-too-many")
    missing = desk.rlhf("run", file, "-n", namespace)
    assert missing.returncode == EXIT_CODES["user"]
    assert missing.stderr == (
        f"rlhf: namespace {namespace}: does not exist; create it with `kubectl create namespace {namespace}`\n"
    )
    [command] = re.findall("`(.*)`", missing.stderr)
    assert desk.call(*shlex.split(command)).returncode == 0
    desk.kubectl("create", "quota", "none", "--hard=count/rlhfruns.rlhf.dev=0", "-n", namespace)
    quota = ("get", "quota", "none", "-n", namespace, "-o", "jsonpath={.status.used}")
    until(lambda: desk.kubectl(*quota), SECONDS, "the quota is not in force")
    denied = desk.rlhf("run", file, "-n", namespace)
    assert denied.returncode == EXIT_CODES["user"]
    assert "exceeded quota: none" in denied.stderr
    assert "the role" not in denied.stderr  # no role helps
    assert denied.stderr.count("\n") == 1


def test_an_api_server_that_is_away_exits_as_infrastructure(desk: Desk, tmp_path: Path) -> None:
    config = yaml.safe_load(desk.kubeconfig.read_text())
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        server = f"https://127.0.0.1:{unused.getsockname()[1]}"
        config["clusters"][0]["cluster"]["server"] = server
        (tmp_path / "config").write_text(yaml.safe_dump(config))
        said = desk.rlhf("run", desk.write("away"), "--kubeconfig", tmp_path / "config")
    assert said.returncode == EXIT_CODES["infrastructure"]
    assert said.stderr.startswith(f"rlhf: {server}: no answer (")
    assert said.stderr.count("\n") == 1


def test_ctrl_c_ends_the_following_and_not_the_run(desk: Desk) -> None:
    desk.player.held |= {"reward"}
    file = desk.write("left-alone")
    following = desk.begin("rlhf", "run", file, "--cluster")
    desk.until_waits("left-alone", "reward")
    following.send_signal(signal.SIGINT)
    said = ended(following)
    assert said.returncode == 130
    assert f"rlhf: left-alone goes on in namespace {desk.namespace}" in said.stderr
    assert f"rlhf run {file} --cluster" in said.stderr
    desk.player.held.clear()
    desk.until_phase("left-alone", "Succeeded")


def test_the_same_run_again_is_followed(desk: Desk) -> None:
    desk.player.held |= {"ppo"}
    file = desk.write("twice", seed=0)  # the default, which the file may as well leave out
    first = desk.rlhf("run", file, "--no-follow")
    assert first.returncode == 0
    desk.until_waits("twice", "ppo")
    generation = desk.run("twice")["metadata"]["generation"]
    second = desk.begin("rlhf", "run", desk.write("twice"), "--cluster")
    desk.player.held.clear()
    said = ended(second)
    assert said.returncode == 0, said
    assert said.stderr == f"rlhf: twice in namespace {desk.namespace}: there already\n"
    assert desk.run("twice")["metadata"]["generation"] == generation


def test_another_run_of_the_name_is_refused_with_what_differs_and_the_ways_out(desk: Desk) -> None:
    desk.player.held |= {"reward"}
    assert desk.rlhf("run", desk.write("taken", ppo={"epochs": 2}), "--no-follow").returncode == 0
    desk.until_waits("taken", "reward")
    before = desk.run("taken")
    file = desk.write("taken", ppo={"epochs": 3}, seed=7, activeDeadlineSeconds=9999)
    said = desk.rlhf("run", file)
    assert (said.returncode, said.stdout) == (EXIT_CODES["user"], "")
    assert said.stderr.splitlines()[:3] == [
        f"rlhf: run 'taken' is in namespace {desk.namespace} already, and is not the one of {file}:",
        "  spec.ppo.epochs: 2 there, 3 in taken.yaml",
        "  spec.seed: 0 there, 7 in taken.yaml",
    ]
    assert "Give the file another metadata.name" in said.stderr
    assert desk.run("taken")["spec"] == before["spec"]
    [delete] = re.findall("`(.*?)`", said.stderr)
    assert desk.call(*shlex.split(delete)).returncode == 0
    desk.player.held.clear()
    assert desk.rlhf("run", file).returncode == 0
    assert desk.run("taken")["spec"]["ppo"]["epochs"] == 3


def test_what_may_change_is_changed_and_the_rest_once_it_is_suspended(desk: Desk) -> None:
    desk.player.held |= {"reward"}
    assert desk.rlhf("run", desk.write("changes", activeDeadlineSeconds=900), "--no-follow").returncode == 0
    desk.until_waits("changes", "reward")
    said = desk.rlhf("run", desk.write("changes"), "--no-follow")
    assert said.stderr == f"rlhf: changes in namespace {desk.namespace}: spec.activeDeadlineSeconds changed\n"
    assert "activeDeadlineSeconds" not in desk.run("changes")["spec"]
    placement = {"podTemplate": NOBODY, "nodeSelector": {"disk": "fast"}}
    file = desk.write("changes", placement=placement)
    refused = desk.rlhf("run", file, "--no-follow")
    assert refused.returncode == EXIT_CODES["user"]
    assert "  spec.placement.nodeSelector.disk: not set there, fast in changes.yaml\n" in refused.stderr
    [suspend] = re.findall("`(.*?)`", refused.stderr)
    assert desk.call(*shlex.split(suspend)).returncode == 0
    desk.player.held.clear()
    resumed = desk.rlhf("run", file)
    assert resumed.returncode == 0, resumed
    said = f"rlhf: changes in namespace {desk.namespace}: resumed, spec.placement.nodeSelector.disk changed\n"
    assert resumed.stderr == said
    assert desk.run("changes")["spec"]["placement"]["nodeSelector"] == {"disk": "fast"}


def test_a_failed_run_is_asked_for_again_elsewhere_if_the_file_says_so(desk: Desk) -> None:
    desk.player.failing["again", "reward"] = "gate"
    failed = desk.rlhf("run", desk.write("again"))
    assert failed.returncode == EXIT_CODES["gate"]
    assert [line.split()[0] for line in failed.stderr.splitlines()[-2:]] == ["logs", "again"]
    del desk.player.failing["again", "reward"]
    said = desk.rlhf("run", desk.write("again", placement={"podTemplate": NOBODY, "nodeSelector": {"disk": "fast"}}))
    assert said.returncode == 0, said
    assert said.stderr == (
        f"rlhf: again in namespace {desk.namespace}: asked for again, as it had failed, "
        "spec.placement.nodeSelector.disk changed\n"
    )
    assert desk.run("again")["spec"]["placement"]["nodeSelector"] == {"disk": "fast"}


def test_a_run_that_is_deleted_ends_the_following(desk: Desk) -> None:
    desk.player.held |= {"reward"}
    following = desk.begin("rlhf", "run", desk.write("deleted"), "--cluster")
    desk.until_waits("deleted", "reward")
    desk.kubectl("delete", "rlhfrun", "deleted")
    said = ended(following)
    assert (said.returncode, said.stderr.splitlines()[-1]) == (EXIT_CODES["user"], "rlhf: run 'deleted' was deleted")


def test_following_outlives_the_api_server(desk: Desk, own_plane: BarePlane) -> None:
    desk.player.held |= {"reward"}
    following = desk.begin("rlhf", "run", desk.write("outlives"), "--cluster")
    desk.until_waits("outlives", "reward")
    pid = own_plane.api_server_pid
    own_plane.kill_api_server()
    until(lambda: own_plane.api_server_pid != pid and own_plane.answers(), SECONDS, "the API server does not come back")
    desk.player.held.clear()
    said = ended(following)
    assert said.returncode == 0, said
    assert said.stdout.count("no answer") <= 1


def test_no_operator_is_said(desk: Desk) -> None:
    following = desk.begin("rlhf", "run", desk.write("nobodys"), "--cluster", "-n", "default")
    try:
        assert following.stdout
        assert select.select([following.stdout], [], [], SECONDS)[0]
        line = following.stdout.readline()
    finally:
        following.kill()
        following.communicate()
        desk.kubectl("delete", "rlhfrun", "nobodys", "-n", "default")
    assert line.startswith(
        "rlhf: no operator has looked at nobodys yet; see that one serves default: kubectl get pods "
    )


# ---- status, logs, suspend, resume ----------------------------------------------------------------------------------


def test_status_lists_runs_and_shows_one(desk: Desk, done: tuple[str, Done]) -> None:
    rows = json.loads(desk.rlhf("status", "--json").stdout)
    [row] = [row for row in rows if row["name"] == "done"]
    assert (row["namespace"], row["phase"]) == (desk.namespace, "Succeeded")
    listed = desk.rlhf("status").stdout.splitlines()
    assert listed[0].split() == ["run", "phase", "stage", "progress", "reward", "age"]
    assert next(line.split()[:2] for line in listed if line.startswith("done ")) == ["done", "Succeeded"]
    everywhere = desk.rlhf("status", "-A").stdout.splitlines()
    assert [desk.namespace, "done", "Succeeded"] in [line.split()[:3] for line in everywhere]
    one = desk.rlhf("status", "done").stdout.splitlines()
    assert one[0] == "done  Succeeded"
    assert [stage for stage in STAGES if any(line.split()[1:2] == [stage] for line in one)] == STAGES
    assert len(json.loads(desk.rlhf("status", "done", "--json").stdout)["stages"]) == 10


def test_a_run_that_is_not_there_is_looked_for_elsewhere(desk: Desk, done: tuple[str, Done]) -> None:
    near = desk.rlhf("status", "dome")
    assert (near.returncode, near.stdout) == (EXIT_CODES["user"], "")
    assert near.stderr == f"rlhf: run 'dome' is not in namespace {desk.namespace}; did you mean done?\n"
    elsewhere = desk.rlhf("status", "done", "-n", "default")
    assert elsewhere.stderr == (
        f"rlhf: run 'done' is not in namespace default; there is one in {desk.namespace}: "
        f"add --namespace {desk.namespace}\n"
    )


def test_kubectl_finds_its_plugin(desk: Desk, done: tuple[str, Done]) -> None:
    assert "kubectl-rlhf" in desk.call("kubectl", "plugin", "list").stdout
    said = desk.call("kubectl", "rlhf", "status", "done")
    assert (said.returncode, said.stdout.splitlines()[0]) == (0, "done  Succeeded")
    following = desk.call("kubectl", "rlhf", "run", desk.write("done"))
    assert following.stdout.splitlines()[-1] == "Report: kubectl rlhf report done"


def test_suspend_ends_the_following_and_resume_goes_on(desk: Desk) -> None:
    desk.player.held |= {"reward"}
    file = desk.write("paused")
    following = desk.begin("rlhf", "run", file, "--cluster")
    desk.until_waits("paused", "reward")
    assert desk.rlhf("suspend", "paused").returncode == 0
    said = ended(following)
    assert said.returncode == 130
    assert said.stderr.splitlines()[-1] == "rlhf: paused is suspended; `rlhf resume paused --cluster` resumes it"
    assert desk.phase("paused") == "Suspended"
    desk.player.held.clear()
    [command] = re.findall("`(.*)`", said.stderr)
    assert desk.call(*shlex.split(command)).returncode == 0
    assert desk.rlhf("resume", "paused").stdout == "paused is not suspended\n"
    assert desk.rlhf("run", file).returncode == 0
    assert desk.rlhf("suspend", "paused").stdout == "paused has ended: its phase is Succeeded\n"


def test_logs_of_a_pod_that_has_not_begun_say_so(desk: Desk) -> None:
    desk.player.held |= {"reward"}
    assert desk.rlhf("run", desk.write("silent"), "--no-follow").returncode == 0
    desk.until_waits("silent", "reward")
    said = desk.rlhf("logs", "silent")
    assert (said.returncode, said.stdout) == (EXIT_CODES["user"], "")
    assert said.stderr == "rlhf: run 'silent': reward, attempt 1 has no log: its pod is Pending\n"
    never = desk.rlhf("logs", "silent", "--stage", "ppo")
    assert never.stderr.startswith("rlhf: run 'silent': ppo has not begun; these have: import-model, import-prompts,")
    desk.kubectl("delete", "rlhfrun", "silent")


# ---- the store ------------------------------------------------------------------------------------------------------


def test_report_is_written_with_the_keys_of_the_secret(desk: Desk, done: tuple[str, Done]) -> None:
    said = desk.rlhf("report", "done", "--out", "page.html")
    assert (said.returncode, said.stdout) == (0, "page.html\n"), said.stderr
    assert (desk.folder / "page.html").read_bytes() == PAGE


def test_report_names_whose_keys_the_store_refused(desk: Desk, done: tuple[str, Done]) -> None:
    desk.environment |= {ENV_ACCESS_KEY: USER, ENV_SECRET_KEY: "wrong"}
    said = desk.rlhf("report", "done")
    assert said.returncode == EXIT_CODES["infrastructure"]
    assert said.stderr.endswith("(credentials: of the environment)\n")
    assert said.stderr.count("\n") == 1


def test_report_of_a_run_that_has_none_yet_says_so(desk: Desk) -> None:
    desk.player.held |= {"reward"}
    assert desk.rlhf("run", desk.write("early"), "--no-follow").returncode == 0
    desk.until_waits("early", "reward")
    said = desk.rlhf("report", "early")
    assert said.returncode == EXIT_CODES["user"]
    assert said.stderr == (
        "rlhf: run 'early' has no report yet: its phase is Running; see `rlhf status early --cluster`\n"
    )
    desk.kubectl("delete", "rlhfrun", "early")


def test_what_no_run_of_the_cluster_names_is_collected(desk: Desk, minio: MinioServer, done: tuple[str, Done]) -> None:
    desk.player.held |= {"reward"}
    assert desk.rlhf("run", desk.write("half-way"), "--no-follow").returncode == 0
    desk.until_waits("half-way", "reward")
    named = {stage["name"]: stage.get("artifact") for stage in desk.run("half-way")["status"]["stages"]}
    its_checkpoint = f"runs/artifacts/{named['reward']}/attempt/checkpoint"
    orphan = f"runs/artifacts/policy/{'0' * 64}/attempt/checkpoint"
    for key in (its_checkpoint, orphan):
        minio.client().put_object(BUCKET, key, BytesIO(b"half"), 4)
    whole = {each["ref"] for each in json.loads(desk.rlhf("artifacts", "ls", "--json", *RUNS).stdout)}
    of_done = {stage["artifact"] for stage in desk.run("done")["status"]["stages"] if stage.get("artifact")}
    assert whole >= of_done | {named["import-model"]}

    def removed(*words: str) -> set[str]:
        said = desk.call("kubectl", "rlhf", "artifacts", "gc", "--older-than", "0", "--json", *RUNS, *words)
        assert said.returncode == 0, said.stderr
        return {f"runs/{key}" for each in json.loads(said.stdout) for key in each["keys"]}

    def kept_elsewhere() -> set[str]:
        """What stays because a run of another namespace, and of another operator, means to make the orphan."""
        desk.kubectl("create", "-n", "default", "-f", desk.write("foreign"))
        making = {"phase": "Running", "stages": [{"name": "ppo", "state": "Running", "artifact": f"policy/{'0' * 64}"}]}
        patch = json.dumps({"status": making})
        desk.kubectl(
            "patch", "rlhfrun", "foreign", "-n", "default", "--subresource=status", "--type=merge", "-p", patch
        )
        try:
            return rehearsed - removed("--dry-run")
        finally:
            desk.kubectl("delete", "rlhfrun", "foreign", "-n", "default")

    rehearsed = removed("--dry-run")
    assert orphan in rehearsed
    assert its_checkpoint not in rehearsed
    assert kept_elsewhere() == {orphan}
    assert removed() == rehearsed
    assert not any(ref in key for key in removed("--unkept", "--dry-run") for ref in of_done)
    desk.kubectl("delete", "rlhfrun", "half-way")
    unkept = removed("--unkept")
    assert any(named["import-model"] in key for key in unkept)
    assert its_checkpoint in unkept
    left = {each["ref"] for each in json.loads(desk.rlhf("artifacts", "ls", "--json", *RUNS).stdout)}
    assert of_done <= left < whole
    assert desk.rlhf("artifacts", "verify", *sorted(of_done), *RUNS).returncode == 0


def test_which_store_is_meant_has_to_be_clear(desk: Desk, done: tuple[str, Done]) -> None:
    desk.player.held |= {"import-model"}
    elsewhere = desk.write("elsewhere", objectStore={"bucket": BUCKET, "prefix": "other"})
    assert desk.rlhf("run", elsewhere, "--no-follow").returncode == 0
    desk.until_waits("elsewhere", "import-model")
    said = desk.rlhf("artifacts", "ls")
    assert (said.returncode, said.stdout) == (EXIT_CODES["user"], "")
    assert said.stderr == (
        f"rlhf: namespace {desk.namespace}: its runs have 2 stores; choose one with --store: "
        f"s3://{BUCKET}/other, s3://{BUCKET}/runs\n"
    )
    assert "no artifacts" in desk.rlhf("artifacts", "ls", "--store", f"s3://{BUCKET}/other").stdout
    unknown = desk.rlhf("artifacts", "gc", "--store", "s3://nowhere/x")
    assert unknown.stderr.startswith(f"rlhf: --store s3://nowhere/x: no run of namespace {desk.namespace} has it; they")
    nobodys = desk.rlhf("artifacts", "ls", "--namespace", "kube-public")
    assert nobodys.stderr == "rlhf: namespace kube-public: its runs have no stores; look elsewhere with --namespace\n"
    desk.kubectl("delete", "rlhfrun", "elsewhere")


def test_a_node_that_does_not_answer_ends_a_forward_with_words(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as kubelet:  # takes connections and says nothing
        node = f"silent-{uuid.uuid4().hex[:8]}"
        status: Document = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": kubelet.getsockname()[1]}},
        }
        there = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
        container = {"name": "store", "image": "localhost/nothing:1", "ports": [{"containerPort": 9000}]}
        desk.kubectl("create", "-f", "-", stdin={"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}})
        try:
            desk.kubectl("patch", "node", node, "--subresource=status", "-p", json.dumps({"status": status}))
            pod = {"metadata": {"name": "store", "labels": {"app": "store"}}, "apiVersion": "v1", "kind": "Pod"}
            tolerations = [{"operator": "Exists"}]
            spec = {"nodeName": node, "containers": [container], "tolerations": tolerations}
            desk.kubectl("create", "-f", "-", stdin={**pod, "spec": spec})
            desk.kubectl("patch", "pod", "store", "--subresource=status", "-p", json.dumps({"status": there}))
            service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "store"}}
            ports = {"selector": {"app": "store"}, "ports": [{"port": 9000}]}
            desk.kubectl("create", "-f", "-", stdin={**service, "spec": ports})
            monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
            options = ClusterOptions(namespace=desk.namespace, kubeconfig=desk.kubeconfig)
            began = time.monotonic()
            message = "Service store: kubectl port-forward was not ready within 5 s; see that its pod and"
            with pytest.raises(StoreError, match=message), forwarded(options, "store", 9000, ready_seconds=5):
                pass
            assert time.monotonic() - began < 30
        finally:
            desk.kubectl("delete", "node", node)


def test_infrastructure_that_stays_broken_is_given_up(desk: Desk, failing: dict[str, "subprocess.Popen[str]"]) -> None:
    # The last of this file: the other tests fill the minute that its attempts take.
    check_failed(desk, ended(failing["infrastructure"]), "infrastructure")
