"""The artifact commit, on a folder and on a real MinIO."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_api.errors import IntegrityError, StoreError, UserError
from rlhf_api.layout import attempt_prefix, manifest_key
from rlhf_api.stage import ArtifactRef, StoreConfig
from rlhf_store.artifacts import Artifacts, Manifest, open_artifacts
from rlhf_store.transfer import PART

REF = ArtifactRef(kind="model", digest="a" * 64)


@pytest.fixture
def artifacts(store: StoreConfig) -> Artifacts:
    return open_artifacts(store)


def write(artifacts: Artifacts, files: dict[str, bytes], attempt: str = "1", ref: ArtifactRef = REF) -> Manifest:
    writer = artifacts.writer(ref, attempt)
    for path, data in files.items():
        writer.add_bytes(path, data)
    return writer.commit({"metrics": {"loss": 0.5}})


def keys(artifacts: Artifacts) -> list[str]:
    return [info.key for info in artifacts.objects.walk("")]


def content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_committed_artifact_comes_back_byte_for_byte(artifacts: Artifacts, tmp_path: Path) -> None:
    folder = tmp_path / "output"
    files = {
        "config.json": b"{}",
        "weights/a.bin": os.urandom(2 * PART + 17),
        "empty": b"",
        "a name with ünïcode & blanks.txt": b"x",
        "logs/metrics.jsonl": b"{}\n",
    }
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    writer = artifacts.writer(REF, "1")
    writer.add_folder(folder)
    committed = writer.commit({"metrics": {"loss": 0.5}})
    assert artifacts.find(REF) == committed
    assert committed.metadata == {"metrics": {"loss": 0.5}}
    assert {path: entry.size for path, entry in committed.files.items()} == {p: len(d) for p, d in files.items()}
    assert content(artifacts.fetch(REF, tmp_path / "fetched")) == files


def test_nothing_is_visible_before_the_commit(artifacts: Artifacts, tmp_path: Path) -> None:
    artifacts.writer(REF, "1").add_bytes("config.json", b"{}")
    assert artifacts.find(REF) is None
    assert list(artifacts.list()) == []
    with pytest.raises(UserError, match="no such artifact"):
        artifacts.fetch(REF, tmp_path)


def test_a_later_writer_gets_the_winners_manifest_and_leaves_nothing(artifacts: Artifacts) -> None:
    first = write(artifacts, {"a": b"first"}, "1")
    before = keys(artifacts)
    assert write(artifacts, {"a": b"second", "b": b"more"}, "2") == first
    assert keys(artifacts) == before


def test_a_settled_file_stays_and_is_stored_without_a_copy_where_it_can_be(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    local = tmp_path / "local"
    local.write_bytes(b"data")
    writer = artifacts.writer(REF, "1")
    writer.add_file("a", local, settled=True)
    writer.commit({})
    if stored := artifacts.objects.path(attempt_prefix(REF.kind, REF.digest, "1") + "a"):
        assert stored.samefile(local)
    assert content(artifacts.fetch(REF, tmp_path / "out")) == {"a": b"data"}
    assert local.read_bytes() == b"data"


def test_a_settled_file_with_another_name_is_copied(artifacts: Artifacts, tmp_path: Path) -> None:
    local, other = tmp_path / "local", tmp_path / "other"
    local.write_bytes(b"data")
    other.hardlink_to(local)
    writer = artifacts.writer(REF, "1")
    writer.add_file("a", local, settled=True)
    writer.commit({})
    other.write_bytes(b"DATA")  # by somebody who knows only this name
    assert content(artifacts.fetch(REF, tmp_path / "out")) == {"a": b"data"}


def test_a_folder_adds_what_was_not_sent_before(artifacts: Artifacts, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("early", "late"):
        (tmp_path / "in" / name).write_text(name)
    writer = artifacts.writer(REF, "1")
    writer.add_file("early", tmp_path / "in" / "early")
    (tmp_path / "in" / "early").write_text("changed since")
    writer.add_folder(tmp_path / "in")
    writer.commit({})
    assert content(artifacts.fetch(REF, tmp_path / "out")) == {"early": b"early", "late": b"late"}


def test_only_matching_files_are_fetched(artifacts: Artifacts, tmp_path: Path) -> None:
    write(artifacts, {"config.json": b"1", "adapter/x.safetensors": b"2", "logs/m.jsonl": b"3"})
    fetched = content(artifacts.fetch(REF, tmp_path / "out", include=["*.json", "adapter/*"]))
    assert sorted(fetched) == ["adapter/x.safetensors", "config.json"]
    with pytest.raises(UserError, match=r"no file matches \*\.gguf; it has adapter/x"):
        artifacts.fetch(REF, tmp_path / "out", include=["*.gguf"])


def test_ranges_are_read_without_the_rest(artifacts: Artifacts) -> None:
    data = os.urandom(100_000)
    manifest = write(artifacts, {"w": data})
    assert artifacts.read_range(manifest, "w", 500, 1000) == data[500:1500]
    assert artifacts.read_range(manifest, "w", 99_999, 1) == data[-1:]
    assert artifacts.read_range(manifest, "w", 7, 0) == b""
    with pytest.raises(ValueError, match="which has 100000"):
        artifacts.read_range(manifest, "w", 99_999, 2)
    artifacts.objects.put(attempt_prefix(REF.kind, REF.digest, "1") + "w", data[:50_000])
    with pytest.raises(IntegrityError, match="file w was truncated: 500 of 1000"):
        artifacts.read_range(manifest, "w", 49_500, 1000)


@pytest.mark.parametrize("size", [10, PART + 5])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damage_is_named(artifacts: Artifacts, tmp_path: Path, damage: str, size: int) -> None:
    data = os.urandom(size)
    write(artifacts, {"good": b"1", "weights.bin": data})
    key = attempt_prefix(REF.kind, REF.digest, "1") + "weights.bin"
    flipped = bytearray(data)
    flipped[size // 2] ^= 1
    match damage:
        case "truncated":
            artifacts.objects.put(key, data[:-1])
        case "altered":
            artifacts.objects.put(key, bytes(flipped))
        case "missing":
            artifacts.objects.delete([key])
    with pytest.raises(IntegrityError, match=rf"{REF}: file weights.bin"):
        artifacts.fetch(REF, tmp_path / "out")
    assert "weights.bin" not in content(tmp_path / "out")
    problems = artifacts.verify(REF)
    assert len(problems) == 1
    assert "weights.bin" in problems[0]


def test_verify_sees_bytes_added_at_the_end(artifacts: Artifacts) -> None:
    write(artifacts, {"a": b"12"})
    artifacts.objects.put(attempt_prefix(REF.kind, REF.digest, "1") + "a", b"123")
    assert ["file a has 3 bytes, its manifest says 2" in problem for problem in artifacts.verify(REF)] == [True]


def test_a_damaged_manifest_is_named(artifacts: Artifacts) -> None:
    write(artifacts, {"a": b"1"})
    key = manifest_key(REF.kind, REF.digest)
    whole = artifacts.objects.get(key)
    for damaged in (whole[:-20], whole.replace(b'"size":1', b'"size":2'), b""):
        artifacts.objects.put(key, damaged)
        with pytest.raises(IntegrityError, match=r"manifest.json was altered or truncated"):
            artifacts.find(REF)
    assert "manifest.json" in artifacts.verify(REF)[0]
    artifacts.objects.put(manifest_key("model", "b" * 64), whole)
    with pytest.raises(IntegrityError, match="is the manifest of model/aaa"):
        artifacts.find(ArtifactRef(kind="model", digest="b" * 64))


def test_the_content_digest_ignores_logs_alone(artifacts: Artifacts) -> None:
    def digest(name: str, files: dict[str, bytes]) -> str:
        return write(artifacts, files, ref=ArtifactRef(kind="model", digest=name * 64)).content

    base = digest("1", {"a": b"1", "logs/t": b"now"})
    assert digest("2", {"a": b"1", "logs/t": b"then", "logs/u": b""}) == base
    assert digest("3", {"a": b"2", "logs/t": b"now"}) != base
    assert digest("4", {"b": b"1", "logs/t": b"now"}) != base
    assert digest("5", {"a": b"1", "logs.txt": b""}) != base


def test_a_broken_fetch_goes_on_where_it_stopped(s3_store: StoreConfig, tmp_path: Path) -> None:
    artifacts = open_artifacts(s3_store)
    data = os.urandom(4 * PART)
    write(artifacts, {"w": data})
    killed = f"""
