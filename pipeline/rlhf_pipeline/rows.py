"""The steps every table goes through: blanks and duplicates out, a range kept, a part held out; and what they leave."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from rlhf_api.errors import UserError
from rlhf_api.run import Data
from rlhf_pipeline.splits import Split, in_range, without_duplicates

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


def without_blanks(columns: Rows, where: str, texts: Sequence[str] | None = None) -> tuple[dict[str, Any], Rows]:
    """Drop rows that have no text in one of the columns `texts` (default: all). Raises UserError if none is left."""
    names = list(texts or columns)
    total = len(columns[names[0]])
    full = [index for index in range(total) if all((columns[name][index] or "").strip() for name in names)]
    if not full:
        raise UserError(f"{where}: all {total} rows are empty in column {names[0]}")
    kept = take(columns, full)
    for name in set(kept) - set(names):
        kept[name] = ["" if value is None else value for value in kept[name]]
    markup = sum(bool(MARKUP.search(text)) for text in kept[names[0]])
    return {"rows": total, "empty": total - len(full), "with_markup": markup}, kept


def kept_rows(texts: Sequence[str], keys: Sequence[Any], data: Data, figures: dict[str, Any], where: str) -> list[int]:
    """Indexes in hashed order: in the range, each key once, at most `limit`. Adds what was dropped to the figures."""
    chosen = in_range(texts, data.rows)
    if not chosen:
        raise UserError(f"{where}.rows: {data.rows} holds none of {len(texts)} rows; widen it")
    once = without_duplicates(keys, chosen)
    figures["outside_range"] = len(texts) - len(chosen)
    figures["duplicates"] = len(chosen) - len(once)
    return once[: data.limit]


def checked(split: Split, where: str, data: Data) -> Split:
    """The split. Raises UserError if it leaves nothing to train on."""
    if not split.train:
        raise UserError(
            f"{where}: no row is left to train on ({len(split.held_out)} held out); lower {where}.heldOut "
            f"{data.held_out}, widen rows, where or limit, or add rows"
        )
    return split


def one_class(table: Any, column: str, wanted: object, where: str) -> NoReturn:
    """Raise UserError with the labels that are there: `wanted` leaves one of the two classes without rows."""
    counts = Counter(table.column(column).to_pylist())
    some = ", ".join(f"{value!r} {count} times" for value, count in counts.most_common(8))
    raise UserError(
        f"{where}.chosenLabel: {wanted!r} must split the rows in two; of all rows, column {column!r} has {some}"
    )


def take(columns: Rows, indexes: Sequence[int]) -> Rows:
    """The rows with these indexes."""
    return {name: [values[index] for index in indexes] for name, values in columns.items()}


def some(values: Sequence[Any], indexes: Sequence[int]) -> list[Any]:
    """The first of the values with these indexes, to be measured."""
    return [values[index] for index in indexes[:MEASURED]]
