"""Reads one table of rows, from Parquet, CSV, JSON lines or a hub data set, and keeps the rows a run asks for."""

import gzip
import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from rlhf_api.errors import UserError
from rlhf_api.run import Data
from rlhf_api.stage import StoreConfig
from rlhf_pipeline.data_sets import CARD, FORMATS, split_files, table_format
from rlhf_pipeline.sources import fetch_file, open_files

HUB = "hf://datasets/"
LARGEST_ROW = 64 * 2**20  # bytes of CSV


def read_table(data: Data, field: str, texts: Sequence[str], work: Path, store: StoreConfig) -> Any:
    """The table of `data` as an Arrow table, with its `where` applied. `texts`: columns that must hold strings.

    field: where the data stands in the run, for errors. Raises UserError if a column is missing or no text, if the
    file cannot be parsed, or if nothing is left.
    """
    if data.source.startswith(HUB) and not table_format(data.source):
        table = _hub_data_set(data, field, texts, work)
    else:
        file = fetch_file(data.source, data.revision, work, store)
        table = parse_table(file, texts, f"{field}.source: {data.source}")
    for name in [*texts, *data.where]:
        check_column(table, name, field)
    for name in texts:
        kind = table.schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"{field}: column {name!r} holds {kind}, not text; name a column of strings")
    return filter_rows(table, data.where, field)


def check_column(table: Any, name: str, field: str) -> None:
    """Raise UserError, with the columns and the closest of them, unless the table has column `name`."""
    if name in table.column_names:
        return
    close = get_close_matches(name, table.column_names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UserError(f"{field}: there is no column {name!r}; the table has {', '.join(table.column_names)}{hint}")


def filter_rows(table: Any, where: Mapping[str, str | int | bool], field: str) -> Any:
    """The rows whose columns equal these values. Raises UserError if none is left."""
    for name, value in where.items():
        kept = table.filter(equals(table.column(name), value, f"{field}.where.{name}"))
        if not kept.num_rows:
            some = pc.unique(table.column(name)).slice(0, 8).to_pylist()
            raise UserError(f"{field}.where.{name}: no row has the value {value!r}; the column has {some}")
        table = kept
    if not table.num_rows:
        raise UserError(f"{field}: the table has no rows")
    return table


def equals(column: Any, value: str | int | bool, field: str) -> Any:
    """A boolean array: where the column has that value. Raises UserError if it could not have it; null is unequal."""
    try:
        wanted = pa.scalar(value).cast(column.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        some = pc.unique(column).slice(0, 8).to_pylist()
        raise UserError(f"{field}: {value!r} is no {column.type}, which the column holds, such as {some}") from error
    return pc.fill_null(pc.equal(column, wanted), False)


def parse_table(file: Path, texts: Sequence[str], where: str) -> Any:
    """A file as an Arrow table, by its extension. `where` opens the error messages."""
    packed = file.suffix == ".gz"
    kind = table_format(file.name)
    try:
        match kind:
            case "parquet":
                return pyarrow.parquet.read_table(file)
            case "csv":
                return _read_csv(file, packed, texts)
            case "jsonl":
                return _read_json_lines(file, packed, where)
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read as {kind}: {error}") from error
    raise UserError(f"{where} has no known extension; known are {FORMATS}")


def _read_csv(file: Path, packed: bool, texts: Sequence[str]) -> Any:
    with pa.input_stream(str(file), compression="gzip" if packed else None) as stream:
        return pyarrow.csv.read_csv(
            stream,
            read_options=pyarrow.csv.ReadOptions(block_size=LARGEST_ROW, use_threads=False),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            # A text such as "1984" or "true" stays text.
            convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string())),
        )


def _read_json_lines(file: Path, packed: bool, where: str) -> Any:
    rows: list[dict[str, Any]] = []
    with gzip.open(file, "rt", encoding="utf-8") if packed else file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: line {number} is no JSON object; write one object a line")
            rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise UserError(f"{where}: column {name!r} mixes types: {error}") from error
    return pa.table(columns)


def _hub_data_set(data: Data, field: str, texts: Sequence[str], work: Path) -> Any:
    """One split of a repository, or of the subset or folder of it that the source names."""
    parts = data.source.removeprefix(HUB).rstrip("/").split("/")
    source, inner = HUB + "/".join(parts[:2]), "/".join(parts[2:])
    files = open_files(source, data.revision)
    card = files.fetch(CARD, work).read_text(encoding="utf-8") if CARD in files.sizes else ""
    names = split_files(source, files.sizes, card, inner, data.split)
    tables = [parse_table(files.fetch(name, work), texts, f"{field}.source: {source}/{name}") for name in names]
    for name, table in zip(names, tables, strict=True):
        if set(table.column_names) != set(tables[0].column_names):
            raise UserError(
                f"{field}.source: {data.source}: {names[0]} has the columns {', '.join(tables[0].column_names)}, "
                f"{name} has {', '.join(table.column_names)}; name a folder or a file whose columns are alike"
            )
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"{field}.source: {data.source}: types differ between {', '.join(names)}: {error}") from error
