"""What the chart's network policies let through, tried by pods that connect, on a cluster that enforces policies."""

import json
from typing import Any

import pytest
from kubectl import SOON
from release import Release

pytestmark = pytest.mark.timeout(600)

OPERATOR = "app.kubernetes.io/component=operator"
STAGE = {"app.kubernetes.io/name": "rlhf-operator", "app.kubernetes.io/component": "stage", "rlhf.dev/stage": "ppo"}
IMPORT = {**STAGE, "rlhf.dev/stage": "import-model"}
STRANGER = {"app": "stranger"}
METRICS = 9090  # of a stage
ROUNDS = 4

# A policy holds for a pod soon after it has an address, so what counts is the last of some rounds. Answers and refusals
# come at once; a policy that drops instead of refusing takes the whole timeout.
PROBE = """
import http.server, json, socket, sys, threading, time
server = http.server.HTTPServer(("", int(sys.argv[1])), http.server.BaseHTTPRequestHandler)
threading.Thread(target=server.serve_forever).start()
def connects(target):
    try:
        socket.create_connection(target, timeout=3).close()
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return ""
for _ in range(int(sys.argv[2])):
    time.sleep(2)
    print(json.dumps({name: connects(target) for name, *target in json.loads(sys.argv[3])}), flush=True)
time.sleep(600)
"""


class Prober:
    """Pods of the operator's image, which serve on one port and connect to others."""

    def __init__(self, release: Release) -> None:
        self._release = release

    def start(self, name: str, labels: dict[str, str], *targets: tuple[str, str, int]) -> str:
        """A pod that tries each (name, host, port). Returns its address."""
        container = {
            "name": "probe",
            "image": self._release.images["operator"],
            "imagePullPolicy": "IfNotPresent",
            "command": ["python", "-c", PROBE, str(METRICS), str(ROUNDS), json.dumps(targets)],
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
        }
        document = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "automountServiceAccountToken": False,
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": 65532,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "terminationGracePeriodSeconds": 0,
                "containers": [container],
            },
        }
        self._release.kubectl("apply", "-f", "-", stdin=document)
        return str(self._release.until(lambda: self._release.objects.get("pods", name)["status"].get("podIP"), SOON))

    def said(self, name: str) -> dict[str, str]:
        """Target -> why the pod does not reach it, "" where it does: its last round."""

        def rounds() -> list[str]:
            return self._release.kubectl("logs", name, check=False).stdout.splitlines()

        self._release.until(lambda: len(rounds()) == ROUNDS, SOON)
        found: dict[str, str] = json.loads(rounds()[-1])
        return found


@pytest.fixture(scope="module")
def reached(release: Release) -> Any:
    """Pod -> what it reaches."""
    prober = Prober(release)
    (operator,) = (pod for pod in release.objects.list("pods", OPERATOR, "status.phase=Running"))
    stage, stranger = prober.start("probe-stage-listens", STAGE), prober.start("probe-stranger-listens", STRANGER)
    targets = (
        ("the store", release.store_name, 9000),
        ("the API server", "kubernetes.default.svc", 443),
        ("the operator", operator["status"]["podIP"], 9091),
        ("a stage's metrics", stage, METRICS),
        ("a stranger", stranger, METRICS),
    )
    pods = {"probe-stage": STAGE, "probe-import": IMPORT, "probe-stranger": STRANGER}
    for name, labels in pods.items():
        prober.start(name, labels, *targets)
    yield {name: prober.said(name) for name in pods}
    release.kubectl("delete", "pods", *pods, "probe-stage-listens", "probe-stranger-listens", "--wait=false")


def enforced(reached: dict[str, dict[str, str]], request: pytest.FixtureRequest) -> None:
    """Our cluster enforces policies; one that was given may not."""
    if request.config.getoption("--kubeconfig") and not any(each["the store"] for each in reached.values()):
        pytest.skip("this cluster does not enforce network policies")


def open_to(found: dict[str, str]) -> set[str]:
    return {name for name, why in found.items() if not why}


def test_a_stage_reaches_the_store_and_nothing_else(reached: Any, request: pytest.FixtureRequest) -> None:
    enforced(reached, request)
    assert open_to(reached["probe-stage"]) == {"the store"}, reached["probe-stage"]


def test_a_stage_that_reads_a_source_reaches_no_private_address_but_the_store(
    reached: Any, request: pytest.FixtureRequest
) -> None:
    enforced(reached, request)
    assert open_to(reached["probe-import"]) == {"the store"}, reached["probe-import"]


def test_a_pod_of_somebody_elses_reaches_neither_the_store_nor_the_operator_nor_a_stage(
    reached: Any, request: pytest.FixtureRequest
) -> None:
    enforced(reached, request)
    assert open_to(reached["probe-stranger"]) == {"the API server", "a stranger"}, reached["probe-stranger"]
