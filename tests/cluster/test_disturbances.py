"""What goes wrong in a cluster changes nothing of what a run comes to: the bytes are those of the undisturbed one."""

import json
import random
import time
from typing import Any

import pytest
from kubectl import SOON
from release import BUCKET, PREFIX, STAGES, Release, tiny_spec

pytestmark = pytest.mark.timeout(1800)

CHAIN_SECONDS = 900.0
LEADS_AGAIN_SECONDS = 20.0  # what is left of the Lease, 15 s, and a start
TRAINED = ("sft", "reward", "ppo")
MAIN_STAGES = ("import-model", "sft", "merge", "reward", "ppo", "evaluate")
LONGER: dict[str, Any] = {
    "sft": {"steps": 60},
    "reward": {"steps": 60},
    "ppo": {"episodes": 128},
}  # time to break things


@pytest.fixture(scope="module")
def expected(release: Release) -> dict[str, str]:
    """Kind -> content digest of a run that nothing disturbed."""
    release.apply("calm", tiny_spec(**LONGER))
    release.wait("calm", timeout=CHAIN_SECONDS)
    return release.contents("calm")


def elsewhere(prefix: str) -> Any:
    """The same chain with a store prefix of its own, so that nothing is there to reuse."""
    return tiny_spec(objectStore={"bucket": BUCKET, "prefix": f"{PREFIX}/{prefix}"}, **LONGER)


def again(release: Release, name: str, *stages: str) -> None:
    """Apply the run of `expected` under a name of its own, with these stages and the evaluation to make again."""
    release.forget("calm", *stages, "evaluate")
    release.apply(name, tiny_spec(**LONGER))


def test_the_operator_may_die_at_any_moment(release: Release, expected: dict[str, str]) -> None:
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    release.apply("killed", elsewhere("killed"))
    kills = 0

    def ended() -> bool:
        nonlocal kills
        if release.status("killed").get("phase") in ("Succeeded", "Failed"):
            return True
        kills += release.kill_operator()
        time.sleep(moments.uniform(2, LEADS_AGAIN_SECONDS + 25))
        return False

    release.until(ended, CHAIN_SECONDS, lambda: release.words("killed"))
    print(f"seed {seed}: the operator was killed {kills} times")
    assert kills >= 3
    assert release.status("killed")["phase"] == "Succeeded", release.words("killed")
    assert release.jobs("killed") == {stage: [1] for stage in STAGES}
    assert release.contents("killed") == expected


def test_pods_and_the_store_may_go_away(release: Release, expected: dict[str, str]) -> None:
    release.apply("lost", elsewhere("lost"))
    # The store goes while the first stage runs, and comes back.
    release.running_pod("lost", "import-model")
    release.kubectl("scale", f"statefulset/{release.store_name}", "--replicas=0")
    release.kubectl(
        "wait", "--for=delete", "pod", "-l", "app.kubernetes.io/component=object-store", f"--timeout={SOON:.0f}s"
    )
    time.sleep(20)
    release.kubectl("scale", f"statefulset/{release.store_name}", "--replicas=1")
    # A pod deleted while it trains,
    release.kubectl("delete", "pod", release.training_pod("lost", "sft", CHAIN_SECONDS), "--wait=false")
    # one evicted,
    pod = release.training_pod("lost", "reward", CHAIN_SECONDS)
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": pod, "namespace": release.namespace},
    }
    release.kubectl(
        "create", "--raw", f"/api/v1/namespaces/{release.namespace}/pods/{pod}/eviction", "-f", "-",
        stdin=json.dumps(eviction),
    )  # fmt: skip
    # one that vanishes at once, with the store's server killed beside it.
    pod = release.training_pod("lost", "ppo", CHAIN_SECONDS)
    release.kubectl("delete", "pod", pod, "--grace-period=0", "--force")
    release.kubectl("delete", "pod", "-l", "app.kubernetes.io/component=object-store", "--grace-period=0", "--force")
    release.wait("lost", timeout=CHAIN_SECONDS)
    jobs = release.jobs("lost")
    assert {stage: len(jobs[stage]) >= 2 for stage in TRAINED} == dict.fromkeys(TRAINED, True), jobs
    assert release.contents("lost") == expected


def test_the_api_server_may_be_killed_while_stages_run(release: Release, expected: dict[str, str]) -> None:
    again(release, "restarted", "ppo")
    [server] = [
        node["metadata"]["name"] for node in release.objects.list("nodes", "node-role.kubernetes.io/control-plane")
    ]
    for stage in ("ppo", "evaluate"):
        release.running_pod("restarted", stage, CHAIN_SECONDS)
        release.on_node(server, "pkill", "-KILL", "kube-apiserver")
    release.wait("restarted", timeout=CHAIN_SECONDS)
    assert release.jobs("restarted") == {"ppo": [1], "evaluate": [1]}
    assert release.contents("restarted") == expected


