"""What may be removed from a store: the leftovers of dead writers, and artifacts that nobody keeps."""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

from pydantic import ValidationError

from rlhf_api.layout import ARTIFACTS, MANIFEST, attempt_prefix
from rlhf_api.stage import ArtifactRef
from rlhf_store.manifest import Manifest
from rlhf_store.objects import ObjectInfo, Objects


@dataclass(frozen=True)
class Garbage:
    """Objects to remove together, in this order, and why."""

    reason: str
    keys: tuple[str, ...]
    size: int


def garbage(objects: Objects, keep: set[ArtifactRef], older_than: timedelta, unkept: bool) -> Iterator[Garbage]:
    """What gc would remove. Nothing written to within `older_than` is touched: its writer may be alive."""
    before = time.time() - older_than.total_seconds()
    for kind in objects.folders(ARTIFACTS):
        for digest in objects.folders(f"{ARTIFACTS}{kind}/"):
            try:
                ref = ArtifactRef.model_validate({"kind": kind, "digest": digest})
            except ValidationError:  # somebody else's folder
                continue
            found = list(objects.walk(f"{ARTIFACTS}{kind}/{digest}/"))
            yield from _of_artifact(objects, ref, found, ref in keep, before, unkept)


def _of_artifact(
    objects: Objects, ref: ArtifactRef, found: list[ObjectInfo], kept: bool, before: float, unkept: bool
) -> Iterator[Garbage]:
    prefix = f"{ARTIFACTS}{ref}/"
    manifest = _readable_manifest(objects, prefix, found)
    if manifest is None and kept:
        return  # a run means to go on with it: its checkpoints are worth keeping
    if manifest is not None and unkept and not kept and max(info.modified for info in found) < before:
        ordered = sorted(found, key=lambda info: info.key != prefix + MANIFEST)  # first: never half an artifact
        yield _garbage(f"{ref}: no run keeps it", ordered)
        return
    attempts: dict[str, list[ObjectInfo]] = defaultdict(list)
    for info in found:
        rest = info.key.removeprefix(prefix)
        if "/" in rest:
            attempts[rest.split("/")[0]].append(info)
    for attempt, infos in attempts.items():
        if max(info.modified for info in infos) >= before:
            continue
        if manifest is None:
            yield _garbage(f"{ref}: attempt {attempt} was never committed", infos)
        elif attempt != manifest.attempt:
            yield _garbage(f"{ref}: attempt {attempt} lost to {manifest.attempt}", infos)
        else:
            used = {attempt_prefix(ref.kind, ref.digest, attempt) + path for path in manifest.files}
            if extra := [info for info in infos if info.key not in used]:
                yield _garbage(f"{ref}: checkpoints of a committed artifact", extra)


def _readable_manifest(objects: Objects, prefix: str, found: list[ObjectInfo]) -> Manifest | None:
    """A damaged manifest counts as none: its artifact can only be made again."""
    if not any(info.key == prefix + MANIFEST for info in found):
        return None
    try:
        return Manifest.model_validate_json(objects.get(prefix + MANIFEST))
    except (KeyError, ValidationError):
        return None


def _garbage(reason: str, infos: list[ObjectInfo]) -> Garbage:
    return Garbage(reason, tuple(info.key for info in infos), sum(info.size for info in infos))
