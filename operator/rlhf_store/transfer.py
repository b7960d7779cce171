"""Files out of the store: verified, resumable, several requests at once, in bounded memory."""

import fnmatch
import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rlhf_api.errors import IntegrityError
from rlhf_store.file_objects import link_or_copy
from rlhf_store.manifest import FileEntry
from rlhf_store.objects import Objects

PART = 8 << 20  # bytes a request
IN_FLIGHT = 6  # requests at once; memory is about PART * IN_FLIGHT
LINKED = 1 << 20  # smaller files are copied, so that nobody changes the store's by editing a configuration


def selected(paths: Sequence[str], include: Sequence[str] | None) -> list[str]:
    """The paths that match one of the patterns (fnmatch: `*` crosses slashes); all of them without patterns."""
    if include is None:
        return sorted(paths)
    return sorted(path for path in paths if any(fnmatch.fnmatchcase(path, pattern) for pattern in include))


def download(objects: Objects, prefix: str, files: Mapping[str, FileEntry], into: Path, name: str) -> None:
    """Put `files`, which lie under `prefix`, into a folder. A file already there and right is kept.

    A file on this machine is verified, then linked. Raises IntegrityError that names `name` and the file.
    """
    missing = {path: entry for path, entry in files.items() if not _is_right(into / path, entry)}
    remote = {}
    for path, entry in missing.items():
        (into / path).parent.mkdir(parents=True, exist_ok=True)
        if source := objects.path(prefix + path):
            _check(name, path, entry, source.stat().st_size, _sha256(source) if _same_size(source, entry) else "")
            _install(source, into / path)
        else:
            remote[path] = entry
    _download_remote(objects, prefix, remote, into, name)


def problem_of(objects: Objects, prefix: str, path: str, entry: FileEntry, name: str) -> str | None:
    """What is wrong with one file, read through in parts and stored nowhere; None if it is right."""
    digest, size = hashlib.sha256(), 0
    try:
        while data := objects.get(prefix + path, size, PART):
            digest.update(data)
            size += len(data)
            if len(data) < PART:
                break
        _check(name, path, entry, size, digest.hexdigest())
    except KeyError:
        return f"{name}: file {path} is missing from {objects.url}; {_REMEDY}"
    except IntegrityError as error:
        return str(error)
    return None


def _install(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.new")
    temporary.unlink(missing_ok=True)
    if source.stat().st_size >= LINKED:
        link_or_copy(source, temporary)
    else:
        temporary.write_bytes(source.read_bytes())
    temporary.replace(target)


@dataclass
class _Part:
    path: str
    start: int
    length: int
    data: "Future[bytes] | None" = None


def _download_remote(objects: Objects, prefix: str, files: Mapping[str, FileEntry], into: Path, name: str) -> None:
    """Requests run ahead of the one writer, which hashes and appends parts in order: a partial file is a prefix."""

    def fetch(part: _Part) -> bytes:
        try:
            return objects.get(prefix + part.path, part.start, part.length)
        except KeyError:
            raise IntegrityError(f"{name}: file {part.path} is missing from {objects.url}; {_REMEDY}") from None

    parts = _parts(files, into)
    waiting: deque[_Part] = deque()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        try:
            for path, entry in files.items():
                partial = _partial(into / path, entry)
                digest = _prefix_digest(partial)
                with partial.open("ab") as file:
                    while file.tell() < entry.size:
                        while len(waiting) < IN_FLIGHT and (part := next(parts, None)):
                            part.data = pool.submit(fetch, part)
                            waiting.append(part)
                        part = waiting.popleft()
                        assert part.data is not None
                        data = part.data.result()
                        digest.update(data)
                        file.write(data)
                        if len(data) != part.length:
                            break
                    size = file.tell()
                if size != entry.size or digest.hexdigest() != entry.sha256:
                    partial.unlink()
                _check(name, path, entry, size, digest.hexdigest())
                partial.replace(into / path)
        finally:
            pool.shutdown(cancel_futures=True)


def _parts(files: Mapping[str, FileEntry], into: Path) -> Iterator[_Part]:
    for path, entry in files.items():
        partial = _partial(into / path, entry)
        start = partial.stat().st_size if partial.exists() else 0
        for offset in range(start, entry.size, PART):
            yield _Part(path, offset, min(PART, entry.size - offset))


def _partial(target: Path, entry: FileEntry) -> Path:
    return target.with_name(f".{target.name}.{entry.sha256[:16]}.part")


def _prefix_digest(partial: Path) -> "hashlib._Hash":
    digest = hashlib.sha256()
    if partial.exists():
        with partial.open("rb") as file:
            _feed(digest, file)
    return digest


def _feed(digest: "hashlib._Hash", file: BinaryIO) -> None:
    while chunk := file.read(1 << 20):
        digest.update(chunk)


def _same_size(path: Path, entry: FileEntry) -> bool:
    return path.stat().st_size == entry.size


def _is_right(path: Path, entry: FileEntry) -> bool:
    return path.is_file() and _same_size(path, entry) and _sha256(path) == entry.sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_REMEDY = "delete the artifact's folder from the store and run its stage again"


def _check(name: str, path: str, entry: FileEntry, size: int, sha256: str) -> None:
    if size != entry.size:
        raise IntegrityError(f"{name}: file {path} has {size} bytes, its manifest says {entry.size}; {_REMEDY}")
    if sha256 != entry.sha256:
        raise IntegrityError(
            f"{name}: file {path} was altered: SHA-256 {sha256[:16]}…, "
            f"its manifest says {entry.sha256[:16]}…; {_REMEDY}"
        )
