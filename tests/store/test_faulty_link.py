"""The artifact commit over networks and stores that fail for a while: what was asked for is whole in the end."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from faulty_link import MANIFESTS, FaultyLink
from minio_server import PASSWORD, USER, MinioServer, SmallDisk

from rlhf_api.errors import StoreError
from rlhf_api.names import ENV_ACCESS_KEY, ENV_SECRET_KEY
from rlhf_api.stage import ArtifactRef, StoreConfig
from rlhf_store.artifacts import Artifacts, Manifest, open_artifacts
from rlhf_store.s3_objects import PART

pytestmark = pytest.mark.s3

REF = ArtifactRef(kind="model", digest="a" * 64)
OTHER = ArtifactRef(kind="model", digest="b" * 64)
BURST_SECONDS = 20.0  # most that three refusals may hold a writer up; MinIO asks it to wait a minute after each


@pytest.fixture
def link(s3_store: StoreConfig) -> Iterator[FaultyLink]:
    """A way to the store of `s3_store`."""
    assert s3_store.endpoint
    with FaultyLink(s3_store.endpoint) as link:
        yield link


@pytest.fixture
def artifacts(s3_store: StoreConfig, link: FaultyLink) -> Artifacts:
    """The artifacts of a fresh bucket, over the link, on which nothing was sent yet."""
    return open_artifacts(s3_store.model_copy(update={"endpoint": link.url}))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file that is uploaded in three parts."""
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(1 << 20) * (2 * PART >> 20) + b"the rest")
    return path


def write(artifacts: Artifacts, *files: Path, ref: ArtifactRef = REF) -> Manifest:
    writer = artifacts.writer(ref, "1")
    writer.add_bytes("config.json", b"{}")
    for file in files:
        writer.add_file(file.name, file)
    return writer.commit({})


@pytest.mark.parametrize("part", ["config.json", "partNumber=1", "partNumber=2", "partNumber=3", "manifest.json"])
def test_an_upload_cut_in_the_middle_is_sent_again(
    artifacts: Artifacts, s3_store: StoreConfig, link: FaultyLink, weights: Path, part: str
) -> None:
    link.cut(f"PUT .*{part}", times=2)
    write(artifacts, weights)
    assert len([line for line in link.seen if part in line and line.endswith(" 0")]) == 2
    assert open_artifacts(s3_store).verify(REF) == []


@pytest.mark.parametrize(
    "request_line", ["PUT .*config.json", "POST .*uploads=", "PUT .*partNumber=2", "POST .*uploadId=", MANIFESTS]
)
def test_an_answer_that_is_lost_changes_nothing(
    artifacts: Artifacts, s3_store: StoreConfig, link: FaultyLink, weights: Path, request_line: str
) -> None:
    link.swallow(request_line, times=1)
    assert write(artifacts, weights).attempt == "1"
    assert [line for line in link.seen if line.endswith(" 0")]
    assert open_artifacts(s3_store).verify(REF) == []


def test_a_lost_answer_is_no_proof_against_the_store(artifacts: Artifacts, link: FaultyLink) -> None:
    link.swallow("PUT .*/probe/", times=1)
    write(artifacts)
    assert artifacts.verify(REF) == []


@pytest.mark.parametrize("request_line", ["", "POST", MANIFESTS])
def test_a_store_that_is_busy_for_a_moment_is_asked_again(
    artifacts: Artifacts, s3_store: StoreConfig, link: FaultyLink, weights: Path, request_line: str
) -> None:
    link.refuse(request_line, times=3)
    began = time.monotonic()
    write(artifacts, weights)
    assert time.monotonic() - began < BURST_SECONDS
    assert len([line for line in link.seen if line.endswith(" 503")]) == 3
    assert open_artifacts(s3_store).verify(REF) == []
    link.refuse(times=3)
    artifacts.gc(set(), timedelta(0), unkept=True)  # which lists and deletes
    assert artifacts.find(REF) is None


def test_a_store_that_stays_busy_is_given_up_within_the_patience(s3_store: StoreConfig, link: FaultyLink) -> None:
    link.refuse()
    began = time.monotonic()
    with pytest.raises(StoreError, match="503"):
        open_artifacts(s3_store.model_copy(update={"endpoint": link.url}), patience=5).find(REF)
    assert time.monotonic() - began < 10
    assert len(link.seen) > 1


