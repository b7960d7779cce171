"""A run whose Jobs Kueue starts and stops: our cluster gets Kueue itself, with the queue of manifests/kueue."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kubectl import SOON
from release import Release, fresh_spec, given_reward

from rlhf_api.names import LABEL_QUEUE

pytestmark = pytest.mark.timeout(1500)

ROOT = Path(__file__).parents[2]
QUEUE = ROOT / "manifests" / "kueue" / "queue.yaml"
CHAIN_SECONDS = 900.0

Stop = Callable[[str], None]

STAGES = ("import-model", "import-prompts", "import-evaluation", "reward", "ppo", "evaluate")


@pytest.fixture(scope="module")
def stop(release: Release, request: pytest.FixtureRequest) -> Iterator[Stop]:
    """Sets the stop policy of a queue that takes the release's runs."""
    if request.config.getoption("--kubeconfig") is None:
        environment = {**os.environ, "KUBECONFIG": str(release.kubeconfig)}
        subprocess.run([ROOT / "hack" / "cluster" / "kueue.sh"], check=True, env=environment)
    elif release.kubectl("get", "crd", "clusterqueues.kueue.x-k8s.io", check=False).returncode:
        pytest.skip("this cluster has no Kueue")
    release.kubectl("label", "namespace", release.namespace, "rlhf.dev/kueue=yes")
    # Its webhooks may take a moment to be known.
    release.until(lambda: release.kubectl("apply", "-f", QUEUE, check=False).returncode == 0, SOON)
    yield lambda policy: change(release, policy)
    release.kubectl("delete", "rlhfrun", "queued")
    release.kubectl("delete", "-f", QUEUE, "--wait=false")


def change(release: Release, policy: str) -> None:
    release.kubectl("patch", "clusterqueue", "rlhf", "--type=merge", "-p", f'{{"spec": {{"stopPolicy": "{policy}"}}}}')


def queued(release: Release) -> bool:
    return release.condition("queued", "Progressing").get("reason") == "Queued"


def test_a_queue_holds_a_run_up_and_takes_its_place_away_and_nothing_is_tried_twice(
    release: Release, stop: Stop
) -> None:
    stop("Hold")
    spec = given_reward(fresh_spec("queued", ppo={"episodes": 128}), sft=False)
    release.apply("queued", spec, **{LABEL_QUEUE: "rlhf"})
    release.until(lambda: queued(release), SOON, lambda: release.words("queued"))
    assert release.jobs("queued"), "there is no Job that could wait"
    assert not release.pods("queued")

    stop("None")
    release.training_pod("queued", "ppo", CHAIN_SECONDS)
    stop("HoldAndDrain")
    release.until(lambda: queued(release) and not release.pods("queued", "ppo"), SOON, lambda: release.words("queued"))
    assert release.states("queued")["ppo"] == "Pending"

    stop("None")
    status = release.wait("queued", timeout=CHAIN_SECONDS)
    assert release.jobs("queued") == {stage: [1] for stage in STAGES}
    assert not any(stage.get("failure") for stage in status["stages"])
    workloads = release.kubectl("get", "workloads", "-o", "name").stdout.split()
    assert len(workloads) >= len(STAGES), workloads
