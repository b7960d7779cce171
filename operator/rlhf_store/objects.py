"""What the artifact commit needs of an object store, whichever it is."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class ObjectInfo:
    """One object: its key relative to the store's prefix, its size in bytes, its Unix time of writing."""

    key: str
    size: int
    modified: float


@dataclass(frozen=True)
class FileDigest:
    """Size in bytes and hex SHA-256 of a file as it was sent."""

    size: int
    sha256: str


class Objects(Protocol):
    """Keys to bytes. Objects appear whole or not at all. Every method raises StoreError with a remedy."""

    url: str

    def put(self, key: str, data: bytes, if_none_match: bool = False) -> bool:
        """Write `data`. With `if_none_match`, False and no change if the key exists already."""

    def put_file(self, key: str, path: Path, settled: bool = False) -> FileDigest:
        """Write a file of any size in bounded memory; returns its digest, taken in the same pass.

        With `settled` the local file will not be written again: a store on the same file system links it instead of
        copying, and makes it read-only.
        """

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """At most `length` bytes from `start` (default: to the end). Raises KeyError if there is no such key."""

    def head(self, key: str) -> ObjectInfo | None:
        """What is known of one object, or None."""

    def walk(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose key starts with `prefix`, which ends in a slash or is empty; sorted by key."""

    def folders(self, prefix: str) -> list[str]:
        """Names directly under `prefix` that have objects below them, sorted."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; absent ones are no error."""

    def path(self, key: str) -> Path | None:
        """Where the object lies on this machine, if it does. The file must not be written to."""

    def sweep(self, before: float, dry_run: bool) -> list[str]:
        """Remove writes begun before that Unix time and never finished; returns their names."""
