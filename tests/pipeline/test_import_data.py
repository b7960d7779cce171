"""Tables become train and held-out rows: deterministic, disjoint, checked."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hub_server import serve_hub
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_runs import OUTPUTS, StageRuns
from tiny import build_tiny_model, build_tokenizer
from transformers import AutoTokenizer

from rlhf_api.errors import UserError
from rlhf_api.run import LabelledData, PreferenceData, PromptData, SFTData
from rlhf_api.stage import ArtifactKind, ArtifactRef
from rlhf_pipeline.model_folder import save_tokenizer
from rlhf_pipeline.splits import hold_out, in_range
from rlhf_pipeline.tokens import Encoder

ROWS = [
    {"text": f"film number {i} is {'good' if i % 2 else 'bad'}", "label": i % 2, "site": "ab"[i % 3 == 0]}
    for i in range(300)
]


class Imports:
    """Runs import-data on tables in a folder."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.patch, self.runs = root, monkeypatch, StageRuns(root)
        folder = root / "model"
        folder.mkdir()
        facts = save_tokenizer(build_tokenizer(folder), None, 384, folder)
        (folder / "report.json").write_text(json.dumps({"tokenizer": facts}))
        self.model: ArtifactRef = self.runs.put("model", folder)

    def table(self, rows: list[dict[str, Any]], name: str = "rows.parquet") -> str:
        pq.write_table(pa.Table.from_pylist(rows), self.root / name)
        return f"file://{self.root}/{name}"

    def run(self, kind: ArtifactKind, **settings: Any) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any], str]:
        """The two parts' rows, the report and the content digest."""
        self.patch.setitem(OUTPUTS, "import-data", kind)
        manifest = self.runs.run(self.runs.config("import-data", {"model": self.model}, **settings))
        folder = self.runs.fetch(manifest)
        parts = {part: pq.read_table(folder / f"{part}.parquet").to_pylist() for part in ("train", "heldout")}
        return parts, json.loads((folder / "report.json").read_text()), manifest.content

    def again(self) -> "Imports":
        """The same imports into an empty store."""
        self.runs = StageRuns(self.root / "again")
        self.model = self.runs.put("model", self.root / "model")
        return self


@pytest.fixture
def imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Imports:
    return Imports(tmp_path, monkeypatch)


def texts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["text"] for row in rows]


def test_every_text_is_in_one_part_and_blank_or_repeated_ones_are_counted(imports: Imports) -> None:
    extra = [{"text": " \n", "label": 0, "site": "a"}, {"text": None, "label": 0, "site": "a"}, ROWS[5], ROWS[6]]
    source = imports.table(ROWS + extra)
    parts, report, _ = imports.run("sft-data", sft_data=SFTData(source=source, held_out=0.2))
    assert sorted(texts(parts["train"]) + texts(parts["heldout"])) == sorted(texts(ROWS))
    assert 30 <= len(parts["heldout"]) <= 90
    assert (report["rows"], report["empty"], report["duplicates"]) == (304, 2, 2)
    assert report["tokens"]["min"] <= report["tokens"]["median"] <= report["tokens"]["p95"] <= report["tokens"]["max"]


def test_the_same_import_gives_the_same_bytes(imports: Imports) -> None:
    data = SFTData(source=imports.table(ROWS))
    first = imports.run("sft-data", sft_data=data)[2]
    assert imports.again().run("sft-data", sft_data=data)[2] == first


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "rows.jsonl", "rows.jsonl.gz"])
def test_every_format_gives_the_rows_of_parquet(imports: Imports, name: str) -> None:
    rows = [
        {"text": 'a "quoted"\nline, with é', "label": 1},
        {"text": "1984", "label": 0},
        {"text": "true", "label": 1},
    ]
    expected, _, _ = imports.run("sft-data", sft_data=SFTData(source=imports.table(rows), held_out=0))
    file = imports.root / name
    if "csv" in name:
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows), imports.root / "plain")
    else:
        (imports.root / "plain").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    content = (imports.root / "plain").read_bytes()
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    parts, _, _ = imports.run("sft-data", sft_data=SFTData(source=f"file://{file}", held_out=0))
    assert parts == expected
    assert sorted(texts(parts["train"])) == sorted(texts(rows))


