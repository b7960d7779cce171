"""A run from `helm install` to a report: every stage in a pod of its own, on the labelled node, through the store."""

import base64
import io
import json
from typing import Any

import pytest
from calm import CALM, CHAIN_SECONDS, LONGER
from kubectl import SOON
from release import BUCKET, GPU_NODE, PREFIX, STAGES, STORE_SECRET, Release, tiny_spec

pytestmark = pytest.mark.timeout(1500)

# In a stage's pod, with what it has: which keys of which buckets it may read and write, and whether MinIO obeys it.
PRY = """
import io, json, os, sys
from minio import Minio, MinioAdmin
from minio.credentials import StaticProvider
from minio.error import MinioAdminException, S3Error
endpoint, *places = sys.argv[1:]
keys = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
store = Minio(endpoint, *keys, secure=False)
admin = MinioAdmin(endpoint=endpoint, credentials=StaticProvider(*keys), secure=False)
def tried(attempt):
    try:
        attempt()
    except (S3Error, MinioAdminException) as error:
        assert "AccessDenied" in str(error), error
        return False
    return True
attempts = {"users": admin.user_list, "a user": lambda: admin.user_add("mine", "mine-mine"),
            "a bucket": lambda: store.make_bucket("mine")}
for place in places:
    bucket, key = place.split("/", 1)
    folder = key.rsplit("/", 1)[0] + "/"
    attempts |= {
        f"list {place}": lambda b=bucket, f=folder: list(store.list_objects(b, f)),
        f"read {place}": lambda b=bucket, k=key: store.stat_object(b, k),
        f"write {place}": lambda b=bucket, k=key: store.put_object(b, k, io.BytesIO(b"1"), 1),
        f"delete {place}": lambda b=bucket, k=key: store.remove_object(b, k),
    }
print(json.dumps([name for name, attempt in attempts.items() if tried(attempt)]))
"""
SOURCE = f"{BUCKET}/sources/prize"
RELEASES = f"{BUCKET}/{PREFIX}/prize"
APART = f"{BUCKET}/apart/prize"
OTHER_BUCKET = "other/runs/prize"


@pytest.fixture(scope="module", autouse=True)
def denied(release: Release) -> str:
    """A run with keys that are none; applied first, since the attempts that it is given take a while."""
    release.kubectl(
        "create", "secret", "generic", "wrong", "--from-literal=AWS_ACCESS_KEY_ID=nobody",
        "--from-literal=AWS_SECRET_ACCESS_KEY=nothing-at-all",
    )  # fmt: skip
    release.apply("denied", tiny_spec(objectStore={"credentialsSecret": "wrong"}))
    return "denied"


def test_helm_test_passes(release: Release) -> None:
    done = release.helm("test", "rlhf", "--logs", f"--timeout={SOON:.0f}s")
    assert "Phase:          Succeeded" in done.stdout, done.stdout


def test_every_stage_ran_once_in_a_confined_pod_on_the_labelled_node(release: Release, calm: Any) -> None:
    name, status = CALM, calm
    assert {stage["name"]: stage["state"] for stage in status["stages"]} == dict.fromkeys(STAGES, "Succeeded")
    assert release.jobs(name) == {stage: [1] for stage in STAGES}
    labelled = {node["metadata"]["name"] for node in release.objects.list("nodes", "=".join(*GPU_NODE.items()))}
    pods = release.pods(name)
    assert {pod["metadata"]["labels"]["rlhf.dev/stage"] for pod in pods} == set(STAGES)
    assert {pod["spec"]["nodeName"] for pod in pods} <= labelled
    for pod in pods:
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert [container["image"] for container in pod["spec"]["containers"]] == [release.images["pipeline"]]


def test_the_status_says_what_the_run_came_to(release: Release, calm: Any) -> None:
    name, status = CALM, calm
    assert isinstance(status["reward"], float)
    conditions = {each["type"]: each["status"] for each in status["conditions"]}
    assert conditions == conditions | {"Valid": "True", "StoreReady": "True", "Succeeded": "True", "Failed": "False"}
    release.kubectl("wait", "--for=condition=Succeeded", f"rlhfrun/{name}", "--timeout=5s")
    table = release.kubectl("get", "rlhf", name).stdout
    assert "Succeeded" in table
    events = [event["reason"] for event in release.objects.list("events", fields=f"involvedObject.name={name}")]
    assert {"StageStarted", "StageSucceeded", "RunSucceeded"} <= set(events), events


