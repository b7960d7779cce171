"""Writers that race, and writers that are killed: real processes, on a folder and on a real MinIO."""

import json
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from rlhf_api.errors import StoreError
from rlhf_api.stage import ArtifactRef, StoreConfig
from rlhf_store.artifacts import open_artifacts
from rlhf_store.file_objects import FileObjects

REF = ArtifactRef(kind="sft-adapter", digest="c" * 64)
PARTS = 12
WRITE = (
    f"PARTS = {PARTS}"
    + """
import os, sys
from pathlib import Path
from rlhf_api.stage import ArtifactRef, StoreConfig
from rlhf_store.artifacts import open_artifacts
store, attempt, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
ref = ArtifactRef(kind="sft-adapter", digest="c" * 64)
writer = open_artifacts(StoreConfig.model_validate_json(store)).writer(ref, attempt)
print("ready", flush=True)
sys.stdin.readline()
for number in range(PARTS):
    writer.add_bytes(f"part-{number}", f"{attempt}-{number}".encode() * size)
local = Path(sys.argv[4], f"local-{attempt}")
local.write_bytes(attempt.encode() * size)
writer.add_file("file", local, settled=True)
print(writer.commit({}).to_bytes().decode(), flush=True)
"""
)


def start(store: StoreConfig, attempt: str, size: int, folder: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE, store.model_dump_json(), attempt, str(size), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def test_of_racing_writers_one_wins_and_all_agree(store: StoreConfig, tmp_path: Path) -> None:
    writers = [start(store, f"w{number}", 1000, tmp_path) for number in range(5)]
    for writer in writers:
        go(writer)
    outcomes = [writer.communicate(timeout=60) for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 5, outcomes
    manifests = {out for out, _ in outcomes}
    assert len(manifests) == 1
    winner = json.loads(manifests.pop())["attempt"]
    artifacts = open_artifacts(store)
    assert artifacts.verify(REF) == []
    attempts = {info.key.split("/")[3] for info in artifacts.objects.walk("artifacts/")}
    assert attempts == {"manifest.json", winner}


def test_a_killed_writer_leaves_no_artifact(store: StoreConfig, tmp_path: Path) -> None:
    artifacts = open_artifacts(store)
    dice = random.Random(0)
    killed = 0
    for number in range(5):
        writer = start(store, f"killed{number}", 100_000, tmp_path)
        go(writer)
        point = dice.randrange(PARTS)  # a random point of the write, found by what it has written
        while len(list(artifacts.objects.walk(f"artifacts/{REF}/killed{number}/"))) < point and writer.poll() is None:
            pass
        writer.send_signal(signal.SIGKILL)
        out, _ = writer.communicate(timeout=60)
        if out or artifacts.find(REF) is not None:  # it was faster: whole, then
            assert artifacts.verify(REF) == []
            artifacts.gc(set(), timedelta(0), unkept=True)
        else:
            killed += 1
    assert killed >= 3
    writer = start(store, "alive", 100_000, tmp_path)
    go(writer)
    assert json.loads(writer.communicate(timeout=60)[0])["attempt"] == "alive"
    artifacts.gc(set(), timedelta(0))
    assert artifacts.verify(REF) == []
    assert {info.key.split("/")[3] for info in artifacts.objects.walk("artifacts/")} == {"manifest.json", "alive"}
    if store.url.startswith("file://"):
        assert list(Path(store.url.removeprefix("file://"), ".unfinished").iterdir()) == []


@pytest.mark.parametrize("older_than", [timedelta(0), timedelta(hours=1)])
def test_gc_takes_what_dead_writers_left_once_it_is_old(store: StoreConfig, older_than: timedelta) -> None:
    artifacts = open_artifacts(store)
    orphan, open_run, done = (ArtifactRef(kind="model", digest=d * 64) for d in "abd")
    for ref in (orphan, open_run):
        artifacts.writer(ref, "1").add_bytes("x", b"1")
    loser, winner = artifacts.writer(done, "1"), artifacts.writer(done, "2")
    loser.add_bytes("a", b"left by a loser that was killed")
    winner.add_bytes("a", b"1")
    winner.commit({})
    artifacts.objects.put(f"artifacts/{done}/2/checkpoints/00000001/manifest.json", b"{}")
    before = {info.key for info in artifacts.objects.walk("")}
    expected = {
        f"artifacts/{orphan}/1/x",
        f"artifacts/{done}/1/a",
        f"artifacts/{done}/2/checkpoints/00000001/manifest.json",
    }
    if older_than:
        expected = set()
    would = artifacts.gc({open_run}, older_than, dry_run=True)
    assert {key for each in would for key in each.keys} == expected
    assert {info.key for info in artifacts.objects.walk("")} == before
    artifacts.gc({open_run}, older_than)
    assert {info.key for info in artifacts.objects.walk("")} == before - expected
    assert artifacts.verify(done) == []


def test_gc_takes_unkept_artifacts_only_when_asked(store: StoreConfig) -> None:
    artifacts = open_artifacts(store)
    kept, unkept = (ArtifactRef(kind="policy", digest=d * 64) for d in "ab")
    for ref in (kept, unkept):
        writer = artifacts.writer(ref, "1")
        writer.add_bytes("a", b"1")
        writer.commit({})
    assert artifacts.gc({kept}, timedelta(0)) == []
    assert artifacts.gc({kept}, timedelta(hours=1), unkept=True) == []
    (removed,) = artifacts.gc({kept}, timedelta(0), unkept=True)
    assert removed.keys[0].endswith("manifest.json")
    assert [manifest.ref for manifest in artifacts.list()] == [kept]
    assert artifacts.find(unkept) is None
    assert [info.key for info in artifacts.objects.walk(f"artifacts/{unkept}/")] == []


def test_a_folder_that_others_empty_takes_what_is_written(tmp_path: Path) -> None:
    def write_and_delete(writer: int) -> None:
        objects = FileObjects(tmp_path)  # as another process would have it
        for number in range(300):
            key = f"probe/deeper/{writer}-{number}"
            assert objects.put(key, b"", if_none_match=True)
            assert not objects.put(key, b"", if_none_match=True)
            objects.delete([key])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_and_delete, range(4)))


def test_a_file_where_a_folder_should_be_is_told_at_once(tmp_path: Path) -> None:
    objects = FileObjects(tmp_path)
    objects.put("probe", b"")
    with pytest.raises(StoreError, match="probe/one: File exists"):
        objects.put("probe/one", b"")