import os
from pathlib import Path
from rlhf_api.stage import ArtifactRef, StoreConfig
from rlhf_store.artifacts import open_artifacts
artifacts = open_artifacts(StoreConfig.model_validate_json({s3_store.model_dump_json()!r}))
real = artifacts.objects.get
def get(key, start=0, length=None):
    if start >= {2 * PART}:
        while not any(f.stat().st_size == {2 * PART} for f in Path({str(tmp_path)!r}, "out").glob(".w.*")):
            pass
        os.kill(os.getpid(), 9)
    return real(key, start, length)
artifacts.objects.get = get
artifacts.fetch(ArtifactRef(kind="model", digest="a" * 64), Path({str(tmp_path)!r}, "out"))
"""
    assert subprocess.run([sys.executable, "-c", killed], timeout=60).returncode == -9
    asked = []
    real = artifacts.objects.get

    def get(key: str, start: int = 0, length: int | None = None) -> bytes:
        asked.append(start)
        return real(key, start, length)

    artifacts.objects.get = get  # type: ignore[method-assign]  # only watches
    artifacts.fetch(REF, tmp_path / "out")
    assert content(tmp_path / "out") == {"w": data}
    assert [start for start in asked if start] == [2 * PART, 3 * PART]


def test_a_second_fetch_repairs_what_was_changed(artifacts: Artifacts, tmp_path: Path) -> None:
    write(artifacts, {"a": b"right", "b": b"left"})
    artifacts.fetch(REF, tmp_path / "out")
    (tmp_path / "out" / "a").write_bytes(b"wrong")
    assert content(artifacts.fetch(REF, tmp_path / "out")) == {"a": b"right", "b": b"left"}


def test_large_files_of_a_folder_are_not_copied(file_store: StoreConfig, tmp_path: Path) -> None:
    artifacts = open_artifacts(file_store)
    write(artifacts, {"large": bytes(2 << 20), "small": b"1"})
    artifacts.fetch(REF, tmp_path / "out")
    assert (tmp_path / "out" / "large").stat().st_nlink == 2
    assert (tmp_path / "out" / "small").stat().st_nlink == 1


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", "a//b", "", ".", "a\\b", "checkpoints/1/x", "a\nb"])
def test_paths_stay_inside_the_artifact(file_store: StoreConfig, path: str) -> None:
    with pytest.raises(ValueError, match=r"checkpoints|relative path"):
        open_artifacts(file_store).writer(REF, "1").add_bytes(path, b"")


def test_list_knows_every_whole_artifact(artifacts: Artifacts) -> None:
    refs = [ArtifactRef(kind=kind, digest=d * 64) for kind, d in (("model", "c"), ("model", "b"), ("policy", "a"))]
    for ref in refs:
        write(artifacts, {"a": b"1"}, ref=ref)
    artifacts.writer(ArtifactRef(kind="model", digest="e" * 64), "1").add_bytes("a", b"")
    assert [m.ref for m in artifacts.list()] == [refs[1], refs[0], refs[2]]
    assert [m.ref for m in artifacts.list("policy")] == [refs[2]]


def test_metadata_without_a_json_form_are_refused(file_store: StoreConfig) -> None:
    writer = open_artifacts(file_store).writer(REF, "1")
    with pytest.raises(ValueError, match="JSON compliant"):
        writer.commit({"metrics": {"loss": float("nan")}})


def test_an_unwritable_folder_is_named() -> None:
    with pytest.raises(StoreError, match=r"file:///proc/rlhf"):
        open_artifacts(StoreConfig(url="file:///proc/rlhf"))
