"""Tables of hub data sets: a file by name, or one split of a repository, and what is said of what is not there."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hub_server import COMMIT, Hub, serve_hub

from rlhf_api.errors import StoreError, UserError
from rlhf_api.run import SFTData
from rlhf_api.stage import StoreConfig
from rlhf_pipeline.data_sets import split_files
from rlhf_pipeline.tables import read_table

SOURCE = "hf://datasets/me/reviews"


def rows(word: str, count: int = 3) -> list[dict[str, Any]]:
    return [{"text": f"{word} {i}", "label": i % 2} for i in range(count)]


def write(file: Path, table: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    match file.suffix:
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(table), file)
        case ".csv":
            pyarrow.csv.write_csv(pa.Table.from_pylist(table), file)
        case _:
            file.write_text("".join(json.dumps(row) + "\n" for row in table))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub(monkeypatch) as hub:
        yield hub


@pytest.fixture
def repository(hub: Hub, tmp_path: Path) -> Path:
    """The folder of me/reviews, empty but for its card."""
    folder = hub.datasets["me/reviews"] = tmp_path / "reviews"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\nReviews.\n")
    return folder


def read(tmp_path: Path, source: str = SOURCE, **more: Any) -> list[str]:
    """The texts of a table."""
    data = SFTData(source=source, **more)
    table = read_table(data, "data.sft", ["text"], tmp_path / "work", StoreConfig(url=f"file://{tmp_path}/store"))
    texts: list[str] = table.column("text").to_pylist()
    return texts


@pytest.mark.parametrize("name", ["reviews.parquet", "reviews.csv", "data/reviews.jsonl"])
def test_a_file_of_a_data_set_is_read(hub: Hub, repository: Path, tmp_path: Path, name: str) -> None:
    for file in ("reviews.parquet", "reviews.csv", "data/reviews.jsonl"):
        write(repository / file, rows(file))
    assert read(tmp_path, f"{SOURCE}/{name}") == [row["text"] for row in rows(name)]
    assert hub.asked == [name]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_data_set_gives_the_files_of_its_split(
    hub: Hub, repository: Path, tmp_path: Path, suffix: str, split: str
) -> None:
    for part in ("train", "test"):
        for shard in range(2):
            write(repository / f"data/{part}-{shard:05}-of-00002{suffix}", rows(f"{part} {shard}"))
    expected = [row["text"] for shard in range(2) for row in rows(f"{split} {shard}")]
    assert read(tmp_path, split=split, revision="main") == expected
    assert not [name for name in hub.asked if name.startswith("data/") and split not in name]


def test_the_card_says_what_the_split_is(repository: Path, tmp_path: Path) -> None:
    card = """---
configs:
- config_name: short
  data_files: [{split: train, path: "a/*.jsonl"}]
- config_name: long
  default: true
  data_files:
  - {split: train, path: ["b/one.jsonl", "c/**"]}
  - {split: test, path: a/test.jsonl}
