"""Credentials that reach one prefix of a bucket are all that a run needs, and nothing else.

rlhf_store.users.policy is what they have to allow, in the words of S3 that MinIO and AWS share. Sources that lie
elsewhere need s3:GetObject on them, and s3:ListBucket below the folders that they are in.
"""

import json
import subprocess
import sys
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from minio import MinioAdmin
from minio.credentials import StaticProvider
from minio_server import PASSWORD, USER, MinioServer
from release import BUCKET, STAGES, reviews, tiny_spec
from tiny import build_tiny_model

from rlhf_api.errors import StoreError
from rlhf_api.names import ENV_ACCESS_KEY, ENV_SECRET_KEY
from rlhf_api.parse import parse_run
from rlhf_api.stage import ArtifactRef, StoreConfig
from rlhf_operator.operator_settings import OperatorSettings
from rlhf_operator.store_view import StoreView
from rlhf_store.artifacts import Artifacts, open_artifacts
from rlhf_store.users import policy

pytestmark = pytest.mark.s3

PREFIX, NEIGHBOUR = "team/run", "team/run-2"
REF = ArtifactRef(kind="model", digest="a" * 64)


def reduced(bucket: str, without: str) -> dict[str, Any]:
    """The policy of our prefix but for one action."""
    whole = policy(bucket, PREFIX)
    for each in whole["Statement"]:
        each["Action"] = [action for action in each["Action"] if action != without]
    return whole | {"Statement": [each for each in whole["Statement"] if each["Action"]]}


@pytest.fixture(scope="module")
def bucket(minio: MinioServer) -> str:
    """A fresh bucket, in which somebody else has a run beside ours."""
    name = f"scoped-{uuid.uuid4().hex[:16]}"
    minio.client().make_bucket(name)
    with pytest.MonkeyPatch.context() as patch:
        use(patch, (USER, PASSWORD))
        write(open_artifacts(StoreConfig(url=f"s3://{name}/{NEIGHBOUR}", endpoint=minio.url)))
    return name


@pytest.fixture(scope="module")
def new_user(minio: MinioServer, bucket: str) -> Callable[..., tuple[str, str]]:
    """A function that makes credentials with the policy, or with less."""
    admin = MinioAdmin(endpoint=minio.address, credentials=StaticProvider(USER, PASSWORD), secure=False)

    def make(without: str = "") -> tuple[str, str]:
        name, secret = uuid.uuid4().hex, uuid.uuid4().hex
        admin.policy_add(name, policy=reduced(bucket, without))
        admin.user_add(name, secret)
        admin.attach_policy([name], user=name)
        return name, secret

    return make


@pytest.fixture(scope="module")
def credentials(new_user: Callable[..., tuple[str, str]]) -> tuple[str, str]:
    """Access key and secret key with the policy."""
    return new_user()


@pytest.fixture
def store(
    minio: MinioServer, bucket: str, credentials: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> StoreConfig:
    """Our prefix, with credentials for it alone in the environment."""
    use(monkeypatch, credentials)
    return StoreConfig(url=f"s3://{bucket}/{PREFIX}", endpoint=minio.url)


@pytest.fixture
def document(minio: MinioServer, bucket: str, tmp_path: Path) -> dict[str, Any]:
    """A run of few and short steps, whose sources lie below our prefix."""
    build_tiny_model(tmp_path / "model", layers=2)
    (tmp_path / "reviews.csv").write_text(reviews())
    for path in [*(tmp_path / "model").iterdir(), tmp_path / "reviews.csv"]:
        minio.client().fput_object(bucket, f"{PREFIX}/sources/{path.relative_to(tmp_path)}", str(path))
    steps = {"steps": 2, "checkpointSteps": 1}
    spec = tiny_spec(sft=steps, reward=steps, ppo={"episodes": 8, "checkpointSteps": 1})
    spec = json.loads(json.dumps(spec).replace(f"s3://{BUCKET}/", f"s3://{bucket}/{PREFIX}/"))
    metadata = {"name": "scoped", "namespace": "team", "uid": "1"}
    return {"apiVersion": "rlhf.dev/v1alpha1", "kind": "RLHFRun", "metadata": metadata, "spec": spec}


@pytest.mark.slow
def test_a_run_needs_its_own_prefix_and_no_more(
    store: StoreConfig, document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which is faster on a model as small as this
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document))
    rlhf = Path(sys.executable).with_name("rlhf")
    done = subprocess.run(
        [rlhf, "run", "run.yaml", "--store", store.url, "--endpoint", str(store.endpoint), "--json"],
        cwd=tmp_path, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [stage["state"] for stage in json.loads(done.stdout)["stages"]] == ["Succeeded"] * len(STAGES)
    artifacts = open_artifacts(store)
    assert len(list(artifacts.list())) == len(STAGES)
    artifacts.gc(set(), timedelta(0), unkept=True)
    assert not list(artifacts.list())


def test_the_operator_finds_the_store_ready(store: StoreConfig, bucket: str, document: dict[str, Any]) -> None:
    settings = OperatorSettings(image="rlhf-pipeline", bucket=bucket, prefix=PREFIX, endpoint=store.endpoint)
    seen = StoreView(settings).look(parse_run(document), {}, 0.0)
    assert (seen.asked, seen.problem) == (True, None)
    settings = OperatorSettings(image="rlhf-pipeline", bucket=bucket, prefix=NEIGHBOUR, endpoint=store.endpoint)
    assert "refused the credentials" in str(StoreView(settings).look(parse_run(document), {}, 0.0).problem)


@pytest.mark.parametrize(
    "operation",
    [
        lambda artifacts: artifacts.find(REF),
        lambda artifacts: artifacts.verify(REF),
        lambda artifacts: artifacts.objects.put("a", b"1"),
        lambda artifacts: artifacts.objects.put("a", b"1", if_none_match=True),
        lambda artifacts: artifacts.objects.head(f"artifacts/{REF}/manifest.json"),
        lambda artifacts: artifacts.objects.delete([f"artifacts/{REF}/manifest.json"]),
        lambda artifacts: list(artifacts.list()),
        lambda artifacts: list(artifacts.objects.walk("")),
    ],
    ids=["find", "verify", "put", "put-if-absent", "head", "delete", "list", "walk"],
)
def test_nothing_outside_the_prefix_is_to_be_had(
    store: StoreConfig, bucket: str, operation: Callable[[Artifacts], object]
) -> None:
    for prefix in (f"/{NEIGHBOUR}", "/team", ""):
        artifacts = open_artifacts(store.model_copy(update={"url": f"s3://{bucket}{prefix}"}))
        with pytest.raises(StoreError, match="AccessDenied"):
            operation(artifacts)


@pytest.mark.parametrize(
    "action", ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:ListBucket", "s3:GetBucketLocation"]
)
def test_no_action_of_the_policy_can_be_left_out(
    store: StoreConfig, new_user: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    use(monkeypatch, new_user(without=action))
    with pytest.raises(StoreError, match="AccessDenied"):
        write(open_artifacts(store))


def use(patch: pytest.MonkeyPatch, credentials: tuple[str, str]) -> None:
    for variable, value in zip((ENV_ACCESS_KEY, ENV_SECRET_KEY), credentials, strict=True):
        patch.setenv(variable, value)


def write(artifacts: Artifacts) -> None:
    """Everything that a stage does to the store."""
    writer = artifacts.writer(REF, "1")
    writer.add_bytes("a", b"1")
    artifacts.tidy(writer.commit({}))
    assert artifacts.verify(REF) == []
