"""Under the Pod Security level "restricted", enforced by a real API server, every pod of ours is admitted.

One that a run's own pod template makes worse is not, and the run says so.
"""

import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bare_plane import BarePlane, OperatorProcess, api_of, until
from between import Between
from kubectl import SOON
from rendered_chart import VALUES, pod_specs, rendered

from rlhf_api.names import API_VERSION, GROUP, KIND, PLURAL, STAGE_CONTAINER, VERSION
from rlhf_api.run import RLHFRun
from rlhf_operator.jobs import stage_job
from rlhf_operator.operator_settings import OperatorSettings
from rlhf_operator.stages import chain

pytestmark = pytest.mark.timeout(900)

SETTINGS = OperatorSettings(
    image="rlhf-pipeline:1",
    image_pull_secrets=("pull",),
    resources={"requests": {"cpu": "1", "memory": "4Gi"}, "limits": {"memory": "8Gi"}},
    gpu_resources={"limits": {"memory": "32Gi"}},
)
SPEC: dict[str, Any] = {
    "model": {"source": "hf://owner/model"},
    "data": {
        "sft": {"source": "file:///texts.csv"},
        "preferences": {"source": "file:///pairs.csv", "chosenColumn": "good", "rejectedColumn": "bad"},
        "prompts": {"source": "file:///prompts.csv"},
        "evaluation": {"source": "file:///labelled.csv"},
    },
}
TEMPLATE = {
    "metadata": {"annotations": {"note": "x"}},
    "spec": {
        "runtimeClassName": None,
        "affinity": {"nodeAffinity": {}},
        "volumes": [{"name": "cache", "persistentVolumeClaim": {"claimName": "cache"}}],
        "containers": [
            {
                "name": STAGE_CONTAINER,
                "env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}],
                "volumeMounts": [{"name": "cache", "mountPath": "/cache"}],
            }
        ],
    },
}
OWN = {"ppo": {"spec": {"terminationGracePeriodSeconds": 600, "tolerations": [{"key": "spot", "operator": "Exists"}]}}}
RUNS: dict[str, dict[str, Any]] = {
    "cpu": {"gpu": {"count": 0}},
    "gpu": {"gpu": {"count": 1}},
    "pod-template": {"placement": {"podTemplate": TEMPLATE}},
    "stage-pod-templates": {"placement": {"podTemplate": TEMPLATE, "stagePodTemplates": OWN}},
    "other-store": {"objectStore": {"bucket": "mine", "credentialsSecret": "mine"}},
}
PRIVILEGED = {"privileged": True, "allowPrivilegeEscalation": None}
MOST_WRITES = 10
MOST_LOOKS = 40  # at a run within its first minute: one for each of its news, and a few by the clock

Document = dict[str, Any]
Kubectl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def restricted(own_kubectl: Kubectl) -> Iterator[str]:
    """A namespace that takes no pod but restricted ones."""
    name = f"restricted-{uuid.uuid4().hex[:8]}"
    own_kubectl("create", "namespace", name)
    own_kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    yield name
    own_kubectl("delete", "namespace", name, "--wait=false")


def stage_templates(changes: Document) -> dict[str, Document]:
    """Stage -> the pod template of its Job."""
    metadata = {"name": "run", "namespace": "team", "uid": "uid-1"}
    run = RLHFRun.model_validate({"metadata": metadata, "spec": SPEC | changes})
    jobs = {link.name: stage_job(run, link, 1, SETTINGS, asked_at=1000.0) for link in chain(run, {})}
    return {stage: job["spec"]["template"] for stage, job in jobs.items()}


def chart_templates(values: list[str]) -> dict[str, Document]:
    """Name -> metadata and spec of each pod that the chart makes or lets be made, hooks and tests included."""
    documents = rendered(*values)
    claims = [claim for each in documents for claim in each.get("spec", {}).get("volumeClaimTemplates", [])]
    names = [claim["metadata"]["name"] for claim in claims]
    claimed = [{"name": name, "persistentVolumeClaim": {"claimName": name}} for name in names]
    return {
        name: {"metadata": {}, "spec": spec | {"volumes": [*spec.get("volumes", []), *claimed]}}
        for name, spec in pod_specs(documents)
    }