---
"""
    (repository / "README.md").write_text(card)
    for file in ("a/test", "a/deep/er", "b/one", "b/two", "c/d/e/three"):
        write(repository / f"{file}.jsonl", rows(file, 1))
    assert read(tmp_path) == ["b/one 0", "c/d/e/three 0"]
    assert read(tmp_path, split="test") == ["a/test 0"]
    assert read(tmp_path, f"{SOURCE}/short") == ["a/test 0"]
    (repository / "README.md").write_text(card.replace("default: true", "description: all"))
    (tmp_path / "work" / "README.md").unlink()
    with pytest.raises(UserError, match=f"{SOURCE} has the subsets short, long; name one, such as {SOURCE}/short"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["a.csv", "b.csv"], "train", ["a.csv", "b.csv"]),
        (["train.csv", "test.csv", "codes.csv"], "train", ["train.csv"]),
        (["train.csv", "dev.csv"], "validation", ["dev.csv"]),
        (["x/train/1.json", "x/eval/1.json"], "test", ["x/eval/1.json"]),
        (
            ["b/train.jsonl.gz", "a/train.jsonl.gz", "a/test.jsonl.gz"],
            "train",
            ["a/train.jsonl.gz", "b/train.jsonl.gz"],
        ),
        (["d/train_sft-00000-of-00001.parquet", "d/train_gen-00000-of-00001.parquet"], "train_gen", None),
        (["p/unsupervised-00000-of-00001-a1.parquet", "p/train-00000-of-00001.parquet"], "train", None),
        (["holdout.csv", "pretraining.csv", "train.csv"], "holdout", ["holdout.csv"]),
        ([".cache/train.csv", "a/__x/train.csv", "train.csv"], "train", ["train.csv"]),
        (["data/test/x-test.csv", "data/train/x-test.csv"], "train", ["data/train/x-test.csv"]),
        (["reviews.csv", "dataset_infos.json"], "train", ["reviews.csv"]),
    ],
)
def test_the_names_of_files_say_what_the_split_is(names: list[str], split: str, expected: list[str] | None) -> None:
    assert split_files(SOURCE, names, "", "", split) == (expected or names[1:])


@pytest.mark.parametrize(
    "names",
    [
        "a.csv b.csv",
        "train.csv test.csv codes.csv",
        "my_train_set.csv my-test-set.csv dev.csv",
        "train1.csv train2.csv 2024-eval.csv",
        "holdout.csv pretraining.csv train.csv",
        "b/train.jsonl.gz a/train.jsonl.gz a/test.jsonl.gz",
        "training/a.csv valid/b.csv test.csv",
        "data/train/x-test.csv data/test/x-test.csv",
        "data/train_sft-00000-of-00001.parquet data/train_gen-00000-of-00001.parquet train.parquet",
        "reviews.csv dataset_infos.json .cache/x.csv __x/y.csv",
    ],
)
def test_the_splits_are_those_that_the_hubs_own_library_finds(tmp_path: Path, names: str) -> None:
    from datasets.data_files import DataFilesDict, get_data_patterns

    for name in names.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = DataFilesDict.from_patterns(get_data_patterns(str(tmp_path)), base_path=str(tmp_path))
    for split in {"train", "validation", "test", *found}:
        theirs = sorted(str(Path(file).relative_to(tmp_path)) for file in found.get(split, []))
        if theirs:
            assert split_files(SOURCE, names.split(), "", "", split) == theirs
        else:
            with pytest.raises(UserError, match="is no split"):
                split_files(SOURCE, names.split(), "", "", split)


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        (["reviews.txt"], {}, r"source: {source} has no table; it has README\.md, reviews\.txt; known are \.parquet"),
        (
            ["a.parquet", "a.csv", "a.jsonl"],
            {},
            r"source: {source} has 'train' in several formats: a\.csv, a\.jsonl, a\.parquet; name one: {source}/a\.csv",
        ),
        (["train.csv", "test.csv"], {"split": "dev"}, "split: 'dev' is no split of {source}; it has train, test"),
        (
            ["a/train.csv"],
            {"source": SOURCE + "/b"},
            r"{source}/b is no table, subset or folder of {source}; it has a/tr",
        ),
        (
            ["a/train.csv"],
            {"source": SOURCE + "/train.csv"},
            r"source: {source}/train\.csv does not exist; {source} has README\.md, a/train\.csv",
        ),
        ([], {"source": "hf://datasets/me/none"}, "source: hf://datasets/me/none is not on the hub, or it is private"),
        ([], {"source": "hf://datasets/me/none/a.csv"}, "source: hf://datasets/me/none is not on the hub"),
        ([], {"source": "hf://datasets/reviews"}, "hf://datasets/reviews names no .* write hf://datasets/owner/name"),
        (["a.csv"], {"revision": "v9"}, "revision: 'v9' is no commit, tag or branch of {source}"),
    ],
)
def test_what_a_data_set_lacks_is_an_error(
    repository: Path, tmp_path: Path, names: list[str], more: dict[str, Any], message: str
) -> None:
    for name in names:
        write(repository / name, rows(name))
    with pytest.raises(UserError, match=message.format(source=SOURCE)):
        read(tmp_path, **more)


def test_files_whose_columns_differ_are_an_error(repository: Path, tmp_path: Path) -> None:
    write(repository / "a/train.jsonl", rows("a"))
    write(repository / "b/train.jsonl", [{"text": "b", "stars": 3}])
    message = rf"{SOURCE}: a/train\.jsonl has the columns text, label, b/train\.jsonl has text, stars; name a folder"
    with pytest.raises(UserError, match=message):
        read(tmp_path)
    assert read(tmp_path, f"{SOURCE}/b") == ["b"]
    write(repository / "b/train.jsonl", [{"text": "b", "label": "good"}])
    (tmp_path / "work/b/train.jsonl").unlink()
    with pytest.raises(UserError, match=r"types differ between a/train\.jsonl, b/train\.jsonl"):
        read(tmp_path)


def test_a_card_that_cannot_be_read_is_an_error(repository: Path, tmp_path: Path) -> None:
    write(repository / "train.csv", rows("a"))
    (repository / "README.md").write_text("---\nconfigs: [{data_files: 3}]\n---\n")
    with pytest.raises(UserError, match=rf"the configs in README\.md of {SOURCE} cannot be read .*; name a file"):
        read(tmp_path)
    assert len(read(tmp_path, f"{SOURCE}/train.csv")) == 3


@pytest.mark.parametrize("name", ["", "/train.csv"])
def test_a_gated_data_set_is_an_error(hub: Hub, repository: Path, tmp_path: Path, name: str) -> None:
    write(repository / "train.csv", rows("a"))
    hub.gated.add("me/reviews")
    with pytest.raises(UserError, match=f"source: {SOURCE} is gated; accept its licence on the hub and set HF_TOKEN"):
        read(tmp_path, SOURCE + name)


@pytest.mark.parametrize("name", ["", "/train.csv"])
def test_no_hub_is_an_error_that_names_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=f"source: {SOURCE}.* could not be reached"):
        read(tmp_path, SOURCE + name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"source: {SOURCE} needs the hub and HF_HUB_OFFLINE is set"):
        read(tmp_path, SOURCE + name)


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [(401, UserError, r"refused it .*'401 .*HF_TOKEN"), (500, StoreError, r"'500 .*try again")],
)
def test_what_the_hub_answers_decides_whether_another_try_helps(
    hub: Hub, tmp_path: Path, status: int, kind: type[Exception], message: str
) -> None:
    hub.refuses = status
    with pytest.raises(kind, match=f"source: {SOURCE}: the hub .*{message}"):
        read(tmp_path)


def test_a_pinned_commit_is_read(hub: Hub, repository: Path, tmp_path: Path) -> None:
    write(repository / "train.csv", rows("a"))
    assert len(read(tmp_path, revision=COMMIT)) == 3
    assert hub.asked == ["README.md", "train.csv"]