def test_where_and_limit_keep_what_they_say(imports: Imports) -> None:
    data = SFTData(source=imports.table(ROWS), where={"site": "a", "label": 1}, limit=30, held_out=0.1)
    parts, _, _ = imports.run("sft-data", sft_data=data)
    kept = {row["text"] for row in ROWS if row["site"] == "a" and row["label"] == 1}
    assert len(parts["train"] + parts["heldout"]) == 30
    assert set(texts(parts["train"] + parts["heldout"])) <= kept


@given(st.lists(st.text(max_size=5), max_size=50), st.integers(0, 100))
@settings(max_examples=50)
def test_ranges_split_the_rows_and_share_no_text(rows: list[str], cut: int) -> None:
    low, high = in_range(rows, f"0%:{cut}%"), in_range(rows, f"{cut}%:100%")
    assert sorted(low + high) == list(range(len(rows)))
    assert not {rows[i] for i in low} & {rows[i] for i in high}


@given(st.lists(st.text(max_size=5), min_size=1, max_size=50), st.floats(0.001, 1))
@settings(max_examples=50)
def test_held_out_rows_share_no_text_with_the_others(rows: list[str], fraction: float) -> None:
    split = hold_out(rows, range(len(rows)), fraction)
    assert sorted(split.train + split.held_out) == list(range(len(rows)))
    assert split.held_out
    assert not {rows[i] for i in split.train} & {rows[i] for i in split.held_out}


def test_ranges_share_no_text_whatever_else_is_filtered(imports: Imports) -> None:
    source = imports.table(ROWS)
    low, _, _ = imports.run("sft-data", sft_data=SFTData(source=source, rows="0%:50%", where={"site": "a"}))
    high, _, _ = imports.run("sft-data", sft_data=SFTData(source=source, rows="50%:100%"))
    mine, others = (set(texts(parts["train"] + parts["heldout"])) for parts in (low, high))
    assert mine
    assert others
    assert not mine & others


def labelled(source: str, **more: Any) -> PreferenceData:
    return PreferenceData(source=source, text_column="text", label_column="label", chosen_label=1, **more)


def test_pairs_from_labels_prefer_the_chosen_label_and_use_each_text_once(imports: Imports) -> None:
    parts, report, _ = imports.run("preference-data", preference_data=labelled(imports.table(ROWS), held_out=0.2))
    good = {row["text"] for row in ROWS if row["label"] == 1}
    used = []
    for row in parts["train"] + parts["heldout"]:
        assert row["prompt"] == ""
        assert row["chosen"] in good
        assert row["rejected"] not in good
        used += [row["chosen"], row["rejected"]]
    assert len(used) == len(set(used))
    assert len(used) + report["unpaired"] == len(ROWS)
    assert len(parts["train"]) > 80
    assert parts["heldout"]


def test_pairs_depend_on_the_seed_alone(imports: Imports) -> None:
    data = labelled(imports.table(ROWS))
    first, second = (imports.run("preference-data", preference_data=data, seed=seed) for seed in (1, 2))
    assert first[0]["train"] != second[0]["train"]
    assert imports.again().run("preference-data", preference_data=data, seed=1)[2] == first[2]


def test_the_limit_counts_pairs(imports: Imports) -> None:
    data = labelled(imports.table(ROWS), limit=20)
    parts, _, _ = imports.run("preference-data", preference_data=data)
    assert 10 <= len(parts["train"]) + len(parts["heldout"]) <= 20


def test_pairs_from_labels_stay_within_their_prompt(imports: Imports) -> None:
    rows = [{**row, "question": f"question {i % 20}?"} for i, row in enumerate(ROWS)]
    rows = [{**row, "label": int(i % 3 == 0)} for i, row in enumerate(rows)]
    data = labelled(imports.table(rows), prompt_column="question", held_out=0.3)
    parts, _, _ = imports.run("preference-data", preference_data=data)
    question = {row["text"]: row["question"] for row in rows}
    for row in parts["train"] + parts["heldout"]:
        assert question[row["chosen"]] == question[row["rejected"]] == row["prompt"]
    assert not {row["prompt"] for row in parts["train"]} & {row["prompt"] for row in parts["heldout"]}


