"""Turns a table into the train and held-out rows of a stage: texts, pairs, prompts or labelled texts."""

import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_api.canonical import canonical_json
from rlhf_api.errors import UserError
from rlhf_api.run import Data, LabelledData, PreferenceData, PromptData, SFTData
from rlhf_pipeline.splits import Split, hold_out, in_range, without_duplicates
from rlhf_pipeline.stage_process import Stage
from rlhf_pipeline.tables import check_column, equals, read_table
from rlhf_pipeline.tokens import TOKENIZER_FILES, Encoder

MEASURED = 5000  # rows whose tokens are counted for the report
MARKUP = re.compile(r"<[A-Za-z/][^<>]*>")
Rows = dict[str, list[Any]]


@dataclass(frozen=True)
class Made:
    """What became of a table: the two parts, the texts whose lengths are reported, and why rows are gone."""

    train: Rows
    held_out: Rows
    measured: list[str] | list[list[int]]
    figures: dict[str, Any] = field(default_factory=dict)


def import_table(stage: Stage) -> dict[str, float]:
    """Write train.parquet, heldout.parquet and report.json of the one table that the settings name.

    Returns the numbers of rows. The same settings and source give the same bytes.
    """
    settings = stage.settings
    stage.progress.update(phase="reading the table")
    encoder = Encoder(stage.input("model", include=list(TOKENIZER_FILES)))
    source = stage.work / "source"

    def read(data: Data, where: str, texts: Sequence[str]) -> Any:
        return read_table(data, where, texts, source, stage.config.store)

    schema = {"text": pa.string()}
    data: Data
    if sft := settings.sft_data:
        data, made = sft, sft_rows(read(sft, "data.sft", [sft.text_column]), sft)
    elif pairs := settings.preference_data:
        data, made = pairs, preference_rows(read(pairs, "data.preferences", _text_columns(pairs)), pairs, settings.seed)
        schema = dict.fromkeys(("prompt", "chosen", "rejected"), pa.string())
    elif prompts := settings.prompt_data:
        assert settings.prompt_tokens
        table = read(prompts, "data.prompts", [prompts.prompt_column])
        data, made = prompts, prompt_rows(table, prompts, encoder, settings.prompt_tokens)
        schema = {"prompt": pa.string(), "input_ids": pa.list_(pa.int32())}
    else:
        labelled = settings.evaluation_data
        assert labelled
        data, made = labelled, labelled_rows(read(labelled, "data.evaluation", [labelled.text_column]), labelled)
        schema = {"text": pa.string(), "label": pa.bool_()}

    stage.progress.update(phase="writing rows")
    rows = {}
    for name, part in (("train", made.train), ("heldout", made.held_out)):
        table = pa.table({column: pa.array(part[column], kind) for column, kind in schema.items()})
        pq.write_table(table, stage.output / f"{name}.parquet", compression="zstd")
        rows[f"{name}_rows"] = table.num_rows
    report = {"source": data.source, **rows, **made.figures, "tokens": _token_figures(made.measured, encoder)}
    (stage.output / "report.json").write_bytes(canonical_json(report))
    shutil.rmtree(source, ignore_errors=True)
    return {name: float(count) for name, count in rows.items()}


def sft_rows(table: Any, data: SFTData) -> Made:
    """Texts. Raises UserError if none is left."""
    columns = {"text": table.column(data.text_column).to_pylist()}
    figures, columns = _without_blanks(columns, "data.sft")
    kept = _kept(columns["text"], columns["text"], data, figures, "data.sft")
    split = _checked(hold_out(columns["text"], kept, data.held_out), "data.sft", data)
    return Made(
        _take(columns, split.train), _take(columns, split.held_out), _some(columns["text"], split.train), figures
    )


def labelled_rows(table: Any, data: LabelledData) -> Made:
    """Texts with whether their label is the chosen one. Raises UserError unless both classes are there to train on."""
    where = "data.evaluation"
    check_column(table, data.label_column, where)
    good = equals(table.column(data.label_column), data.chosen_label, f"{where}.chosenLabel")
    columns = {"text": table.column(data.text_column).to_pylist(), "label": good.to_pylist()}
    figures, columns = _without_blanks(columns, where, texts=["text"])
    kept = _kept(columns["text"], columns["text"], data, figures, where)
    split = _checked(hold_out(columns["text"], kept, data.held_out), where, data)
    train = _take(columns, split.train)
    if len(set(train["label"])) < 2:
        _one_class(table, data.label_column, data.chosen_label, where)
    figures["chosen_rows"] = sum(train["label"])
    return Made(train, _take(columns, split.held_out), _some(columns["text"], split.train), figures)


