"""Artifacts: found by address, written once, read back verified. The manifest, written last, is the commit."""

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pydantic import ValidationError

from rlhf_api.errors import IntegrityError, StoreError, UserError
from rlhf_api.layout import ARTIFACTS, artifact_prefix, attempt_prefix, manifest_key
from rlhf_api.stage import ArtifactKind, ArtifactRef, StoreConfig
from rlhf_store.collect import Garbage, garbage
from rlhf_store.file_objects import FileObjects
from rlhf_store.manifest import FileEntry, Manifest, checked_path, content_digest
from rlhf_store.objects import Objects
from rlhf_store.transfer import download, problem_of, selected

__all__ = ["STAGE_PATIENCE", "ArtifactWriter", "Artifacts", "FileEntry", "Garbage", "Manifest", "open_artifacts"]

SMALL_UPLOADS = 4  # files of a folder sent at once
STAGE_PATIENCE = 120.0  # a stage waits while a store starts again, rather than have to start again itself


def open_artifacts(
    store: StoreConfig, patience: float = 15.0, environment: Mapping[str, str] = os.environ
) -> "Artifacts":
    """The artifacts of a store. S3 credentials come from the environment; raises StoreError if there are none.

    `patience`: seconds that an S3 store may be silent, or away, before what is asked of it fails.
    """
    if store.url.startswith("file://"):
        return Artifacts(FileObjects(Path(unquote(urlsplit(store.url).path))))
    from rlhf_store.s3_objects import S3Objects

    return Artifacts(S3Objects.from_environment(store, environment, patience))


class Artifacts:
    """Every artifact of one store. Safe to use from several threads and processes."""

    def __init__(self, objects: Objects) -> None:
        self.objects = objects

    def find(self, ref: ArtifactRef) -> Manifest | None:
        """The manifest of a whole artifact, or None. Raises IntegrityError if the manifest is not one."""
        key = manifest_key(ref.kind, ref.digest)
        try:
            data = self.objects.get(key)
        except KeyError:
            return None
        try:
            manifest = Manifest.model_validate_json(data)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise IntegrityError(
                f"{ref}: manifest.json was altered or truncated ({reason}); delete {key} from {self.objects.url} "
                "and run the stage again"
            ) from error
        if manifest.ref != ref:
            raise IntegrityError(f"{ref}: {key} is the manifest of {manifest.ref}; delete it and run the stage again")
        return manifest

    def need(self, ref: ArtifactRef) -> Manifest:
        """The manifest of an artifact that must be there. Raises UserError if it is not."""
        if (manifest := self.find(ref)) is None:
            raise UserError(f"{ref}: no such artifact in {self.objects.url}; run the stage that makes it")
        return manifest

    def fetch(self, ref: ArtifactRef, into: Path, include: Sequence[str] | None = None) -> Path:
        """Put an artifact's files, or those that match a pattern, into a folder; returns the folder.

        Patterns are fnmatch's: `*` crosses slashes. Every byte is checked against the manifest. Files that are
        there already and right stay; a file that was half fetched is continued. Large files of a file:// store
        are hard links to the store's own: do not write to them. Raises IntegrityError, UserError, StoreError.
        """
        manifest = self.need(ref)
        chosen = selected(list(manifest.files), include)
        if include is not None and not chosen:
            raise UserError(f"{ref}: no file matches {', '.join(include)}; it has {', '.join(sorted(manifest.files))}")
        into.mkdir(parents=True, exist_ok=True)
        prefix = attempt_prefix(ref.kind, ref.digest, manifest.attempt)
        download(self.objects, prefix, {path: manifest.files[path] for path in chosen}, into, str(ref))
        return into

    def read_range(self, manifest: Manifest, path: str, start: int, length: int) -> bytes:
        """`length` bytes of one file, without fetching the rest of it and therefore without its SHA-256.

        Raises IntegrityError if the file is shorter, KeyError if the artifact has no such file.
        """
        entry = manifest.files[path]
        if start < 0 or length < 0 or start + length > entry.size:
            raise ValueError(f"{manifest.ref}: bytes {start} to {start + length} of {path}, which has {entry.size}")
        if length == 0:
            return b""
        key = attempt_prefix(manifest.kind, manifest.digest, manifest.attempt) + path
        try:
            data = self.objects.get(key, start, length)
        except KeyError:
            raise IntegrityError(f"{manifest.ref}: file {path} is missing from {self.objects.url}") from None
        if len(data) != length:
            raise IntegrityError(f"{manifest.ref}: file {path} was truncated: {len(data)} of {length} bytes at {start}")
        return data

    def writer(self, ref: ArtifactRef, attempt: str) -> "ArtifactWriter":
        """A writer of one artifact. `attempt` is unique among its writers."""
        return ArtifactWriter(self, ref, attempt)

    def verify(self, ref: ArtifactRef) -> "list[str]":
        """Read every byte of an artifact; returns what is wrong with it, a sentence each. Nothing is stored."""
        try:
            manifest = self.need(ref)
        except (IntegrityError, UserError) as error:
            return [str(error)]
        prefix = attempt_prefix(ref.kind, ref.digest, manifest.attempt)
        return [
            problem
            for path, entry in sorted(manifest.files.items())
            if (problem := problem_of(self.objects, prefix, path, entry, str(ref)))
        ]

    def gc(
        self, keep: set[ArtifactRef], older_than: timedelta, dry_run: bool = False, unkept: bool = False
    ) -> "list[Garbage]":
        """Remove what dead writers left, and with `unkept` whole artifacts that are not in `keep`; returns it.

        Left by dead writers: attempts never committed, attempts that lost, checkpoints of committed artifacts,
        unfinished writes. Nothing younger than `older_than` is touched, nor attempts at an artifact in `keep`
        that has no winner yet.
        """
        found = list(garbage(self.objects, keep, older_than, unkept))
        if not dry_run:
            for each in found:
                self.objects.delete(each.keys[:1])
                self.objects.delete(each.keys[1:])
        unfinished = self.objects.sweep(time.time() - older_than.total_seconds(), dry_run)
        return [*found, *(Garbage("unfinished write", (name,), 0) for name in unfinished)]

    def tidy(self, manifest: Manifest) -> None:
        """Remove what a committed artifact has no more use for: its checkpoints and every other attempt at it.

        A writer that is still at one of those has lost already.
        """
        artifact = artifact_prefix(manifest.kind, manifest.digest)
        own = f"{artifact}{manifest.attempt}/"
        used = {f"{own}{path}" for path in manifest.files} | {manifest_key(manifest.kind, manifest.digest)}
        self.objects.delete([info.key for info in self.objects.walk(artifact) if info.key not in used])

    def remove(self, ref: ArtifactRef) -> None:
        """Delete an artifact and every attempt at it: the manifest first, so that it is never there by half."""
        self.objects.delete([manifest_key(ref.kind, ref.digest)])
        self.objects.delete([info.key for info in self.objects.walk(artifact_prefix(ref.kind, ref.digest))])

    def list(self, kind: ArtifactKind | None = None) -> Iterator[Manifest]:
        """The manifests of all whole artifacts, sorted by kind and digest."""
        for each in [kind] if kind else self.objects.folders(ARTIFACTS):
            for digest in self.objects.folders(f"{ARTIFACTS}{each}/"):
                try:
                    ref = ArtifactRef.model_validate({"kind": each, "digest": digest})
                except ValidationError:  # somebody else's folder
                    continue
                if manifest := self.find(ref):
                    yield manifest


