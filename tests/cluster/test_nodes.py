"""The cluster does for pods what a stage needs of it: the labelled node, a GPU to count, a name service, limits."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BIN = ROOT / ".cache" / "cluster" / "bin"
IMAGE = "localhost/kubectl:test"
SELECTOR = {"rlhf.dev/gpu-memory": "24Gi"}
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
IN_A_POD = {  # as a pod's own account, but by the server's name, which the cluster's name service has to know
    "apiVersion": "v1",
    "kind": "Config",
    "current-context": "pod",
    "contexts": [{"name": "pod", "context": {"cluster": "pod", "user": "pod"}}],
    "users": [{"name": "pod", "user": {"tokenFile": f"{ACCOUNT}/token"}}],
    "clusters": [
        {
            "name": "pod",
            "cluster": {"server": "https://kubernetes.default.svc", "certificate-authority": f"{ACCOUNT}/ca.crt"},
        }
    ],
}

Kubectl = Callable[..., Any]


@pytest.fixture(scope="module")
def image(load_image: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image on every node that holds kubectl and nothing else."""
    folder = tmp_path_factory.mktemp("image")
    (folder / "files").mkdir()
    kubectl = shutil.which("kubectl", path=f"{BIN}:/usr/local/bin:/usr/bin")
    assert kubectl
    shutil.copy(kubectl, folder / "files" / "kubectl")
    (folder / "files" / "kubeconfig").write_text(yaml.safe_dump(IN_A_POD))
    script = ROOT / "hack" / "cluster" / "node" / "image_archive.py"
    subprocess.run(
        [sys.executable, script, folder / "image.tar", IMAGE, folder / "files", "/kubectl", "--kubeconfig=/kubeconfig"],
        check=True,
    )
    load_image(folder / "image.tar")
    return IMAGE


def job(image: str, *arguments: str, **pod: Any) -> dict[str, Any]:
    """A Job of one pod under the restricted Pod Security level that runs kubectl with `arguments`."""
    container = {
        "name": "kubectl",
        "image": image,
        "imagePullPolicy": "Never",
        "args": list(arguments),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "resources": pod.pop("resources", {}),
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "smoke"},
        "spec": {
            "backoffLimit": 0,
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    "securityContext": {
                        "runAsNonRoot": True,
                        "runAsUser": 65532,
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                    "containers": [container],
                    **pod,
                }
            },
        },
    }


def only_pod(kubectl: Kubectl, namespace: str) -> dict[str, Any]:
    """The pod of the namespace's Job."""
    pods: list[dict[str, Any]] = json.loads(kubectl("get", "pods", "-n", namespace, "-o", "json").stdout)["items"]
    assert len(pods) == 1
    return pods[0]


def test_every_node_is_ready(cluster_kubectl: Kubectl) -> None:
    nodes = json.loads(cluster_kubectl("get", "nodes", "-o", "json").stdout)["items"]
    assert len(nodes) >= 2
    for node in nodes:
        ready = [each["status"] for each in node["status"]["conditions"] if each["type"] == "Ready"]
        assert ready == ["True"], node["metadata"]["name"]


def test_a_pod_that_asks_for_a_gpu_runs_on_the_labelled_node_and_reaches_the_api_by_name(
    cluster_kubectl: Kubectl, cluster_namespace: str, image: str
) -> None:
    cluster_kubectl("label", "namespace", cluster_namespace, *(f"{key}={value}" for key, value in RESTRICTED.items()))
    document = job(
        image,
        "get",
        "--raw=/readyz",
        nodeSelector=SELECTOR,
        resources={"limits": {"nvidia.com/gpu": 1, "memory": "256Mi"}},
    )
    cluster_kubectl("apply", "-n", cluster_namespace, "-f", "-", stdin=document)
    done = cluster_kubectl(
        "wait", "--for=condition=Complete", "job/smoke", "-n", cluster_namespace, "--timeout=300s", check=False
    )
    pod = only_pod(cluster_kubectl, cluster_namespace)
    assert done.returncode == 0, yaml.safe_dump(pod["status"])
    assert cluster_kubectl("logs", "job/smoke", "-n", cluster_namespace).stdout == "ok"
    labels = json.loads(cluster_kubectl("get", "node", pod["spec"]["nodeName"], "-o", "json").stdout)["metadata"]
    assert SELECTOR.items() <= labels["labels"].items()


def test_a_pod_that_asks_for_more_gpus_than_there_are_is_unschedulable(
    cluster_kubectl: Kubectl, cluster_namespace: str, image: str
) -> None:
    document = job(image, "version", resources={"limits": {"nvidia.com/gpu": 64}})
    cluster_kubectl("apply", "-n", cluster_namespace, "-f", "-", stdin=document)
    there = "--for=jsonpath={.status.active}=1"
    cluster_kubectl("wait", there, "job/smoke", "-n", cluster_namespace, "--timeout=300s")
    cluster_kubectl(
        "wait", "--for=condition=PodScheduled=False", "pod", "-l", "job-name=smoke", "-n", cluster_namespace,
        "--timeout=300s",
    )  # fmt: skip
    conditions = only_pod(cluster_kubectl, cluster_namespace)["status"]["conditions"]
    assert "Insufficient nvidia.com/gpu" in conditions[0]["message"]


def test_a_container_over_its_memory_limit_is_killed_for_memory(
    cluster_kubectl: Kubectl, cluster_namespace: str, image: str
) -> None:
    # kubectl alone needs more than this to start.
    document = job(image, "version", "--client", resources={"limits": {"memory": "8Mi"}})
    reason = ""
    for _ in range(3):  # a busy runtime now and then misses what tells this kill from another
        cluster_kubectl("apply", "-n", cluster_namespace, "-f", "-", stdin=document)
        cluster_kubectl("wait", "--for=condition=Failed", "job/smoke", "-n", cluster_namespace, "--timeout=300s")
        state = only_pod(cluster_kubectl, cluster_namespace)["status"]["containerStatuses"][0]["state"]
        reason = state["terminated"]["reason"]
        if reason == "OOMKilled":
            break
        cluster_kubectl("delete", "job", "smoke", "-n", cluster_namespace, "--cascade=foreground")
    assert reason == "OOMKilled"