def prompt_rows(table: Any, data: PromptData, encoder: Encoder, limit: int) -> Made:
    """Prompts with their token ids, at most `limit` of them. Raises UserError if one is longer and overflow is error.

    A prompt that is cut is what remains of it: duplicates and held-out rows are decided by the remainder.
    """
    where = "data.prompts"
    columns = {"prompt": table.column(data.prompt_column).to_pylist()}
    figures, columns = _without_blanks(columns, where)
    chosen = in_range(columns["prompt"], data.rows)
    figures["outside_range"] = len(columns["prompt"]) - len(chosen)
    texts = [columns["prompt"][index] for index in chosen]
    ids = [_without_eos(row, encoder.eos) for row in encoder.encode(texts)]
    too_long = [index for index, row in enumerate(ids) if len(row) > limit]
    figures["too_long"] = len(too_long)
    if too_long and data.overflow == "error":
        longest = max(len(ids[index]) for index in too_long)
        raise UserError(
            f"{where}: {len(too_long)} of {len(ids)} prompts are longer than ppo.promptTokens {limit}, the longest has "
            f"{longest} tokens; raise ppo.promptTokens to {longest}, or set data.prompts.overflow to truncate or drop"
        )
    if data.overflow == "drop":
        dropped = set(too_long)
        texts = [text for index, text in enumerate(texts) if index not in dropped]
        ids = [row for index, row in enumerate(ids) if index not in dropped]
    elif too_long:
        ids = [row[:limit] for row in ids]
        for index, text in zip(too_long, encoder.decode([ids[index] for index in too_long]), strict=True):
            texts[index] = text
    filled = [index for index, row in enumerate(ids) if row]
    keys = [" ".join(map(str, row)) for row in ids]
    kept = without_duplicates(keys, filled)
    figures["duplicates"] = len(filled) - len(kept)
    kept = kept[: data.limit]
    split = _checked(hold_out(keys, kept, data.held_out), where, data)
    rows: Rows = {"prompt": texts, "input_ids": ids}
    return Made(_take(rows, split.train), _take(rows, split.held_out), _some(ids, split.train), figures)


def preference_rows(table: Any, data: PreferenceData, seed: int) -> Made:
    """Pairs (prompt, chosen, rejected): columns as they are, or labelled texts paired at random.

    No text is in a training pair and in a held-out one. Raises UserError if there is no pair.
    """
    prompts = table.column(data.prompt_column).to_pylist() if data.prompt_column else [""] * table.num_rows
    if data.text_column is None:
        return _pairs_as_they_are(table, data, prompts)
    return _pairs_from_labels(table, data, prompts, seed)


def _pairs_as_they_are(table: Any, data: PreferenceData, prompts: list[Any]) -> Made:
    where = "data.preferences"
    columns = {
        "prompt": prompts,
        "chosen": table.column(data.chosen_column).to_pylist(),
        "rejected": table.column(data.rejected_column).to_pylist(),
    }
    figures, columns = _without_blanks(columns, where, texts=["chosen", "rejected"])
    differ = [index for index, text in enumerate(columns["chosen"]) if text != columns["rejected"][index]]
    figures["equal_pairs"] = len(columns["chosen"]) - len(differ)
    columns = _take(columns, differ)
    # All pairs of one prompt stay together; without prompts, all of one preferred text.
    keys = columns["prompt"] if data.prompt_column else columns["chosen"]
    kept = _kept(keys, list(zip(*columns.values(), strict=True)), data, figures, where)
    split = _checked(hold_out(keys, kept, data.held_out), where, data)
    texts = [p + t for index in split.train for p, t in _both(columns, index)]
    return Made(_take(columns, split.train), _take(columns, split.held_out), texts[:MEASURED], figures)


def _both(columns: Rows, index: int) -> list[tuple[str, str]]:
    return [(columns["prompt"][index], columns[name][index]) for name in ("chosen", "rejected")]


