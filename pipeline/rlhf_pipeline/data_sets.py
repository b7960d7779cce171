"""Which files of a hub data set hold the rows of one split: its card says so, or the names of the files do."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

import yaml

from rlhf_api.errors import UserError

CARD = "README.md"
FORMATS = ".parquet, .csv, .jsonl, .ndjson, .json (one object a line), the text formats also with .gz"
DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "state.json")  # written by the hub's own library
# The words that the hub's own library takes for each split, and below the order in which it looks for them.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SHARD = re.compile(r"([^/]+)-\d{5}-of-\d{5}[^/]*$")
Subset = Mapping[str, Sequence[str]] | str  # patterns of files by split, or a folder


def split_files(source: str, names: Collection[str], card: str, subset: str, split: str) -> list[str]:
    """The files that make up `split`, sorted; all of one format.

    names: every file of the repository `source`. card: its README.md, "" if none. subset: one that the card names, or
    a folder; "" for the repository as a whole. Raises UserError, with what is there, if nothing could be meant, or
    more than one thing.
    """
    tables = sorted(name for name in names if table_format(name) and not _is_aside(name))
    if not tables:
        raise UserError(f"source: {source} has no table; it has {_some(sorted(names))}; known are {FORMATS}")
    subsets, default = _subsets(source, card)
    if subsets and not subset:
        if default is None:
            raise UserError(
                f"source: {source} has the subsets {_some(subsets)}; name one, such as {source}/{next(iter(subsets))}"
            )
        subset = default
    place = f"{source}/{subset}" if subset else source
    described = subsets.get(subset, subset)
    if isinstance(described, str):
        inside = [name for name in tables if not described or name.startswith(f"{described.strip('/')}/")]
        if not inside:
            raise UserError(f"source: {place} is no table, subset or folder of {source}; it has {_some(tables)}")
        splits = _by_name(inside, split)
    else:
        splits = {part: _matching(patterns, tables) for part, patterns in described.items()}
    files = splits.get(split)
    if not files:
        raise UserError(f"split: {split!r} is no split of {place}; it has {_some(splits)}")
    if len({table_format(name) for name in files}) > 1:
        raise UserError(
            f"source: {place} has {split!r} in several formats: {_some(files)}; name one: {source}/{files[0]}"
        )
    return files


def table_format(name: str) -> str | None:
    """parquet, csv or jsonl, by the extension; None for a file that holds no table."""
    path = PurePosixPath(name.lower())
    packed = path.suffix == ".gz"
    match PurePosixPath(path.stem).suffix if packed else path.suffix:
        case ".parquet" if not packed:
            return "parquet"
        case ".csv":
            return "csv"
        case ".jsonl" | ".ndjson" | ".json":
            return "jsonl"
    return None


def _is_aside(name: str) -> bool:
    """Whether a file is hidden, or about the data instead of data."""
    *_, last = parts = name.split("/")
    return last in DESCRIPTIONS or any(part.startswith((".", "__")) for part in parts)


def _subsets(source: str, card: str) -> tuple[dict[str, Subset], str | None]:
    """The subsets in the `configs` of the card's front matter, and the one meant by the repository as a whole."""
    front = re.match(r"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    try:
        configs = (yaml.safe_load(front[1]) or {}).get("configs") or [] if front else []
        subsets: dict[str, Subset] = {}
        default = None
        for config in configs:
            name = str(config["config_name"])
            subsets[name] = _patterns(config["data_files"]) if "data_files" in config else config.get("data_dir", "")
            if config.get("default") or name == "default" or len(configs) == 1:
                default = name
    except (yaml.YAMLError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"source: the configs in {CARD} of {source} cannot be read ({error}); name a file") from error
    return subsets, default


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """Patterns by split. Patterns without a split are train's."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    patterns: dict[str, list[str]] = {}
    for entry in entries:
        part, path = (str(entry["split"]), entry["path"]) if isinstance(entry, dict) else ("train", entry)
        patterns.setdefault(part, []).extend([path] if isinstance(path, str) else path)
    return patterns


def _matching(patterns: Sequence[str], tables: Sequence[str]) -> list[str]:
    def matches(name: str, pattern: str) -> bool:
        pattern = pattern.removeprefix("./")
        if "**" not in pattern:  # only then does a star stay within a folder
            return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)
        return fnmatchcase(name, pattern) or fnmatchcase(name, pattern.replace("**/", ""))

    return [name for name in tables if any(matches(name, pattern) for pattern in patterns)]


def _by_name(tables: Sequence[str], split: str) -> dict[str, list[str]]:
    """Files by split: as shards are named, else by a word of the folders, else of the files' names; else all train."""
    shards: dict[str, list[str]] = {}
    for name in tables:
        if shard := SHARD.search(name):
            shards.setdefault(shard[1], []).append(name)
    words = SPLITS if split in SPLITS else {**SPLITS, split: (split.lower(),)}
    by_folder, by_file = (
        {
            part: found
            for part, known in words.items()
            if (found := [name for name in tables if set(known) & set(re.findall("[a-z]+", text(name).lower()))])
        }
        for text in (lambda name: str(PurePosixPath(name).parent), lambda name: PurePosixPath(name).name)
    )
    return shards or by_folder or by_file or {"train": list(tables)}


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:12]) + (f" and {len(listed) - 12} more" if len(listed) > 12 else "") or "nothing"
