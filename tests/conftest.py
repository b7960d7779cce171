"""Stores that tests of any package use: a folder, and a real MinIO."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from minio_server import PASSWORD, USER, MinioServer

from rlhf_api.names import ENV_ACCESS_KEY, ENV_SECRET_KEY
from rlhf_api.stage import StoreConfig

# How long an example takes says how busy the machine is, and nothing of the code.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session")
def minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MinioServer]:
    """A MinIO of this test session's own, for tests that leave it running. The first use ever builds it."""
    with MinioServer(tmp_path_factory.mktemp("minio")) as server:
        yield server


@pytest.fixture(scope="session")
def minio_endpoint(minio: MinioServer) -> str:
    """URL of that MinIO."""
    return minio.url


@pytest.fixture
def s3_store(minio: MinioServer, monkeypatch: pytest.MonkeyPatch) -> StoreConfig:
    """A fresh bucket, with its credentials in the environment."""
    monkeypatch.setenv(ENV_ACCESS_KEY, USER)
    monkeypatch.setenv(ENV_SECRET_KEY, PASSWORD)
    bucket = f"test-{uuid.uuid4().hex[:16]}"
    minio.client().make_bucket(bucket)
    return StoreConfig(url=f"s3://{bucket}/team/runs", endpoint=minio.url)


@pytest.fixture
def file_store(tmp_path: Path) -> StoreConfig:
    """An empty store in a folder."""
    return StoreConfig(url=f"file://{tmp_path}/store")


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest) -> StoreConfig:
    """An empty store: the test runs once on each kind."""
    return request.getfixturevalue(f"{request.param}_store")
