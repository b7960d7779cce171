"""Linters and the API server's own strict validation find nothing in what the chart renders and the manifests hold."""

import csv
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rendered_chart import BIN, CHART, ROOT, VALUES, helm, rendered

from rlhf_api.run import RLHFRun
from rlhf_operator.jobs import stage_job
from rlhf_operator.operator_settings import OperatorSettings
from rlhf_operator.stages import chain

MANIFESTS = sorted(path for path in (ROOT / "manifests").rglob("*.yaml") if path.name != "kustomization.yaml")
INSTALL = ROOT / "manifests" / "install" / "operator.yaml"
# Of CRDs that a bare cluster lacks.
FOREIGN = ("monitoring.coreos.com/", "kueue.x-k8s.io/")

# kube-score's checks that are left out, and why. All others hold, those that it calls optional too.
LEFT_OUT = {
    # One operator acts, by its Lease; a second one would only wait.
    "deployment-replicas",
    # Recreate: the old operator ends before the new one begins.
    "deployment-strategy",
    # It would ask the registry at each start; image.pullPolicy says so where that is wanted.
    "container-image-pull-policy",
    # A limit is a bound, a request what is kept free: no pod of the chart needs its limit all the time.
    "container-resource-requests-equal-limits",
    "container-cpu-requests-equal-limits",
    "container-memory-requests-equal-limits",
    # Roots are read-only and /tmp has a sizeLimit; a stage asks for disk, and its model may be of any size.
    "container-ephemeral-storage-request-and-limit",
    # Readiness steers nothing but scrapes; liveness asks the same question with more patience.
    "pod-probes-identical",
    # The store is one pod, which nobody asks for by a name of its own: its Service may have an address.
    "statefulset-has-servicename",
}
# Of the Jobs of stages alone: their image says which user, another image may need another one; runAsNonRoot holds.
LEFT_OUT_OF_STAGES = {"container-security-context-user-group-id"}
STAGES = OperatorSettings(
    image="rlhf-pipeline:1",
    resources={"requests": {"cpu": "1", "memory": "4Gi"}, "limits": {"memory": "8Gi"}},
)
STRICT = ("apply", "--dry-run=server", "--server-side", "--force-conflicts", "--validate=strict", "-f", "-")

Document = dict[str, Any]
Kubectl = Callable[..., "subprocess.CompletedProcess[str]"]


