"""Pairs of a preferred and a rejected text: from two columns, or from labelled texts paired at random."""

import random
from typing import Any

from rlhf_api.errors import UserError
from rlhf_api.run import PreferenceData
from rlhf_pipeline.rows import MEASURED, Made, Rows, checked, kept_rows, one_class, take, without_blanks
from rlhf_pipeline.splits import hold_out
from rlhf_pipeline.tables import check_column, equals


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
    figures, columns = without_blanks(columns, where, texts=["chosen", "rejected"])
    differ = [index for index, text in enumerate(columns["chosen"]) if text != columns["rejected"][index]]
    figures["equal_pairs"] = len(columns["chosen"]) - len(differ)
    columns = take(columns, differ)
    # All pairs of one prompt stay together; without prompts, all of one preferred text.
    keys = columns["prompt"] if data.prompt_column else columns["chosen"]
    kept = kept_rows(keys, list(zip(*columns.values(), strict=True)), data, figures, where)
    split = checked(hold_out(keys, kept, data.held_out), where, data)
    texts = [p + t for index in split.train for p, t in _both(columns, index)]
    return Made(take(columns, split.train), take(columns, split.held_out), texts[:MEASURED], figures)


def _both(columns: Rows, index: int) -> list[tuple[str, str]]:
    return [(columns["prompt"][index], columns[name][index]) for name in ("chosen", "rejected")]


def _pairs_from_labels(table: Any, data: PreferenceData, prompts: list[Any], seed: int) -> Made:
    where = "data.preferences"
    assert data.label_column is not None
    assert data.chosen_label is not None
    check_column(table, data.label_column, where)
    good = equals(table.column(data.label_column), data.chosen_label, f"{where}.chosenLabel")
    columns = {"prompt": prompts, "text": table.column(data.text_column).to_pylist(), "good": good.to_pylist()}
    figures, columns = without_blanks(columns, where, texts=["text"])
    keys = columns["prompt"] if data.prompt_column else columns["text"]
    texts = list(zip(columns["prompt"], columns["text"], strict=True))
    unlimited = data.model_copy(update={"limit": None})  # the limit counts pairs
    kept = kept_rows(keys, texts, unlimited, figures, where)
    sides = [[index for index in kept if columns["good"][index] is side][: data.limit] for side in (True, False)]
    figures["chosen_rows"], figures["rejected_rows"] = map(len, sides)
    if not all(sides):
        one_class(table, data.label_column, data.chosen_label, where)
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


def text_columns(data: PreferenceData) -> list[str]:
    """The columns that must hold texts."""
    names = (data.prompt_column, data.chosen_column, data.rejected_column, data.text_column)
    return [name for name in names if name is not None]