def admitted(kubectl: Kubectl, namespace: str, templates: dict[str, Document]) -> "subprocess.CompletedProcess[str]":
    """What a server-side dry run of a pod from each template says."""
    # A priority class and a service account would have to exist, which has nothing to do with the level.
    elsewhere = ("priorityClassName", "serviceAccountName")
    pods = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": template["metadata"] | {"name": name, "namespace": namespace},
            "spec": {field: value for field, value in template["spec"].items() if field not in elsewhere},
        }
        for name, template in templates.items()
    ]
    dry = ("create", "--dry-run=server", "--validate=strict", "-f", "-")
    return kubectl(*dry, stdin={"apiVersion": "v1", "kind": "List", "items": pods}, check=False)


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_every_stage_is_admitted(own_kubectl: Kubectl, restricted: str, changes: Document) -> None:
    templates = stage_templates(changes)
    assert len(templates) == 10
    done = admitted(own_kubectl, restricted, templates)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("created (server dry run)") == len(templates)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_every_pod_of_the_chart_is_admitted(own_kubectl: Kubectl, restricted: str, values: list[str]) -> None:
    templates = chart_templates(values)
    done = admitted(own_kubectl, restricted, templates)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("created (server dry run)") == len(templates) >= 3


@pytest.mark.parametrize(
    "templates",
    [*map(stage_templates, RUNS.values()), *map(chart_templates, VALUES.values())],
    ids=[*(f"run-{name}" for name in RUNS), *(f"chart-{name}" for name in VALUES)],
)
def test_every_pod_is_confined_beyond_what_the_level_asks(templates: dict[str, Document]) -> None:
    """A read-only root, no account's token but the operator's, no addresses of Services in the environment."""
    for name, template in templates.items():
        spec = template["spec"]
        is_operator = [each for each in spec["containers"] if each["name"] == "operator" and "livenessProbe" in each]
        assert spec["automountServiceAccountToken"] == bool(is_operator), name
        assert spec["enableServiceLinks"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        assert not [volume for volume in spec.get("volumes", []) if "hostPath" in volume], name
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True, name
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name
            assert "privileged" not in security, name


def test_a_template_that_the_level_forbids_is_said_in_the_runs_conditions(
    own_plane: BarePlane, restricted: str, tmp_path: Path
) -> None:
    """Where the run waits, and the operator with it, until it is suspended, mended and resumed."""
    api = api_of(own_plane.kubeconfig)
    (tmp_path / "store").mkdir()
    spec = {
        "model": {"source": "hf://owner/model"},
        "data": {"prompts": {"source": "hf://datasets/owner/prompts"}},
        "reward": {"function": "module:callable"},
        "placement": {
            "podTemplate": {
                "spec": {
                    "schedulerName": "nobody",
                    "containers": [{"name": STAGE_CONTAINER, "securityContext": PRIVILEGED}],
                }
            }
        },
    }
    runs = f"/apis/{GROUP}/{VERSION}/namespaces/{restricted}/{PLURAL}"
    api.request("POST", runs, {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "bad"}, "spec": spec})

    def condition() -> tuple[str, str]:
        status = api.request("GET", f"{runs}/bad").get("status", {})
        found = [each for each in status.get("conditions", []) if each["type"] == "Progressing"]
        return (found[0]["reason"], found[0]["message"]) if found else ("", "")

    def pods() -> list[str]:
        found = api.request("GET", f"/api/v1/namespaces/{restricted}/pods")["items"]
        return [str(pod["metadata"]["labels"]["rlhf.dev/stage"]) for pod in found]

    with Between(own_plane.kubeconfig, tmp_path / "kubeconfig") as between:
        operator = OperatorProcess(tmp_path / "kubeconfig", tmp_path / "store", tmp_path / "log", [restricted])
        operator.start()
        try:
            until(lambda: condition()[0] == "NoPod", SOON, lambda: f"{condition()}\n{operator.last_lines()}")
            _, message = condition()
            assert message.startswith("import-model: the Job bad--import-model-1 has no pod")
            assert "Pod Security" in message
            assert operator.runs
            assert len([write for write in between.writes if "/jobs" in write]) == 1, between.writes
            assert len(between.writes) <= MOST_WRITES, between.writes
            assert _looks(operator) <= MOST_LOOKS
            api.request("PATCH", f"{runs}/bad", {"spec": {"suspend": True}})
            until(lambda: condition()[0] == "Suspended", SOON, lambda: f"{condition()}\n{operator.last_lines()}")
            mended = {"spec": {"schedulerName": "nobody", "containers": None}}
            api.request("PATCH", f"{runs}/bad", {"spec": {"placement": {"podTemplate": mended}}})
            api.request("PATCH", f"{runs}/bad", {"spec": {"suspend": False}})
            until(lambda: "import-model" in pods(), SOON, lambda: f"{condition()}\n{operator.last_lines()}")
        finally:
            operator.kill()


def _looks(operator: OperatorProcess) -> int:
    """How often the operator has looked at a run."""
    lines = [
        line for line in operator.metrics().splitlines() if line.startswith("rlhf_operator_reconcile_seconds_count")
    ]
    return int(float(lines[0].split()[1]))