def test_pairs_as_columns_are_kept_and_equal_ones_dropped(imports: Imports) -> None:
    rows = [{"q": f"q{i}", "better": f"yes {i}", "worse": f"no {i}"} for i in range(40)]
    rows.append({"q": "q", "better": "same", "worse": "same"})
    columns = {"chosen_column": "better", "rejected_column": "worse", "prompt_column": "q"}
    data = PreferenceData(source=imports.table(rows), held_out=0.2, **columns)
    parts, report, _ = imports.run("preference-data", preference_data=data)
    assert report["equal_pairs"] == 1
    got = {(row["prompt"], row["chosen"], row["rejected"]) for row in parts["train"] + parts["heldout"]}
    assert got == {(f"q{i}", f"yes {i}", f"no {i}") for i in range(40)}


def test_prompts_come_with_the_ids_of_the_models_tokenizer(imports: Imports) -> None:
    data = PromptData(source=imports.table(ROWS), prompt_column="text")
    parts, _, _ = imports.run("prompt-data", prompt_data=data, prompt_tokens=64)
    tokenizer = AutoTokenizer.from_pretrained(imports.root / "model")
    for row in parts["train"] + parts["heldout"]:
        assert row["input_ids"] == tokenizer(row["prompt"])["input_ids"]
    assert len(parts["train"] + parts["heldout"]) == len(ROWS)


def test_a_prompt_that_is_too_long_is_an_error_that_says_what_to_set(imports: Imports) -> None:
    source = imports.table([*ROWS, {"text": "very " * 50, "label": 0, "site": "a"}])
    with pytest.raises(UserError, match=r"1 of 301 prompts .* ppo\.promptTokens 40.*overflow"):
        imports.run("prompt-data", prompt_data=PromptData(source=source, prompt_column="text"), prompt_tokens=40)


@pytest.mark.parametrize("overflow", ["truncate", "drop"])
def test_too_long_prompts_are_cut_or_dropped(imports: Imports, overflow: str) -> None:
    source = imports.table([*ROWS, {"text": "very " * 50, "label": 0, "site": "a"}])
    data = PromptData(source=source, prompt_column="text", overflow=overflow)
    parts, report, _ = imports.run("prompt-data", prompt_data=data, prompt_tokens=40)
    rows = parts["train"] + parts["heldout"]
    assert report["too_long"] == 1
    assert max(len(row["input_ids"]) for row in rows) <= 40
    cut = [row["prompt"] for row in rows if row["prompt"].startswith("very")]
    assert len(rows) == (301 if overflow == "truncate" else 300)
    assert bool(cut) == (overflow == "truncate")
    assert all(prompt != "very " * 50 and ("very " * 50).startswith(prompt) for prompt in cut)


def test_prompts_that_are_equal_once_cut_are_one_prompt(imports: Imports) -> None:
    rows = [{"text": f"{i % 40:02d} and then {i}"} for i in range(300)]
    data = PromptData(source=imports.table(rows), prompt_column="text", overflow="truncate", held_out=0.3)
    parts, report, _ = imports.run("prompt-data", prompt_data=data, prompt_tokens=3)
    ids = [tuple(row["input_ids"]) for row in parts["train"] + parts["heldout"]]
    assert len(ids) == len(set(ids)) == 40
    assert report["duplicates"] == 260


