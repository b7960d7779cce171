"""Fingerprints: equal for equal bytes, different for different ones, and not computed twice."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rlhf_api.errors import UserError
from rlhf_operator.fingerprints import fingerprints

if TYPE_CHECKING:
    from conftest import Bench  # type: ignore[import-not-found]


def of(bench: "Bench", **spec: Any) -> dict[str, str]:
    return fingerprints(bench.resource(**spec), bench.home.fingerprint_cache)


def age(*files: Path) -> None:
    for file in files:
        os.utime(file, (1e9, 1e9))


def test_only_stages_with_a_local_source_have_one(bench: "Bench") -> None:
    assert of(bench).keys() == {"import-model", "import-prompts"}
    assert of(bench, model={"source": "hf://owner/model"}).keys() == {"import-prompts"}


def test_it_follows_the_bytes_not_the_time(bench: "Bench") -> None:
    first = of(bench)
    age(bench.folder / "reviews.csv")
    assert of(bench) == first
    (bench.folder / "reviews.csv").write_text("text,label\nfine,0\nbad,0\n")
    changed = of(bench)
    assert changed["import-prompts"] != first["import-prompts"]
    assert changed["import-model"] == first["import-model"]


def test_a_folder_counts_names_and_bytes(bench: "Bench") -> None:
    first = of(bench)["import-model"]
    (bench.folder / "model" / "config.json").rename(bench.folder / "model" / "other.json")
    second = of(bench)["import-model"]
    (bench.folder / "model" / "more.json").write_text("{}")
    assert len({first, second, of(bench)["import-model"]}) == 3


def test_a_file_that_looks_the_same_is_not_read_again(bench: "Bench") -> None:
    age(bench.folder / "reviews.csv", bench.folder / "model" / "config.json")
    of(bench)
    cache = bench.home.fingerprint_cache
    known = json.loads(cache.read_text())
    known[str(bench.folder / "reviews.csv")][2] = "remembered"
    cache.write_text(json.dumps(known))
    assert of(bench)["import-prompts"] == "remembered"


def test_a_file_changed_just_now_is_not_remembered(bench: "Bench") -> None:
    of(bench)
    assert not bench.home.fingerprint_cache.exists()


def test_a_broken_cache_is_no_harm(bench: "Bench") -> None:
    first = of(bench)
    bench.home.path.mkdir()
    bench.home.fingerprint_cache.write_text("{")
    assert of(bench) == first


def test_a_package_is_found_without_importing_it(bench: "Bench", monkeypatch: pytest.MonkeyPatch) -> None:
    package = bench.folder / "site" / "shipped_reviews"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('imported')")
    (package / "data" / "reviews.csv").write_bytes((bench.folder / "reviews.csv").read_bytes())
    monkeypatch.syspath_prepend(bench.folder / "site")
    source = {"prompts": {"source": "package://shipped_reviews/data/reviews.csv", "promptColumn": "text"}}
    assert of(bench, data=source)["import-prompts"] == of(bench)["import-prompts"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("package://no_such_package/a.csv", "no Python package 'no_such_package' is installed"),
        ("package://pydantic/no.csv", "does not exist"),
        ("file:///no/such.csv", r"spec\.data\.prompts\.source: file:///no/such\.csv: /no/such\.csv does not exist"),
    ],
)
def test_a_source_that_is_not_there_is_named(bench: "Bench", source: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        of(bench, data={"prompts": {"source": source}})
