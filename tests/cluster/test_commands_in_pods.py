"""`rlhf … --cluster` where pods run: the log of one, and a store that only the cluster reaches. One run for all."""

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from calm import LONGER
from kubectl import SOON
from release import Release, tiny_spec
from shell import BIN, Done, Shell, ended

from rlhf_api.errors import StoreError
from rlhf_api.names import ENV_ACCESS_KEY, ENV_SECRET_KEY, PLURAL
from rlhf_api.stage import StoreConfig
from rlhf_operator.cluster_options import ClusterOptions
from rlhf_operator.port_forward import forwarded
from rlhf_store.artifacts import Manifest, open_artifacts

pytestmark = pytest.mark.timeout(1500)

CHAIN_SECONDS = 900.0
NAME = "by-command"


@pytest.fixture(scope="module")
def shell(release: Release, calm: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A shell in the release's namespace, and the file of a run that has what comes before ppo from another."""
    folder = tmp_path_factory.mktemp("shell")
    config = yaml.safe_load(release.kubeconfig.read_text())
    config["contexts"][0]["context"]["namespace"] = release.namespace
    (folder / "kubeconfig").write_text(yaml.safe_dump(config))
    spec = tiny_spec(**LONGER | {"ppo": LONGER["ppo"] | {"klCoefficient": 0.17}})
    document = {"apiVersion": "rlhf.dev/v1alpha1", "kind": "RLHFRun", "metadata": {"name": NAME}}
    (folder / "run.yaml").write_text(yaml.safe_dump({**document, "spec": spec}))
    return Shell(folder, folder / "kubeconfig")


@pytest.fixture(scope="module")
def followed(shell: Shell) -> Iterator["subprocess.Popen[str]"]:
    """`rlhf run` of the run, as it follows."""
    process = shell.begin("rlhf", "run", "run.yaml", "--cluster")
    yield process
    process.kill()
    process.communicate()


@dataclass
class Followed:
    """What `rlhf logs --follow` did: what it wrote while its stage ran, and in all; `log` is what kubectl knows."""

    early: str
    done: Done
    written: str
    log: str


@pytest.fixture(scope="module")
def live(shell: Shell, release: Release, followed: "subprocess.Popen[str]") -> Followed:
    release.until(lambda: NAME in [run["metadata"]["name"] for run in release.objects.list(PLURAL)], SOON)
    pod = release.running_pod(NAME, "ppo", CHAIN_SECONDS)
    path = shell.folder / "ppo.log"
    with path.open("w") as out:
        following = shell.begin("rlhf", "logs", NAME, "--stage", "ppo", "--follow", "--cluster", out=out)
    release.until(lambda: "training" in path.read_text() or following.poll() is not None, CHAIN_SECONDS, path.read_text)
    early = path.read_text() if release.objects.get("pods", pod)["status"]["phase"] == "Running" else ""
    done = ended(following, CHAIN_SECONDS)
    return Followed(early, done, path.read_text(), release.kubectl("logs", pod).stdout)


@pytest.fixture(scope="module")
def finished(live: Followed, followed: "subprocess.Popen[str]") -> Done:
    """What `rlhf run` did."""
    return ended(followed, CHAIN_SECONDS)


def test_logs_of_a_running_pod_are_followed_to_its_end(live: Followed) -> None:
    assert (live.done.returncode, live.done.stderr) == (0, f"rlhf: {NAME}, ppo, attempt 1\n")
    assert "ppo: training, step" in live.early
    assert live.written == live.log


def test_run_sums_up_from_a_store_that_only_the_cluster_reaches(finished: Done) -> None:
    assert (finished.returncode, finished.stderr.count("\n")) == (0, 1), finished
    assert "8 held-out prompts" in finished.stdout
    assert "bag-of-words" in finished.stdout
    assert finished.stdout.splitlines()[-1] == f"Report: rlhf report {NAME} --cluster"


def test_report_and_generate_read_a_store_that_only_the_cluster_reaches(shell: Shell, finished: Done) -> None:
    report = shell.rlhf("report", NAME)
    assert (report.returncode, report.stdout) == (0, f"{NAME}-report.html\n"), report.stderr
    assert "<html" in (shell.folder / f"{NAME}-report.html").read_text()
    said = shell.rlhf("generate", NAME, "--prompt", "the film is", "--tokens", "4", "--json")
    assert said.returncode == 0, said.stderr
    [answer] = json.loads(said.stdout)
    assert answer["prompt"] == "the film is"
    assert {"reference", "policy"} <= answer.keys()


def test_a_forward_to_a_port_where_nobody_listens_says_what_kubectl_says(
    release: Release, shell: Shell, finished: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    selector = release.objects.get("services", release.store_name)["spec"]["selector"]
    spec = {"selector": selector, "ports": [{"port": 4321}]}
    document = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "deaf"}, "spec": spec}
    release.kubectl("create", "-f", "-", stdin=document)
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    options = ClusterOptions(namespace=release.namespace, kubeconfig=release.kubeconfig)
    keys = dict(zip((ENV_ACCESS_KEY, ENV_SECRET_KEY), release.credentials(), strict=True))

    def listed() -> list[Manifest]:
        with forwarded(options, "deaf", 4321) as address:
            store = StoreConfig(url="s3://rlhf/runs", endpoint=f"http://{address}")
            return list(open_artifacts(store, patience=2, environment=keys).list())

    with pytest.raises(StoreError, match=r"4321.*refused"):
        listed()
