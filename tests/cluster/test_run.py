"""A run from `helm install` to a report: every stage in a pod of its own, on the labelled node, through the store."""

import base64
import json
from typing import Any

import pytest
from release import BUCKET, GPU_NODE, STAGES, STORE_SECRET, Release, tiny_spec

pytestmark = pytest.mark.timeout(1500)

CHAIN_SECONDS = 900.0  # a calm machine needs a fifth


@pytest.fixture(scope="module")
def first(release: Release) -> tuple[str, dict[str, Any]]:
    """Name and final status of a run that nothing disturbed."""
    release.apply("first", tiny_spec())
    return "first", release.wait("first", timeout=CHAIN_SECONDS)


def test_helm_test_passes(release: Release) -> None:
    done = release.helm("test", "rlhf", "--logs", "--timeout=120s")
    assert "Phase:          Succeeded" in done.stdout, done.stdout


def test_every_stage_ran_once_in_a_confined_pod_on_the_labelled_node(release: Release, first: Any) -> None:
    name, status = first
    assert {stage["name"]: stage["state"] for stage in status["stages"]} == dict.fromkeys(STAGES, "Succeeded")
    assert release.jobs(name) == {stage: [1] for stage in STAGES}
    labelled = {node["metadata"]["name"] for node in release.get("nodes", "-l", "=".join(*GPU_NODE.items()))}
    pods = release.pods(name)
    assert {pod["metadata"]["labels"]["rlhf.dev/stage"] for pod in pods} == set(STAGES)
    assert {pod["spec"]["nodeName"] for pod in pods} <= labelled
    for pod in pods:
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert [container["image"] for container in pod["spec"]["containers"]] == [release.images["pipeline"]]


def test_the_status_says_what_the_run_came_to(release: Release, first: Any) -> None:
    name, status = first
    assert isinstance(status["reward"], float)
    conditions = {each["type"]: each["status"] for each in status["conditions"]}
    assert conditions == conditions | {"Valid": "True", "StoreReady": "True", "Succeeded": "True", "Failed": "False"}
    release.kubectl("wait", "--for=condition=Succeeded", f"rlhfrun/{name}", "--timeout=5s")
    table = release.kubectl("get", "rlhf", name).stdout
    assert "Succeeded" in table
    events = [event["reason"] for event in release.get("events", f"--field-selector=involvedObject.name={name}")]
    assert {"StageStarted", "StageSucceeded", "RunSucceeded"} <= set(events), events


def test_the_report_and_the_policy_are_in_the_store(release: Release, first: Any) -> None:
    _, status = first
    artifacts = {stage["name"]: stage["artifact"] for stage in status["stages"]}
    with release.store() as store:
        names = [each.object_name or "" for each in store.list_objects(BUCKET, recursive=True)]
    [manifest] = [name for name in names if artifacts["ppo"] in name and name.endswith("manifest.json")]
    assert manifest
    assert [name for name in names if artifacts["evaluate"] in name and name.endswith(".html")]


def test_no_secret_is_in_args_logs_or_status(release: Release, first: Any) -> None:
    name, status = first
    secrets = [base64.b64decode(value).decode() for value in release.get("secret", STORE_SECRET)["data"].values()]
    shown = json.dumps([status, release.get("jobs"), release.pods(name), release.get("events")])
    for pod in release.pods(name):
        shown += release.kubectl("logs", pod["metadata"]["name"]).stdout
    shown += release.kubectl("logs", f"deployment/{release.operator}", "--tail=-1").stdout
    assert len(secrets) == 2
    for secret in secrets:
        assert secret not in shown


def test_a_second_run_reuses_what_it_shares_with_the_first(release: Release, first: Any) -> None:
    release.apply("second", tiny_spec(evaluate={"samples": 4}))
    release.wait("second", timeout=CHAIN_SECONDS)
    assert release.jobs("second") == {"evaluate": [1]}
    assert release.states("second") == dict.fromkeys(STAGES, "Reused") | {"evaluate": "Succeeded"}