def _pairs_from_labels(table: Any, data: PreferenceData, prompts: list[Any], seed: int) -> Made:
    where = "data.preferences"
    assert data.label_column is not None
    assert data.chosen_label is not None
    check_column(table, data.label_column, where)
    good = equals(table.column(data.label_column), data.chosen_label, f"{where}.chosenLabel")
    columns = {"prompt": prompts, "text": table.column(data.text_column).to_pylist(), "good": good.to_pylist()}
    figures, columns = _without_blanks(columns, where, texts=["text"])
    keys = columns["prompt"] if data.prompt_column else columns["text"]
    texts = list(zip(columns["prompt"], columns["text"], strict=True))
    unlimited = data.model_copy(update={"limit": None})  # the limit counts pairs
    kept = _kept(keys, texts, unlimited, figures, where)
    sides = [[index for index in kept if columns["good"][index] is side][: data.limit] for side in (True, False)]
    figures["chosen_rows"], figures["rejected_rows"] = map(len, sides)
    if not all(sides):
        _one_class(table, data.label_column, data.chosen_label, where)
    split = hold_out(keys, sides[0] + sides[1], data.held_out)
    train, held_out = (_pair(columns, part, random.Random(f"{seed}:{name}")) for name, part in vars(split).items())
    figures["unpaired"] = len(kept) - 2 * (len(train["chosen"]) + len(held_out["chosen"]))
    if not train["chosen"]:
        raise UserError(f"{where}: no chosen text shares its prompt or part with a rejected one; add rows")
    measured = [text for name in ("chosen", "rejected") for text in train[name][: MEASURED // 2]]
    return Made(train, held_out, measured, figures)


def _pair(columns: Rows, indexes: list[int], draw: random.Random) -> Rows:
    """Pair each chosen text with a rejected one of its prompt, each text at most once."""
    rejected: dict[str, list[int]] = {}
    for index in indexes:
        if not columns["good"][index]:
            rejected.setdefault(columns["prompt"][index], []).append(index)
    for group in rejected.values():
        draw.shuffle(group)
    pairs: Rows = {"prompt": [], "chosen": [], "rejected": []}
    for index in indexes:
        prompt = columns["prompt"][index]
        if columns["good"][index] and rejected.get(prompt):
            pairs["prompt"].append(prompt)
            pairs["chosen"].append(columns["text"][index])
            pairs["rejected"].append(columns["text"][rejected[prompt].pop()])
    return pairs


def _text_columns(data: PreferenceData) -> list[str]:
    names = (data.prompt_column, data.chosen_column, data.rejected_column, data.text_column)
    return [name for name in names if name is not None]


def _without_blanks(columns: Rows, where: str, texts: Sequence[str] | None = None) -> tuple[dict[str, Any], Rows]:
    """Drop rows that have no text in one of the columns `texts` (default: all). Raises UserError if none is left."""
    names = list(texts or columns)
    total = len(columns[names[0]])
    full = [index for index in range(total) if all((columns[name][index] or "").strip() for name in names)]
    if not full:
        raise UserError(f"{where}: all {total} rows are empty in column {names[0]}")
    kept = _take(columns, full)
    for name in set(kept) - set(names):
        kept[name] = ["" if value is None else value for value in kept[name]]
    markup = sum(bool(MARKUP.search(text)) for text in kept[names[0]])
    return {"rows": total, "empty": total - len(full), "with_markup": markup}, kept


def _kept(texts: Sequence[str], keys: Sequence[Any], data: Data, figures: dict[str, Any], where: str) -> list[int]:
    """Indexes in hashed order: in the range, each key once, at most `limit`. Adds what was dropped to the figures."""
    chosen = in_range(texts, data.rows)
    if not chosen:
        raise UserError(f"{where}.rows: {data.rows} holds none of {len(texts)} rows; widen it")
    once = without_duplicates(keys, chosen)
    figures["outside_range"] = len(texts) - len(chosen)
    figures["duplicates"] = len(chosen) - len(once)
    return once[: data.limit]


def _checked(split: Split, where: str, data: Data) -> Split:
    if not split.train:
        raise UserError(
            f"{where}: no row is left to train on ({len(split.held_out)} held out); lower {where}.heldOut "
            f"{data.held_out}, widen rows, where or limit, or add rows"
        )
    return split


def _one_class(table: Any, column: str, wanted: object, where: str) -> None:
    counts = Counter(table.column(column).to_pylist())
    some = ", ".join(f"{value!r} {count} times" for value, count in counts.most_common(8))
    raise UserError(
        f"{where}.chosenLabel: {wanted!r} must split the rows in two; of all rows, column {column!r} has {some}"
    )


def _without_eos(row: list[int], eos: int) -> list[int]:
    """A prompt that ends with EOS, as some tokenizers make it, has nothing to be continued."""
    return row[:-1] if row and row[-1] == eos else row


def _take(columns: Rows, indexes: Sequence[int]) -> Rows:
    return {name: [values[index] for index in indexes] for name, values in columns.items()}


def _some(values: Sequence[Any], indexes: Sequence[int]) -> list[Any]:
    return [values[index] for index in indexes[:MEASURED]]


def _token_figures(rows: Sequence[Any], encoder: Encoder) -> dict[str, int]:
    """Lengths in tokens, with special tokens, of the first rows of the training part."""
    ids = encoder.encode(rows) if rows and isinstance(rows[0], str) else rows
    lengths = sorted(len(row) for row in ids)
    at: Callable[[float], int] = lambda share: lengths[min(len(lengths) - 1, int(share * len(lengths)))]  # noqa: E731
    return {"rows": len(lengths), "min": lengths[0], "median": at(0.5), "p95": at(0.95), "max": lengths[-1]}
