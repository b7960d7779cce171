"""Installing, upgrading and removing, CRD and all, as the guide says, on a control plane that knows nothing of us."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from bare_plane import CRD, BarePlane, new_plane, until
from kubectl import BIN, SOON, Kubectl, kubectl_of
from rendered_chart import CHART, ROOT, helm, one, rendered

RELEASE = "rlhf"
RUN = {
    "apiVersion": "rlhf.dev/v1alpha1",
    "kind": "RLHFRun",
    "metadata": {"name": "early"},
    "spec": {
        "model": {"source": "hf://owner/model"},
        "data": {
            "preferences": {"source": "file:///pairs.csv", "chosenColumn": "good", "rejectedColumn": "bad"},
            "prompts": {"source": "file:///prompts.csv"},
        },
    },
}

Document = dict[str, Any]


@pytest.fixture(scope="module")
def plane(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BarePlane]:
    """A control plane of this file's own: a CRD is the whole cluster's."""
    if request.config.getoption("--kubeconfig") and not (BIN / "kube-apiserver").exists():
        pytest.skip("needs a control plane of its own, from `hack/cluster/tools.sh control-plane`")
    with new_plane(tmp_path_factory.mktemp("control-plane")) as plane:
        yield plane


@pytest.fixture
def kubectl(plane: BarePlane) -> Iterator[Kubectl]:
    """kubectl where there is no CRD of ours before, nor after."""
    kubectl = kubectl_of(plane.kubeconfig)
    yield kubectl
    kubectl("delete", "crd", CRD, "--ignore-not-found")


@pytest.fixture
def release(plane: BarePlane, kubectl: Kubectl, tmp_path: Path) -> Iterator["Chart"]:
    """The chart, and what its version before this one might have been."""
    chart = Chart(plane, tmp_path.name.replace("_", "-").lower()[:40])
    yield chart
    chart.helm("uninstall", RELEASE, "--ignore-not-found")


class Chart:
    """Releases in one namespace, whose pods nobody runs."""

    def __init__(self, plane: BarePlane, namespace: str) -> None:
        self._plane, self.namespace = plane, namespace

    def helm(self, *arguments: str | Path) -> None:
        """helm with its arguments; fails with what it said."""
        done = helm(*arguments, "--namespace", self.namespace, kubeconfig=self._plane.kubeconfig)
        assert done.returncode == 0, done.stderr

    def bring(self, chart: Path, *values: str) -> None:
        """Install a version of the chart, or upgrade to it. Without hooks: no node would run their pods."""
        sets = [f"--set={value}" for value in values]
        self.helm("upgrade", "--install", RELEASE, chart, "--create-namespace", "--no-hooks", *sets)


def older_chart(folder: Path) -> Path:
    """The chart whose CRD lacks two fields, one of which has a default."""
    shutil.copytree(CHART, folder / "chart")
    crd = one(rendered(), "CustomResourceDefinition")
    spec = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    del spec["properties"]["ttlSecondsAfterFinished"]
    assert spec["properties"]["ppo"]["properties"].pop("whitenRewards")["default"] is False
    (folder / "chart" / "templates" / "crd.yaml").write_text(yaml.safe_dump(crd))
    return folder / "chart"


def early(kubectl: Kubectl, namespace: str) -> Document:
    """The run."""
    found: Document = yaml.safe_load(kubectl("-n", namespace, "get", "rlhfrun", "early", "-o", "yaml").stdout)
    return found


def served(kubectl: Kubectl) -> None:
    kubectl("wait", "--for=condition=Established", f"crd/{CRD}", f"--timeout={SOON:.0f}s")
    until(lambda: kubectl("get", "rlhfruns", "-A", check=False).returncode == 0, SOON, "RLHFRuns are not served")


def test_an_upgrade_brings_the_fields_of_the_new_crd_and_keeps_the_runs(
    release: Chart, kubectl: Kubectl, tmp_path: Path
) -> None:
    def patched(spec: str) -> "subprocess.CompletedProcess[str]":
        return kubectl(
            "-n", release.namespace, "patch", "rlhfrun", "early", "--type=merge", "-p", f'{{"spec": {spec}}}',
            check=False,
        )  # fmt: skip

    release.bring(older_chart(tmp_path))
    served(kubectl)
    kubectl("-n", release.namespace, "apply", "--server-side", "-f", "-", stdin=RUN)
    before = early(kubectl, release.namespace)
    assert "whitenRewards" not in before["spec"]["ppo"]
    assert 'unknown field "spec.ttlSecondsAfterFinished"' in patched('{"ttlSecondsAfterFinished": 60}').stderr

    release.bring(CHART)
    until(lambda: "ttlSecondsAfterFinished" in kubectl("explain", "rlhfrun.spec").stdout, SOON, "an older CRD")
    after = early(kubectl, release.namespace)
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["spec"].pop("ppo") == {**before["spec"].pop("ppo"), "whitenRewards": False}
    assert after["spec"] == before["spec"]
    assert patched('{"ttlSecondsAfterFinished": 60}').stderr == ""
    assert patched('{"suspend": true}').stderr == ""
    assert early(kubectl, release.namespace)["spec"]["ttlSecondsAfterFinished"] == 60
    assert "cannot be changed" in patched('{"ppo": {"whitenRewards": true}}').stderr


def test_what_an_uninstall_leaves_the_next_install_takes_up(release: Chart, kubectl: Kubectl) -> None:
    release.bring(CHART)
    served(kubectl)
    kubectl("-n", release.namespace, "apply", "--server-side", "-f", "-", stdin=RUN)
    before = early(kubectl, release.namespace)
    release.helm("uninstall", RELEASE)
    assert early(kubectl, release.namespace)["metadata"]["uid"] == before["metadata"]["uid"]
    secrets = kubectl("-n", release.namespace, "get", "secrets", "-o", "name").stdout.split()
    assert secrets == ["secret/rlhf-rlhf-operator-object-store"]
    release.bring(CHART)
    assert early(kubectl, release.namespace)["metadata"]["uid"] == before["metadata"]["uid"]


def test_an_uninstall_takes_the_crd_along_where_it_shall(release: Chart, kubectl: Kubectl) -> None:
    release.bring(CHART, "crds.keep=false")
    served(kubectl)
    release.helm("uninstall", RELEASE)
    kubectl("wait", "--for=delete", f"crd/{CRD}", f"--timeout={SOON:.0f}s")


def test_the_plain_install_is_what_its_head_says(plane: BarePlane, kubectl: Kubectl) -> None:
    manifests = ROOT / "manifests"
    lines = (manifests / "kustomization.yaml").read_text().splitlines()
    commands = "\n".join(line.removeprefix("#   ") for line in lines if line.startswith("#   "))
    environment = os.environ | {"KUBECONFIG": str(plane.kubeconfig), "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euc", commands], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, ""), commands
    kubectl("apply", "--server-side", "-k", manifests)  # and again, as an upgrade would
    served(kubectl)

    def items(kind: str) -> list[Document]:
        found: list[Document] = yaml.safe_load(kubectl("-n", "rlhf-system", "get", kind, "-o", "yaml").stdout)["items"]
        return found

    def components() -> set[str]:
        return {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in items("pods")}

    def all_there() -> bool:
        return components() == {"operator", "object-store", "bucket"}

    until(all_there, SOON, lambda: f"pods of {components()}, {kubectl('-n', 'rlhf-system', 'get', 'events').stdout}")
    keys = {(each["metadata"]["name"], key) for each in items("secrets") for key in each["data"]}
    containers = [container for pod in items("pods") for container in pod["spec"]["containers"]]
    sources = [entry.get("valueFrom", {}) for container in containers for entry in container["env"]]
    asked = {(each["secretKeyRef"]["name"], each["secretKeyRef"]["key"]) for each in sources if "secretKeyRef" in each}
    assert asked == keys
    kubectl("-n", "rlhf-system", "apply", "-f", manifests / "examples" / "positive-reviews.yaml")
    kubectl("delete", "namespace", "rlhf-system", "--wait=false")
