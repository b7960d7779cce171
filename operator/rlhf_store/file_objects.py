"""Objects as files under a folder: whole or absent, however the writer dies."""

import errno
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_api.errors import StoreError
from rlhf_store.objects import FileDigest, ObjectInfo

CHUNK = 1 << 20
UNLINKABLE = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP)
UNFINISHED = ".unfinished"  # beside the objects, so that a rename or link never crosses file systems


class FileObjects:
    """An object store at file:///folder. The folder is made if it is not there."""

    def __init__(self, root: Path) -> None:
        self.url = f"file://{root}"
        self._root = root
        with self._errors(root):
            (root / UNFINISHED).mkdir(parents=True, exist_ok=True)

    def put(self, key: str, data: bytes, if_none_match: bool = False) -> bool:
        with self._errors(key), self._unfinished() as temporary:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            return self._place(temporary, key, exclusive=if_none_match)

    def put_file(self, key: str, path: Path, settled: bool = False) -> FileDigest:
        with self._errors(key), self._unfinished() as temporary:
            digest = _hash(temporary) if settled and _link(path, temporary) else _copy(path, temporary)
            self._place(temporary, key, exclusive=False)
            return digest

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        with self._errors(key):
            try:
                with self._file(key).open("rb") as file:
                    file.seek(start)
                    return file.read(-1 if length is None else length)
            except (FileNotFoundError, IsADirectoryError):
                raise KeyError(key) from None

    def head(self, key: str) -> ObjectInfo | None:
        file = self._file(key)
        with self._errors(key):
            try:
                status = file.stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return ObjectInfo(key, status.st_size, status.st_mtime) if file.is_file() else None

    def walk(self, prefix: str) -> Iterator[ObjectInfo]:
        found = []
        for folder, _, names in os.walk(self._root / prefix):
            for name in names:
                key = (Path(folder) / name).relative_to(self._root).as_posix()
                if not key.startswith(f"{UNFINISHED}/") and (info := self.head(key)):
                    found.append(info)
        yield from sorted(found, key=lambda info: info.key)

    def folders(self, prefix: str) -> list[str]:
        folder = self._root / prefix
        if not folder.is_dir():
            return []
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name != UNFINISHED)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self._errors(key):
                file = self._file(key)
                file.unlink(missing_ok=True)
                _remove_empty(file.parent, self._root)

    def path(self, key: str) -> Path | None:
        file = self._file(key)
        return file if file.is_file() else None

    def sweep(self, before: float, dry_run: bool) -> list[str]:
        stale = [file for file in (self._root / UNFINISHED).iterdir() if file.stat().st_mtime < before]
        if not dry_run:
            for file in stale:
                file.unlink(missing_ok=True)
        return sorted(f"{UNFINISHED}/{file.name}" for file in stale)

    def _file(self, key: str) -> Path:
        if key.startswith("/") or ".." in key.split("/"):
            raise StoreError(f"{self.url}: key {key!r} leads out of the store")
        return self._root / key

    @contextmanager
    def _unfinished(self) -> Iterator[Path]:
        temporary = self._root / UNFINISHED / uuid.uuid4().hex
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _place(self, temporary: Path, key: str, exclusive: bool) -> bool:
        """Give the finished file its name in one step; False if `exclusive` and the name is taken."""
        file = self._file(key)
        temporary.chmod(0o444)  # fetched files are links to it
        place: Callable[[Path, Path], object] = os.link if exclusive else os.replace
        for _ in range(100):
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, FileNotFoundError):
                if file.parent.is_file():
                    raise
                time.sleep(0.001)  # delete() removed the empty folder while it was looked at
                continue
            try:
                place(temporary, file)
            except FileExistsError:
                return False
            except FileNotFoundError:  # delete() removed the empty folder in between
                time.sleep(0.001)
                continue
            _sync_folder(file.parent)
            return True
        raise StoreError(f"{self.url}: folder {file.parent} is removed as fast as it is made")

    @contextmanager
    def _errors(self, what: object) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise store_error(self.url, str(what), error) from error


def store_error(url: str, what: str, error: OSError) -> StoreError:
    """The StoreError that says what an OSError on the store's folder means for a person."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            remedy = "disk full: free space there, or run `rlhf artifacts gc`"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            remedy = "not allowed: make the folder readable and writable for this user"
        case _:
            remedy = error.strerror or str(error)
    return StoreError(f"store {url}, {what}: {remedy}")


def _copy(source: Path, target: Path) -> FileDigest:
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(CHUNK):
            digest.update(chunk)
            writer.write(chunk)
            size += len(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return FileDigest(size, digest.hexdigest())


def _hash(path: Path) -> FileDigest:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return FileDigest(path.stat().st_size, digest)


def _link(source: Path, target: Path) -> bool:
    """Whether the file could be linked: not across file systems, and not one that has other names already."""
    if source.is_symlink() or source.stat().st_nlink > 1:
        return False
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in UNLINKABLE:
            raise
        return False
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_empty(folder: Path, root: Path) -> None:
    while folder != root:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy of it where links cannot reach."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in UNLINKABLE:
            raise
        shutil.copyfile(source, target)
