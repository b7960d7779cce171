"""Stores that tests of any package use: a folder, and a real MinIO."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_api.names import ENV_ACCESS_KEY, ENV_SECRET_KEY
from rlhf_api.stage import StoreConfig

MINIO_SCRIPT = Path(__file__).parent.parent / "hack" / "minio.sh"
USER, PASSWORD = "rlhf-tests", "rlhf-tests-secret"
# PR_SET_PDEATHSIG, SIGKILL: the server dies with the tests, however they die.
DIE_WITH_PARENT = "import ctypes,os,sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"


@pytest.fixture(scope="session")
def minio_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a MinIO of this test session's own. The first use ever builds it, in about 200 seconds."""
    binary = subprocess.run([MINIO_SCRIPT], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    folder = tmp_path_factory.mktemp("minio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "MINIO_ROOT_USER": USER, "MINIO_ROOT_PASSWORD": PASSWORD, "MINIO_BROWSER": "off"}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", DIE_WITH_PARENT, binary, "server", "--address", address, str(folder / "data")],
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        _wait_until_live(f"http://{address}", server, folder / "log")
        yield f"http://{address}"
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(folder / "data", ignore_errors=True)


def _wait_until_live(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 180  # a disk busy with others' writes holds it up
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/minio/health/live", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)
    raise RuntimeError(f"MinIO did not start: {log.read_text()[-2000:]}")


@pytest.fixture
def s3_store(minio_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> StoreConfig:
    """A fresh bucket, with its credentials in the environment."""
    monkeypatch.setenv(ENV_ACCESS_KEY, USER)
    monkeypatch.setenv(ENV_SECRET_KEY, PASSWORD)
    bucket = f"test-{uuid.uuid4().hex[:16]}"
    from minio import Minio

    Minio(minio_endpoint.removeprefix("http://"), USER, PASSWORD, secure=False).make_bucket(bucket)
    return StoreConfig(url=f"s3://{bucket}/team/runs", endpoint=minio_endpoint)


@pytest.fixture
def file_store(tmp_path: Path) -> StoreConfig:
    """An empty store in a folder."""
    return StoreConfig(url=f"file://{tmp_path}/store")


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest) -> StoreConfig:
    """An empty store: the test runs once on each kind."""
    return request.getfixturevalue(f"{request.param}_store")