def test_the_report_and_the_policy_are_in_the_store(release: Release, calm: Any) -> None:
    artifacts = {stage["name"]: stage["artifact"] for stage in calm["stages"]}
    with release.store() as store:
        names = [each.object_name or "" for each in store.list_objects(BUCKET, f"{PREFIX}/artifacts/", recursive=True)]
    [manifest] = [name for name in names if artifacts["ppo"] in name and name.endswith("manifest.json")]
    assert manifest
    assert [name for name in names if artifacts["evaluate"] in name and name.endswith(".html")]


def test_no_secret_is_in_args_logs_or_status(release: Release, calm: Any) -> None:
    name, status = CALM, calm
    secrets = [
        base64.b64decode(value).decode() for value in release.objects.get("secrets", STORE_SECRET)["data"].values()
    ]
    shown = json.dumps([status, release.objects.list("jobs"), release.pods(name), release.objects.list("events")])
    for pod in release.pods(name):
        shown += release.kubectl("logs", pod["metadata"]["name"]).stdout
    shown += release.kubectl("logs", f"deployment/{release.operator}", "--tail=-1").stdout
    assert len(secrets) == 2
    for secret in secrets:
        assert secret not in shown


def test_a_second_run_reuses_what_it_shares_with_the_first(release: Release, calm: Any) -> None:
    release.apply("second", tiny_spec(**LONGER, evaluate={"samples": 4}))
    release.wait("second", timeout=CHAIN_SECONDS)
    assert release.jobs("second") == {"evaluate": [1]}
    assert release.states("second") == dict.fromkeys(STAGES, "Reused") | {"evaluate": "Succeeded"}


def test_a_run_waits_for_a_node_and_says_so(release: Release, calm: Any) -> None:
    label = f"{release.namespace}.example.com/pool"
    spec = tiny_spec(**LONGER, evaluate={"samples": 5}, placement={"nodeSelector": {label: "a"}})
    release.apply("waiting", spec)

    def unschedulable() -> bool:
        return release.condition("waiting", "Progressing").get("reason") == "Unschedulable"

    release.until(unschedulable, SOON, lambda: release.words("waiting"))
    assert release.status("waiting")["phase"] == "Pending"
    assert "node" in release.condition("waiting", "Progressing")["message"]
    [node, *_] = [n["metadata"]["name"] for n in release.objects.list("nodes", "rlhf.dev/gpu-memory")]
    release.kubectl("label", "node", node, f"{label}=a")
    try:
        release.wait("waiting", timeout=CHAIN_SECONDS)
    finally:
        release.kubectl("label", "node", node, f"{label}-")
    assert release.jobs("waiting") == {"evaluate": [1]}


def test_a_stage_that_asks_for_a_gpu_gets_a_node_with_one_and_says_that_cuda_is_missing(
    release: Release, calm: Any
) -> None:
    """The image lies on the labelled node alone: imports are sent there, the GPU stage finds it by what it asks for."""
    if not release.on_kind:
        pytest.skip("its GPUs may be real, and the stage then trains")
    imports = {"spec": {"nodeSelector": GPU_NODE}}
    templates = {stage: imports for stage in STAGES if stage.startswith("import")}
    placement = {"nodeSelector": {}, "stagePodTemplates": templates}
    release.apply("on-gpu", tiny_spec(**LONGER | {"sft": {"steps": 3}}, gpu={"count": 1}, placement=placement))
    release.wait("on-gpu", "Failed", timeout=CHAIN_SECONDS)
    [pod] = release.pods("on-gpu", "sft")
    assert "nodeSelector" not in pod["spec"]
    assert pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    node = release.objects.get("nodes", pod["spec"]["nodeName"])
    assert int(node["status"]["allocatable"]["nvidia.com/gpu"]) > 0
    assert release.condition("on-gpu", "Failed")["reason"] == "User"
    assert "gpu.count: 1 asks for a GPU and this machine has none" in release.condition("on-gpu", "Failed")["message"]
    assert release.jobs("on-gpu") == {"sft": [1]}