@pytest.mark.slow
def test_a_slow_link_takes_as_long_as_it_takes(s3_store: StoreConfig, link: FaultyLink, tmp_path: Path) -> None:
    """Longer than the patience, and than a connection may take: both are about silence."""
    rate, size, patience = 1 << 20, 6 << 20, 3.0
    local = tmp_path / "weights"
    local.write_bytes(os.urandom(size))
    artifacts = open_artifacts(s3_store.model_copy(update={"endpoint": link.url}), patience)
    link.slow(rate)
    began = time.monotonic()
    write(artifacts, local)
    assert time.monotonic() - began > 1.5 * patience
    artifacts.fetch(REF, tmp_path / "out")
    assert (tmp_path / "out" / "weights").read_bytes() == local.read_bytes()
    assert not [line for line in link.seen if line.endswith(" 0")], "nothing had to be sent twice"


def test_what_does_not_exist_is_known_although_the_store_denies_it(artifacts: Artifacts, link: FaultyLink) -> None:
    link.hide_missing()
    assert artifacts.find(REF) is None
    assert artifacts.objects.head("nothing") is None
    write(artifacts)
    assert artifacts.verify(REF) == []
    assert [line for line in link.seen if line.endswith(" 403")]


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every MinIO that a test starts."""
    monkeypatch.setenv(ENV_ACCESS_KEY, USER)
    monkeypatch.setenv(ENV_SECRET_KEY, PASSWORD)


@pytest.mark.usefixtures("credentials")
def test_an_upload_outlives_the_store_it_goes_to(tmp_path: Path, weights: Path) -> None:
    with MinioServer(tmp_path) as minio, FaultyLink(minio.url) as link:
        minio.client().make_bucket("rlhf")
        artifacts = open_artifacts(StoreConfig(url="s3://rlhf/runs", endpoint=link.url))
        link.slow(8 << 20)
        uploaded: list[Manifest] = []
        upload = threading.Thread(target=lambda: uploaded.append(write(artifacts, weights)))
        upload.start()
        wait_until(lambda: any("uploads=" in line for line in link.seen))  # which begins an upload in parts
        minio.stop()
        wait_until(lambda: any("partNumber" in line and line.endswith(" 0") for line in link.seen))
        minio.start()
        link.mend()
        upload.join(60)
        assert [manifest.attempt for manifest in uploaded] == ["1"]
        assert artifacts.verify(REF) == []


@pytest.mark.usefixtures("credentials")
def test_a_full_disk_is_said_and_what_is_committed_stays_readable(tmp_path: Path, weights: Path) -> None:
    with SmallDisk(tmp_path / "disk", 128 << 20) as disk, MinioServer(tmp_path, disk.path / "data") as minio:
        minio.client().make_bucket("rlhf")
        artifacts = open_artifacts(StoreConfig(url="s3://rlhf/runs", endpoint=minio.url))
        write(artifacts, weights)
        artifacts.writer(OTHER, "dead").add_file("weights", weights)  # never committed
        for leave in (20 << 20, 1 << 20, 0):
            disk.fill(leave)
            with pytest.raises(StoreError, match=r"disk is full .*rlhf artifacts gc"):
                write(artifacts, weights, ref=OTHER)
            assert artifacts.find(OTHER) is None
            assert artifacts.verify(REF) == []
        artifacts.fetch(REF, tmp_path / "out")
        assert (tmp_path / "out" / "weights").read_bytes() == weights.read_bytes()
        artifacts.gc(set(), timedelta(0))  # what the error advises
        assert [info.key for info in artifacts.objects.walk("")] == [
            f"artifacts/{REF}/{name}" for name in ("1/config.json", "1/weights", "manifest.json")
        ]
        disk.empty()
        wait_until(lambda: writes(artifacts))  # MinIO looks how much is free once a second
        write(artifacts, weights, ref=OTHER)
        assert artifacts.verify(OTHER) == []


def writes(artifacts: Artifacts) -> bool:
    try:
        artifacts.objects.put("probe", b"1")
    except StoreError:
        return False
    return True


def wait_until(reached: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)
