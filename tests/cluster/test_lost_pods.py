"""Pods, the store and a node that go away change nothing of what a run comes to: the bytes are the same."""

import json
import time

import pytest
from calm import CHAIN_SECONDS, LONGER, again
from kubectl import SOON
from release import Release, fresh_spec, tiny_spec

pytestmark = pytest.mark.timeout(1800)

TRAINED = ("sft", "reward", "ppo")


def test_pods_and_the_store_may_go_away(release: Release, expected: dict[str, str]) -> None:
    release.apply("lost", fresh_spec("lost", **LONGER))
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


def test_a_pod_that_the_kubelet_evicts_is_made_again(release: Release, expected: dict[str, str]) -> None:
    # The kubelet measures volumes once a minute: the stage has to last, and not to diverge meanwhile.
    lasting = {"episodes": 100_000, "learningRate": 1e-6}
    small = {"spec": {"volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}}]}}
    release.apply("evicted", tiny_spec(**LONGER | {"ppo": lasting}, placement={"podTemplate": small}))
    try:
        pod = release.training_pod("evicted", "ppo", CHAIN_SECONDS)
        too_much = "open('/tmp/too-much', 'wb').write(bytes(128 << 20))"
        release.kubectl("exec", pod, "--", "python", "-c", too_much, check=False)  # it may be killed with the pod
        release.until(lambda: release.jobs("evicted")["ppo"] == [1, 2], SOON, lambda: release.words("evicted"))
        assert release.objects.get("pods", pod)["status"]["reason"] == "Evicted"
        release.training_pod("evicted", "ppo")
        [retrying] = release.objects.list("events", fields="involvedObject.name=evicted,reason=Retrying")
        assert "the pod was evicted" in retrying["message"]
    finally:
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