class ArtifactWriter:
    """Writes the files of one attempt at an artifact; nothing is visible before commit()."""

    def __init__(self, artifacts: Artifacts, ref: ArtifactRef, attempt: str) -> None:
        self.ref, self.attempt = ref, attempt
        self.files: dict[str, FileEntry] = {}
        self._artifacts = artifacts
        self._prefix = attempt_prefix(ref.kind, ref.digest, attempt)

    def add_file(self, path: str, local: Path, settled: bool = False) -> FileEntry:
        """Write a local file as `path`, at once. `settled`: it will not be written again, which may save a copy."""
        digest = self._artifacts.objects.put_file(self._prefix + checked_path(path), local, settled)
        self.files[path] = FileEntry(size=digest.size, sha256=digest.sha256)
        return self.files[path]

    def add_bytes(self, path: str, data: bytes) -> FileEntry:
        """Write `data` as `path`, at once."""
        self._artifacts.objects.put(self._prefix + checked_path(path), data)
        self.files[path] = FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())
        return self.files[path]

    def add_folder(self, folder: Path, settled: bool = False) -> None:
        """Write every file below a folder that is not written yet, under its relative path; links are followed."""
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        missing = [path for path in files if path not in self.files]
        with ThreadPoolExecutor(SMALL_UPLOADS) as pool:
            for _ in pool.map(lambda path: self.add_file(path, files[path], settled), missing):
                pass

    def commit(self, metadata: dict[str, Any]) -> Manifest:
        """Make the artifact whole. Returns the manifest that counts: another writer's if it was first.

        A loser's files are removed. Raises StoreError if the store cannot decide a race (no If-None-Match).
        """
        manifest = Manifest(
            kind=self.ref.kind,
            digest=self.ref.digest,
            attempt=self.attempt,
            created_at=time.time(),
            files=self.files,
            content=content_digest(self.files),
            metadata=metadata,
        )
        objects = self._artifacts.objects
        if objects.put(manifest_key(self.ref.kind, self.ref.digest), manifest.to_bytes(), if_none_match=True):
            return manifest
        winner = self._artifacts.find(self.ref)
        if winner is None:
            raise StoreError(f"{self.ref}: its manifest vanished from {objects.url} during the commit; run again")
        if winner.attempt != self.attempt:
            self.discard()
        return winner

    def discard(self) -> None:
        """Remove everything this attempt wrote, checkpoints included."""
        objects = self._artifacts.objects
        objects.delete([info.key for info in objects.walk(self._prefix)])
