"""Each fault of a store gives one StoreError that says what to do, and what is committed stays usable."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from minio import MinioAdmin
from minio.credentials import EnvMinioProvider

from rlhf_api.errors import StoreError, UserError
from rlhf_api.names import ENV_ACCESS_KEY, ENV_SECRET_KEY
from rlhf_api.stage import ArtifactRef, StoreConfig
from rlhf_store.artifacts import Artifacts, open_artifacts

REF = ArtifactRef(kind="model", digest="a" * 64)


def commit(artifacts: Artifacts, ref: ArtifactRef = REF, size: int = 10) -> None:
    writer = artifacts.writer(ref, "1")
    writer.add_bytes("a", bytes(size))
    writer.commit({})


@pytest.mark.s3
def test_wrong_credentials(s3_store: StoreConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (ENV_SECRET_KEY, ENV_ACCESS_KEY):
        monkeypatch.setenv(variable, "wrong-wrong-wrong")
        for operation in (lambda a: a.find(REF), commit, lambda a: list(a.list())):
            with pytest.raises(StoreError, match=rf"refused the credentials.*{ENV_ACCESS_KEY} and {ENV_SECRET_KEY}"):
                operation(open_artifacts(s3_store))


@pytest.mark.s3
def test_no_credentials(s3_store: StoreConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV_SECRET_KEY)
    with pytest.raises(StoreError, match=f"no credentials; set {ENV_ACCESS_KEY} and {ENV_SECRET_KEY}"):
        open_artifacts(s3_store)


@pytest.mark.s3
def test_missing_bucket(s3_store: StoreConfig, tmp_path: Path) -> None:
    artifacts = open_artifacts(s3_store.model_copy(update={"url": "s3://no-such-bucket/x"}))
    (tmp_path / "f").write_bytes(b"1")
    for operation in (
        lambda: artifacts.find(REF),
        lambda: commit(artifacts),
        lambda: list(artifacts.list()),
        lambda: artifacts.writer(REF, "1").add_file("f", tmp_path / "f"),
    ):
        with pytest.raises(StoreError, match=r"bucket no-such-bucket does not exist .*create it"):
            operation()


@pytest.mark.s3
def test_unreachable(s3_store: StoreConfig) -> None:
    artifacts = open_artifacts(s3_store.model_copy(update={"endpoint": "http://127.0.0.1:1", "region": "us-east-1"}))
    with pytest.raises(StoreError, match=r"no S3 answer from http://127.0.0.1:1 .*check the endpoint"):
        artifacts.find(REF)


@pytest.mark.parametrize("endpoint", ["minio:9000", "ftp://minio", "http://minio/path"])
def test_bad_endpoint(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_ACCESS_KEY, "a")
    monkeypatch.setenv(ENV_SECRET_KEY, "b")
    with pytest.raises(UserError, match=r"store.endpoint: .* is not http://host:port"):
        open_artifacts(StoreConfig(url="s3://bucket", endpoint=endpoint))


@pytest.mark.s3
def test_full_bucket(s3_store: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = open_artifacts(s3_store)
    commit(artifacts)
    monkeypatch.setenv("MINIO_ACCESS_KEY", os.environ[ENV_ACCESS_KEY])
    monkeypatch.setenv("MINIO_SECRET_KEY", os.environ[ENV_SECRET_KEY])
    assert s3_store.endpoint
    admin = MinioAdmin(endpoint=s3_store.endpoint.removeprefix("http://"), credentials=EnvMinioProvider(), secure=False)
    admin.bucket_quota_set(s3_store.url.split("/")[2], 1 << 20)
    other = ArtifactRef(kind="model", digest="b" * 64)
    with pytest.raises(StoreError, match=r"disk is full .*rlhf artifacts gc"):
        commit(artifacts, other, size=2 << 20)
    (tmp_path / "f").write_bytes(bytes(40 << 20))
    with pytest.raises(StoreError, match="disk is full"):
        artifacts.writer(other, "2").add_file("f", tmp_path / "f")
    assert artifacts.find(other) is None
    assert artifacts.verify(REF) == []


FULL_DISK = """
import sys
from pathlib import Path
from rlhf_api.errors import StoreError
from rlhf_api.stage import ArtifactRef, StoreConfig
from rlhf_store.artifacts import open_artifacts
folder = Path(sys.argv[1])
artifacts = open_artifacts(StoreConfig(url=f"file://{folder}"))
done = ArtifactRef(kind="model", digest="a" * 64)
writer = artifacts.writer(done, "1")
writer.add_bytes("a", bytes(100_000))
writer.commit({})
local = Path(sys.argv[2])
local.write_bytes(bytes(4 << 20))
writer = artifacts.writer(ArtifactRef(kind="model", digest="b" * 64), "1")
writes = [
    lambda: writer.add_bytes("a", bytes(4 << 20)),
    lambda: writer.add_file("a", local),
    lambda: writer.add_file("a", local, settled=True),
]
for write in writes:
    try:
        write()
    except StoreError as error:
        print(error)
