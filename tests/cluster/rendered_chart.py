"""The chart's objects for several sets of values, as `helm template` renders them."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
BIN = ROOT / ".cache" / "cluster" / "bin"
CHART = ROOT / "charts" / "rlhf-operator"
KUBERNETES = "--kube-version=1.37.2"  # a helm that was built here knows none of its own
DIGEST = f"sha256:{'0' * 64}"
APART = "podAntiAffinity.requiredDuringSchedulingIgnoredDuringExecution[0]"
AFFINITY = (f"{APART}.topologyKey=kubernetes.io/hostname", f"{APART}.labelSelector.matchLabels.team=ml")
EXTERNAL = ["minio.enabled=false", "objectStore.endpoint=https://s3.example.com", "objectStore.existingSecret=mine"]
VALUES = {
    "defaults": [],
    "external": EXTERNAL,
    "aws": ["minio.enabled=false", "objectStore.accessKey=a", "objectStore.secretKey=b", "objectStore.region=x",
            "networkPolicy.allowHub=false", "crds.keep=false", "rbac.aggregate=false",
            f"pipelineImage.digest={DIGEST}"],
    "cluster-wide": ["watchNamespaces={*}", "minio.existingSecret=root"],
    "other-namespaces": ["watchNamespaces={default,kube-public}", "minio.users[0].secret=team",
                         "minio.users[0].prefix=team"],
    "everything": [
        "metrics.serviceMonitor.enabled=true",
        "metrics.serviceMonitor.labels.team=ml",
        "metrics.podMonitor.enabled=true",
        "metrics.podMonitor.labels.team=ml",
        "metrics.dashboard.enabled=true",
        "networkPolicy.metricsNamespace=monitoring",
        "networkPolicy.extraStageEgress[0].ports[0].port=5000",
        "image.tag=v1.2",
        "pipelineImage.tag=0.1.0",
        "minio.image.tag=v3",
        f"minio.image.digest={DIGEST}",
        f"image.digest={DIGEST}",
        "imagePullSecrets={a,b}",
        "imageRegistry=registry.example.com/ml/",
        "stage.resources.requests.cpu=1",
        "stage.gpuResources.limits.memory=64Gi",
        "stage.priorityClassName=low",
        "operator.priorityClassName=high",
        "operator.nodeSelector.pool=small",
        "operator.tolerations[0].operator=Exists",
        *(f"operator.affinity.{each}" for each in AFFINITY),
        "operator.podLabels.team=ml",
        "operator.podAnnotations.note=x",
        "operator.verbose=true",
        "operator.extraEnv[0].name=A",
        "operator.extraEnv[0].value=b",
        "minio.persistence.storageClass=fast",
        "minio.nodeSelector.pool=disks",
        "minio.tolerations[0].operator=Exists",
        *(f"minio.affinity.{each}" for each in AFFINITY),
        "serviceAccount.annotations.team=ml",
        "nameOverride=operator",
        "fullnameOverride=rlhf",
    ],
    "bare": ["networkPolicy.enabled=false", "rbac.create=false", "minio.persistence.enabled=false",
             "serviceAccount.create=false", "serviceAccount.name=mine", "objectStore.createBucket=false",
             "crds.install=false"],
}  # fmt: skip

Document = dict[str, Any]


def helm(*arguments: str | Path, kubeconfig: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """helm with its arguments. Fails, saying how to get it, where there is none."""
    program = shutil.which("helm", path=f"{BIN}:{os.environ['PATH']}")
    assert program, "there is no helm: build it with hack/cluster/tools.sh helm"
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig or "/dev/null")}
    return subprocess.run([program, *arguments], text=True, capture_output=True, env=environment)


def rendered(*values: str, namespace: str = "rlhf") -> list[Document]:
    """The chart's objects."""
    done = helm(
        "template", "rlhf", CHART, KUBERNETES, "--namespace", namespace, *[f"--set={value}" for value in values]
    )
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def one(documents: list[Document], kind: str, name: str | None = None) -> Document:
    """The only object of a kind, or of a kind and name."""
    [found] = [d for d in documents if d["kind"] == kind and name in (None, d["metadata"]["name"])]
    return found


def pod_specs(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """Name and spec of each pod, or of each pod that an object makes."""
    for each in documents:
        if each["kind"] == "Pod":
            yield each["metadata"]["name"], each["spec"]
        elif "template" in each.get("spec", {}):
            yield each["metadata"]["name"], each["spec"]["template"]["spec"]