def test_labels_become_whether_they_are_the_chosen_one(imports: Imports) -> None:
    rows = [{"text": row["text"], "label": "pos" if row["label"] else "neg"} for row in ROWS]
    data = LabelledData(source=imports.table(rows), chosen_label="pos")
    parts, _, _ = imports.run("evaluation-data", evaluation_data=data)
    assert {row["text"]: row["label"] for row in parts["train"] + parts["heldout"]} == {
        row["text"]: row["label"] == 1 for row in ROWS
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_column": "txet"}, r"data\.sft: there is no column 'txet'.*did you mean 'text'"),
        ({"text_column": "label"}, "'label' holds int64, not text"),
        ({"where": {"sight": "a"}}, r"no column 'sight'.*did you mean 'site'"),
        ({"where": {"site": "z"}}, r"where\.site: no row has the value 'z'; the column has \['.*'\]"),
        ({"where": {"label": "good"}}, "'good' is no int64"),
        ({"rows": "50%:50%"}, r"data\.sft\.rows: 50%:50% holds none"),
        ({"held_out": 1.0}, "no row is left to train on"),
    ],
)
def test_what_a_table_cannot_give_is_an_error(imports: Imports, change: dict[str, Any], message: str) -> None:
    source = imports.table(ROWS)
    with pytest.raises(UserError, match=message):
        imports.run("sft-data", sft_data=SFTData(source=source, **change))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", b"text\nhello\n", "no known extension"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("rows.jsonl", b'["a"]\n', "line 1 is no JSON object"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": 1}\n', "'text' mixes types"),
        ("rows.csv", b"text,label\na,1\nb\n", "cannot be read as csv"),
        ("rows.csv", b"", "cannot be read as csv"),
        ("rows.csv", b"text,label\n", "has no rows"),
        ("rows.csv.gz", b"text\na\n", "cannot be read as csv"),
        ("rows.parquet", b"PAR1 not really", "cannot be read as parquet"),
        ("rows.jsonl", b'{"text": "  "}\n', "all 1 rows are empty"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error(imports: Imports, name: str, content: bytes, message: str) -> None:
    (imports.root / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        imports.run("sft-data", sft_data=SFTData(source=f"file://{imports.root}/{name}"))


def test_a_missing_file_is_an_error_that_lists_its_neighbours(imports: Imports) -> None:
    imports.table(ROWS)
    with pytest.raises(UserError, match=r"row\.parquet does not exist; .* has rows\.parquet"):
        imports.run("sft-data", sft_data=SFTData(source=f"file://{imports.root}/row.parquet"))


def test_a_label_that_nothing_has_is_an_error_with_the_labels(imports: Imports) -> None:
    data = labelled(imports.table(ROWS)).model_copy(update={"chosen_label": 7})
    with pytest.raises(UserError, match=r"chosenLabel: 7 must split.*0 150 times"):
        imports.run("preference-data", preference_data=data)


def test_a_hub_data_set_gives_the_rows_of_its_files(imports: Imports, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _, _ = imports.run("sft-data", sft_data=SFTData(source=imports.table(ROWS)))
    folder = imports.root / "reviews"
    folder.mkdir()
    for part, rows in (("train-00000-of-00002", ROWS[:200]), ("train-00001-of-00002", ROWS[200:]), ("test", ROWS)):
        imports.table(rows, f"reviews/{part}.parquet")
    with serve_hub(monkeypatch) as hub:
        hub.datasets["me/reviews"] = folder
        source = "hf://datasets/me/reviews"
        parts, report, _ = imports.run("sft-data", sft_data=SFTData(source=source, revision="main"))
        with pytest.raises(UserError, match=r"data\.sft: there is no column 'txet'.*did you mean 'text'"):
            imports.run("sft-data", sft_data=SFTData(source=source, text_column="txet"))
    assert parts == expected
    assert (report["source"], report["rows"]) == (source, 300)


@pytest.mark.s3
def test_a_table_in_a_bucket_is_read(imports: Imports, s3_store: Any) -> None:
    from rlhf_store.artifacts import open_artifacts

    imports.table(ROWS)
    open_artifacts(s3_store).objects.put_file("tables/rows.parquet", imports.root / "rows.parquet")
    imports.runs.store = s3_store
    imports.runs.artifacts = open_artifacts(s3_store)
    imports.model = imports.runs.put("model", imports.root / "model")
    parts, _, _ = imports.run("sft-data", sft_data=SFTData(source=f"{s3_store.url}/tables/rows.parquet"))
    assert len(parts["train"] + parts["heldout"]) == len(ROWS)


def test_the_encoder_gives_the_ids_of_transformers(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model", "llama")
    (folder / "report.json").write_text('{"tokenizer": {"eos_token_id": 1}}')
    lines = ["the film is a warm story", "é\n\ttabs", "", "<eos> inside"]
    ids = Encoder(folder).encode(lines)
    assert ids == AutoTokenizer.from_pretrained(folder)(lines)["input_ids"]
    assert Encoder(folder).decode(ids)[:2] == lines[:2]


def test_a_table_needs_no_torch(imports: Imports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "torch.py").write_text("raise ImportError('torch takes longer to import than this table')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "none"))
    monkeypatch.setitem(OUTPUTS, "import-data", "sft-data")
    config = imports.runs.config("import-data", {"model": imports.model}, sft_data=SFTData(source=imports.table(ROWS)))
    assert imports.runs.start(config).wait(60) == 0