assert local.stat().st_size == 4 << 20, "the local file is whole"
assert artifacts.verify(done) == []
assert not list((folder / ".unfinished").iterdir())
"""


def test_full_disk(tmp_path: Path) -> None:
    """On a real file system of 2 MiB, mounted in a namespace of the test's own."""
    mount = (
        f'mount -t tmpfs -o size=2m tmpfs {tmp_path}/disk && exec {sys.executable} -c "$0" {tmp_path}/disk {tmp_path}/f'
    )
    (tmp_path / "disk").mkdir()
    if not shutil.which("unshare") or subprocess.run(["unshare", "-Urm", "true"], check=False).returncode:
        pytest.skip("needs user namespaces to mount a small file system")
    ran = subprocess.run(["unshare", "-Urm", "sh", "-c", mount, FULL_DISK], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("disk full: free space there, or run `rlhf artifacts gc`") == 3


def test_file_size_limit(tmp_path: Path) -> None:
    """The same through a limit of the process, which needs no rights."""
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20))\n{FULL_DISK}"
    limited = limited.replace("local.write_bytes(bytes(4 << 20))", "").replace("assert local", "assert True or local")
    (tmp_path / "f").write_bytes(bytes(4 << 20))
    limited = limited.replace('    lambda: writer.add_file("a", local, settled=True),\n', "")
    ran = subprocess.run(
        [sys.executable, "-c", limited, tmp_path / "disk", tmp_path / "f"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("disk full: free space there") == 2


class _IgnoresConditions(BaseHTTPRequestHandler):
    """As old stores do: every PUT succeeds."""

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def do_DELETE(self) -> None:
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


class _RefusesConditions(_IgnoresConditions):
    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(501 if self.headers.get("If-None-Match") else 200)
        self.end_headers()


@pytest.fixture(params=[_IgnoresConditions, _RefusesConditions])
def old_store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreConfig]:
    monkeypatch.setenv(ENV_ACCESS_KEY, "a")
    monkeypatch.setenv(ENV_SECRET_KEY, "b")
    server = HTTPServer(("127.0.0.1", 0), request.param)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield StoreConfig(url="s3://bucket", endpoint=f"http://127.0.0.1:{server.server_port}", region="us-east-1")
    server.shutdown()
    server.server_close()


def test_a_store_that_cannot_decide_races_is_refused(old_store: StoreConfig) -> None:
    with pytest.raises(StoreError, match="ignores If-None-Match on PUT"):
        commit(open_artifacts(old_store))


@pytest.mark.parametrize("url", ["s3://ab", "s3://a..b/x", "s3://10.0.0.1/x", "s3://runs-s3alias", "s3://rlhf/a/../b"])
def test_a_name_that_no_client_takes_is_the_users(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (ENV_ACCESS_KEY, ENV_SECRET_KEY):
        monkeypatch.setenv(variable, "any-keys")
    artifacts = open_artifacts(StoreConfig(url=url, endpoint="http://127.0.0.1:1"))
    for operation in (lambda: artifacts.find(REF), lambda: commit(artifacts)):
        with pytest.raises(UserError, match=rf"store {url}.*choose another bucket or prefix"):
            operation()


@pytest.mark.parametrize("url", ["s3://rlhf/a?b", "s3://rlhf/a#b"])
def test_a_prefix_that_a_url_would_cut_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (ENV_ACCESS_KEY, ENV_SECRET_KEY):
        monkeypatch.setenv(variable, "any-keys")
    with pytest.raises(UserError, match=r"no prefix of a store has \? or #"):
        open_artifacts(StoreConfig(url=url))