def leaves(values: Document, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of the chart that is no section, with its dotted path."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_helm_finds_no_fault(values: list[str]) -> None:
    done = helm("lint", "--strict", CHART, *[f"--set={value}" for value in values])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout


def test_every_switch_and_every_empty_value_is_tried() -> None:
    tried = {re.split(r"[=\[]", value)[0] for values in VALUES.values() for value in values}
    for path, value in leaves(yaml.safe_load((CHART / "values.yaml").read_text())):
        if isinstance(value, bool) or value in ("", {}, []):
            assert any(each == path or each.startswith(f"{path}.") for each in tried), path


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: str(path.relative_to(ROOT / "manifests")))
def test_the_api_server_validates_every_manifest(path: Path, own_kubectl: Kubectl) -> None:
    documents = [each for each in yaml.safe_load_all(path.read_text()) if each]
    known = [each for each in documents if not each["apiVersion"].startswith(FOREIGN)]
    for namespace in {each["metadata"].get("namespace", "default") for each in known}:
        own_kubectl("create", "namespace", namespace, check=False)
    done = own_kubectl(*STRICT, stdin=yaml.safe_dump_all(known), check=False) if known else None
    assert done is None or (done.returncode, done.stderr) == (0, "")
    assert known or documents[0]["apiVersion"].startswith("kueue.x-k8s.io/")


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_the_api_server_validates_every_object_of_the_chart(values: list[str], own_kubectl: Kubectl) -> None:
    namespace = f"lint-{uuid.uuid4().hex[:8]}"
    own_kubectl("create", "namespace", namespace)
    documents = [each for each in rendered(*values, namespace=namespace) if not each["apiVersion"].startswith(FOREIGN)]
    done = own_kubectl(*STRICT, stdin=yaml.safe_dump_all(documents), check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("serverside-applied (server dry run)") == len(documents)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_kube_score_finds_no_fault_in_the_chart_and_its_stages(values: list[str]) -> None:
    """But that the pods of a release without network policies, which somebody asked for, have none."""
    unguarded = {"pod-networkpolicy"} if "networkPolicy.enabled=false" in values else set()
    elsewhere = "watchNamespaces={default,kube-public}" in values
    jobs = [job for place in (("default", "kube-public") if elsewhere else ("rlhf",)) for job in stage_jobs(place)]
    assert findings([*rendered(*values), *jobs], LEFT_OUT | unguarded) == []


def test_kube_score_finds_no_fault_in_the_plain_install() -> None:
    documents = [each for each in yaml.safe_load_all(INSTALL.read_text()) if each]
    assert findings([*documents, *stage_jobs("rlhf-system")]) == []


def test_no_check_is_left_out_that_would_find_nothing() -> None:
    documents = [*rendered(), *stage_jobs("rlhf")]
    assert [check for check in sorted(LEFT_OUT) if not findings(documents, LEFT_OUT - {check})] == []


def test_kube_score_finds_faults_where_there_are_some() -> None:
    """Of the kinds that matter most here: who runs, with what rights, within which bounds, and who reaches whom."""
    container = {"name": "a", "image": "a:latest", "securityContext": {"privileged": True}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": {"containers": [container]}}
    found = "\n".join(findings([pod]))
    for words in ("privileged", "latest", "Memory limit", "NetworkPolicy", "writable root", "seccomp"):
        assert words.lower() in found.lower(), found


def stage_jobs(namespace: str) -> list[Document]:
    """The Jobs of every stage of a run in a namespace."""
    source = {"source": "file:///table.csv"}
    pairs = source | {"chosenColumn": "good", "rejectedColumn": "bad"}
    data = {"sft": source, "preferences": pairs, "prompts": source, "evaluation": source}
    metadata = {"name": "run", "namespace": namespace, "uid": "uid-1"}
    run = RLHFRun.model_validate({"metadata": metadata, "spec": {"model": {"source": "hf://a/b"}, "data": data}})
    jobs = [stage_job(run, link, 1, STAGES, asked_at=1000.0) for link in chain(run, {})]
    for job in jobs:
        job["metadata"]["annotations"]["kube-score/ignore"] = ",".join(LEFT_OUT_OF_STAGES)
    return jobs


def findings(documents: list[Document], left_out: set[str] = LEFT_OUT) -> list[str]:
    """What kube-score has against objects that are installed together, by each check but those."""
    program = shutil.which("kube-score", path=f"{BIN}:{os.environ['PATH']}")
    assert program, "there is no kube-score: build it with hack/cluster/tools.sh kube-score"
    checks = list(csv.reader(subprocess.run([program, "list"], text=True, capture_output=True).stdout.splitlines()))
    optional = {name for name, *_, kind in checks if kind == "optional"}
    assert left_out | LEFT_OUT_OF_STAGES <= {name for name, *_ in checks}
    options = [f"--ignore-test={check}" for check in left_out]
    options += [f"--enable-optional-test={check}" for check in optional - left_out]
    options += ["--ignore-container-cpu-limit"]  # it throttles where nobody else wants the CPU
    options += ["--kubernetes-version=v1.37", "--output-format=ci"]
    known = [
        each for each in documents if each["kind"] != "CustomResourceDefinition"
    ]  # long, and it has no check for it
    given = yaml.safe_dump_all(known)
    done = subprocess.run([program, "score", *options, "-"], input=given, text=True, capture_output=True)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("[OK]")], done.stderr
    return [line for line in lines if not line.startswith(("[OK]", "[SKIPPED]"))]