def test_a_runs_own_wrong_credentials_are_said_before_a_gpu_is_asked_for(release: Release, denied: str) -> None:
    status = release.wait(denied, "Failed", timeout=CHAIN_SECONDS)
    assert set(release.jobs(denied)) <= {stage for stage in STAGES if stage.startswith("import")}, status
    assert "credentials" in release.condition(denied, "Failed")["message"]


def test_a_stage_over_its_memory_limit_goes_down_its_ladder(release: Release, calm: Any) -> None:
    limited = {"spec": {"containers": [{"name": "stage", "resources": {"limits": {"memory": "80Mi"}}}]}}
    release.apply("tight", tiny_spec(**LONGER, evaluate={"samples": 3}, placement={"podTemplate": limited}))
    release.wait("tight", "Failed", timeout=CHAIN_SECONDS)
    assert release.stages("tight")["evaluate"]["failure"] == "outOfMemory"
    failed = release.condition("tight", "Failed")
    assert failed["reason"] == "OutOfMemory"
    assert "4 attempts, the last with batchSize 1 instead of 4 and microBatchSize 1 instead of 2" in failed["message"]
    # One more where the node's runtime takes a kill at the limit for somebody's.
    assert release.jobs("tight")["evaluate"][:4] == [1, 2, 3, 4]
    events = release.objects.list("events", fields="involvedObject.name=tight,reason=Retrying")
    assert any("batchSize 2 instead of 4" in event["message"] for event in events), events


def test_a_stage_has_no_way_into_the_api_server(release: Release, calm: Any) -> None:
    release.apply("curious", tiny_spec(**LONGER | {"ppo": LONGER["ppo"] | {"klCoefficient": 0.15}}))
    pod = release.running_pod("curious", "ppo")
    script = (
        "import os, ssl, urllib.request, urllib.error\n"
        "assert not os.path.exists('/var/run/secrets/kubernetes.io'), 'a token is mounted'\n"
        "try:\n"
        "    urllib.request.urlopen('https://kubernetes.default.svc/api/v1/namespaces', timeout=10,\n"
        "                           context=ssl._create_unverified_context())\n"
        "except urllib.error.HTTPError as error: print(error.code)\n"
        "except OSError: print('unreachable')\n"
    )
    said = release.kubectl("exec", pod, "--", "python", "-c", script).stdout.strip()
    release.kubectl("delete", "rlhfrun", "curious")
    assert said in ("401", "403", "unreachable")


def pried_open(release: Release, pod: str) -> set[str]:
    """What a stage's pod can do to the store, of all that it should not be able to do and some that it should."""
    places = (SOURCE, RELEASES, APART, OTHER_BUCKET)
    with release.store() as store:
        for place in places:
            bucket, key = place.split("/", 1)
            if not store.bucket_exists(bucket):
                store.make_bucket(bucket)
            store.put_object(bucket, key, io.BytesIO(b"1"), 1)
    said = release.kubectl("exec", pod, "--", "python", "-c", PRY, f"{release.store_name}:9000", *places)
    return set(json.loads(said.stdout))


def everything(place: str) -> set[str]:
    return {f"{action} {place}" for action in ("list", "read", "write", "delete")}


def test_a_stages_keys_open_the_prefix_of_its_release_and_nothing_else(release: Release, calm: Any) -> None:
    release.apply("prying", tiny_spec(**LONGER | {"ppo": LONGER["ppo"] | {"klCoefficient": 0.16}}))
    pod = release.running_pod("prying", "ppo")
    found = pried_open(release, pod)
    release.kubectl("delete", "rlhfrun", "prying")
    assert found == {f"list {SOURCE}", f"read {SOURCE}", *everything(RELEASES)}


def test_a_run_with_keys_of_its_own_is_apart_from_the_others(release: Release) -> None:
    release.install("minio.users[0].secret=apart", "minio.users[0].prefix=apart")
    release.apply("apart", tiny_spec(objectStore={"prefix": "apart", "credentialsSecret": "apart"}))
    pod = release.running_pod("apart", "sft", CHAIN_SECONDS)
    assert pried_open(release, pod) == {f"list {SOURCE}", f"read {SOURCE}", *everything(APART)}
    assert release.jobs("apart") == {stage: [1] for stage in STAGES if stage.startswith("import") or stage == "sft"}
    release.kubectl("delete", "rlhfrun", "apart")
