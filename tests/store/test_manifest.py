"""The manifest and the layout, as properties."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rlhf_api import layout
from rlhf_api.stage import ArtifactRef
from rlhf_store.manifest import FileEntry, Manifest, checked_path, content_digest
from rlhf_store.transfer import selected

digests = st.text("0123456789abcdef", min_size=64, max_size=64)
names = st.text(string.ascii_letters + string.digits + "._-é ", min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..", layout.CHECKPOINTS)
)
paths = st.lists(names, min_size=1, max_size=4).map("/".join)
entries = st.builds(FileEntry, size=st.integers(0, 2**60), sha256=digests)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    files = draw(st.dictionaries(paths, entries, max_size=5))
    return Manifest(
        kind="policy",
        digest=draw(digests),
        attempt="1-abc",
        created_at=draw(st.floats(0, 1e10)),
        files=files,
        content=content_digest(files),
        metadata=draw(st.dictionaries(st.text(), json_values, max_size=3)),
    )


@given(manifests())
def test_a_manifest_survives_its_bytes(manifest: Manifest) -> None:
    assert Manifest.model_validate_json(manifest.to_bytes()) == manifest
    assert Manifest.model_validate_json(manifest.to_bytes()).to_bytes() == manifest.to_bytes()


@given(manifests(), st.data())
def test_no_cut_of_a_manifest_is_a_manifest(manifest: Manifest, data: st.DataObject) -> None:
    whole = manifest.to_bytes()
    with pytest.raises(ValidationError):
        Manifest.model_validate_json(whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(st.dictionaries(paths, entries, max_size=5), paths, entries, entries)
def test_content_is_what_lies_outside_logs(
    files: dict[str, FileEntry], path: str, entry: FileEntry, other: FileEntry
) -> None:
    base = content_digest(files)
    assert content_digest(dict(reversed(files.items()))) == base
    assert content_digest({**files, f"logs/{path}": entry}) == base
    outside = f"output/{path}"
    one, two = content_digest({**files, outside: entry}), content_digest({**files, outside: other})
    assert (one == two) == (entry == other)


@given(paths)
def test_good_paths_pass_and_their_escapes_do_not(path: str) -> None:
    assert checked_path(path) == path
    for bad in (f"/{path}", f"{path}/", f"../{path}", f"{path}/../x", f"{path}//x", f"./{path}", f"checkpoints/{path}"):
        with pytest.raises(ValueError, match=r"relative path|checkpoints"):
            checked_path(bad)


@given(digests, names, st.integers(0, 10**8 - 1), st.integers(0, 10**8 - 1))
def test_checkpoint_prefixes_sort_by_step_and_lie_under_their_attempt(
    digest: str, attempt: str, one: int, two: int
) -> None:
    first, second = (layout.checkpoint_prefix("policy", digest, attempt, step) for step in (one, two))
    assert (first < second) == (one < two)
    assert first.startswith(layout.attempt_prefix("policy", digest, attempt))
    assert layout.manifest_key("policy", digest).startswith(layout.artifact_prefix("policy", digest))


@given(st.lists(paths, unique=True))
def test_patterns_select_a_part(everything: list[str]) -> None:
    assert selected(everything, None) == selected(everything, ["*"]) == sorted(everything)
    assert selected(everything, []) == []
    json = selected(everything, ["*.json"])
    assert json == sorted(path for path in everything if path.endswith(".json"))


def test_a_manifest_whose_content_is_not_of_its_files_is_refused() -> None:
    with pytest.raises(ValidationError, match="content is not the digest of files"):
        Manifest(kind="model", digest="a" * 64, attempt="1", created_at=0, files={}, content="0" * 64)
    assert ArtifactRef(kind="model", digest="a" * 64)