def test_a_pod_that_the_kubelet_evicts_is_made_again(release: Release, expected: dict[str, str]) -> None:
    # The kubelet measures volumes once a minute: the stage has to last, and not to diverge meanwhile.
    lasting = {"episodes": 100_000, "learningRate": 1e-6}
    small = {"spec": {"volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}}]}}
    release.apply("evicted", tiny_spec(**LONGER | {"ppo": lasting}, placement={"podTemplate": small}))
    pod = release.training_pod("evicted", "ppo", CHAIN_SECONDS)
    release.kubectl("exec", pod, "--", "python", "-c", "open('/tmp/too-much', 'wb').write(bytes(128 << 20))")
    release.until(lambda: release.jobs("evicted")["ppo"] == [1, 2], SOON, lambda: release.words("evicted"))
    assert release.objects.get("pods", pod)["status"]["reason"] == "Evicted"
    release.training_pod("evicted", "ppo")
    [retrying] = release.objects.list("events", fields="involvedObject.name=evicted,reason=Retrying")
    assert "the pod was evicted" in retrying["message"]
    release.kubectl("delete", "rlhfrun", "evicted")


def test_a_node_may_be_lost_and_found(release: Release, expected: dict[str, str]) -> None:
    again(release, "cut-off", "ppo")
    pod = release.training_pod("cut-off", "ppo", CHAIN_SECONDS)
    found = release.objects.get("pods", pod)
    node = found["spec"]["nodeName"]
    release.on_node(node, "systemctl", "stop", "kubelet")
    try:
        # The node goes silent, and what ran there dies unseen.
        assert release.kill_container(found)
        release.until(lambda: release.node_condition(node) == "Unknown", SOON)
        assert release.status("cut-off")["phase"] == "Running"
        assert release.jobs("cut-off")["ppo"] == [1]
    finally:
        release.on_node(node, "systemctl", "start", "kubelet")
    release.until(lambda: release.node_condition(node) == "True", SOON)
    release.wait("cut-off", timeout=CHAIN_SECONDS)
    assert release.jobs("cut-off") == {"ppo": [1, 2], "evaluate": [1]}
    assert release.contents("cut-off") == expected


def test_suspended_and_deleted_in_every_stage(release: Release, expected: dict[str, str]) -> None:
    spec = elsewhere("paused")

    def phase() -> str:
        return str(release.status("paused").get("phase"))

    def at_work() -> list[str]:
        pods = release.pods("paused")
        return [pod["metadata"]["name"] for pod in pods if pod["status"]["phase"] in ("Pending", "Running")]

    def delete() -> None:
        release.kubectl("delete", "rlhfrun", "paused", f"--timeout={SOON:.0f}s")
        release.until(lambda: not release.pods("paused") and not release.jobs("paused"), SOON)

    def start(stage: str) -> None:
        """Apply the run, and wait until the stage runs."""
        while True:
            release.apply("paused", spec)
            release.until(lambda: release.states("paused").get(stage, "Waiting") != "Waiting", CHAIN_SECONDS)
            states = release.states("paused")
            if states[stage] not in ("Reused", "Succeeded"):
                release.running_pod("paused", stage)
                return
            # A process that is just being started hears no SIGTERM: stopped there, it may have come to its end.
            later = MAIN_STAGES[MAIN_STAGES.index(stage) :]
            release.forget("paused", *(name for name in later if states[name] in ("Reused", "Succeeded")))
            delete()

    for stage in MAIN_STAGES:
        start(stage)
        release.patch("paused", {"suspend": True})
        # A stage that ends before it hears of it has ended; if it was the last one, so has the run.
        ended = release.until(
            lambda: (now := phase()) in ("Suspended", "Succeeded") and now, SOON, lambda: release.words("paused")
        )
        assert not at_work()
        release.patch("paused", {"suspend": False})
        if ended == "Suspended":
            release.until(lambda: at_work() or phase() == "Succeeded", SOON, lambda: release.words("paused"))
        delete()
    release.apply("paused", spec)
    release.wait("paused", timeout=CHAIN_SECONDS)
    assert release.contents("paused") == expected


def test_an_upgrade_of_the_chart_in_the_middle_of_a_run(release: Release, expected: dict[str, str]) -> None:
    again(release, "upgraded", "ppo")
    release.running_pod("upgraded", "ppo")
    before = release.operator_pod()
    release.install("operator.workers=3")
    assert release.operator_pod() != before
    release.wait("upgraded", timeout=CHAIN_SECONDS)
    assert release.jobs("upgraded") == {"ppo": [1], "evaluate": [1]}
    assert release.contents("upgraded") == expected
