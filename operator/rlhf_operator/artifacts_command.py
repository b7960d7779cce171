"""`rlhf artifacts`: what a store holds, whether it is whole, and what nobody needs."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import get_args

from rich.table import Table

from rlhf_api.errors import UserError
from rlhf_api.names import EXIT_OK, EXIT_USER
from rlhf_api.stage import ArtifactKind, ArtifactRef
from rlhf_operator.cluster_options import ClusterOptions
from rlhf_operator.display import console
from rlhf_operator.figures import duration, size
from rlhf_operator.place import chosen_store, home
from rlhf_operator.stages import STAGES
from rlhf_operator.summary import artifact_of
from rlhf_store.artifacts import Artifacts, open_artifacts


@dataclass(frozen=True)
class Place:
    """Which store a command is about: that of the options, else of `where`, else the one in .rlhf."""

    where: ClusterOptions | None = None
    store_url: str | None = None
    endpoint: str | None = None

    @contextmanager
    def opened(self) -> Iterator[Artifacts]:
        """The store, within reach for as long as this lasts. Raises UserError if it is not clear which."""
        if self.where is None:
            yield open_artifacts(chosen_store(self.store_url, self.endpoint))
            return
        from rlhf_operator.cluster_store import artifacts_in_cluster

        with artifacts_in_cluster(self.where, self.store_url, self.endpoint) as artifacts:
            yield artifacts

    def kept(self) -> set[ArtifactRef]:
        """What runs name: those of this folder, and of the whole cluster."""
        kept = set()
        for name in home().run_names():
            status = home().run_folder(name).need_status()
            kept |= {ref for stage in STAGES if (ref := artifact_of(status, stage.name))}
        if self.where is not None:
            from rlhf_operator.cluster_store import artifacts_of_all_runs

            kept |= artifacts_of_all_runs(self.where)
        return kept


def list_artifacts(kind: str | None, place: Place, as_json: bool) -> None:
    """One line an artifact, the newest last. Raises UserError if there is no such kind."""
    asked = _kind(kind)
    with place.opened() as artifacts:
        manifests = sorted(artifacts.list(asked), key=lambda manifest: manifest.created_at)
    if as_json:
        rows = [
            {"ref": str(m.ref), "size": m.size, "files": len(m.files), "createdAt": m.created_at, "content": m.content}
            for m in manifests
        ]
        print(json.dumps(rows))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("artifact")
    for heading in ("size", "files", "age"):
        table.add_column(heading, justify="right")
    for manifest in manifests:
        age = duration(time.time() - manifest.created_at)
        table.add_row(f"{manifest.kind}/{manifest.digest[:12]}", size(manifest.size), str(len(manifest.files)), age)
    console().print(table if manifests else "no artifacts")


def verify_artifacts(names: list[str], place: Place, as_json: bool) -> int:
    """Print what is wrong with each artifact; returns the exit code, not 0 if anything is."""
    with place.opened() as artifacts:
        refs = [_ref(artifacts, name) for name in names] or [manifest.ref for manifest in artifacts.list()]
        found = {str(ref): artifacts.verify(ref) for ref in refs}
    if as_json:
        print(json.dumps(found))
    else:
        for name, problems in found.items():
            kind, _, digest = name.partition("/")
            print(f"{kind}/{digest[:12]}: {'; '.join(problems) or 'whole'}")
    return EXIT_USER if any(found.values()) else EXIT_OK


def collect_garbage(older_than_hours: float, unkept: bool, dry_run: bool, place: Place, as_json: bool) -> None:
    """Remove garbage; print what it was. What runs name is kept, half made or whole."""
    age = timedelta(hours=older_than_hours)
    with place.opened() as artifacts:
        removed = artifacts.gc(place.kept(), age, dry_run=dry_run, unkept=unkept)
    if as_json:
        print(json.dumps([{"reason": each.reason, "keys": list(each.keys), "size": each.size} for each in removed]))
        return
    for each in removed:
        print(f"{each.reason} ({size(each.size)})")
    verb = "would free" if dry_run else "freed"
    print(f"{verb} {size(sum(each.size for each in removed))} in {len(removed)} places")


def _kind(name: str | None) -> ArtifactKind | None:
    kinds: tuple[ArtifactKind, ...] = get_args(ArtifactKind)
    if name is None:
        return None
    if (kind := next((kind for kind in kinds if kind == name), None)) is None:
        raise UserError(f"kind {name!r}: there is no such kind; use one of {', '.join(kinds)}")
    return kind


def _ref(artifacts: Artifacts, name: str) -> ArtifactRef:
    """The artifact whose address begins so. Raises UserError unless there is exactly one."""
    kind, _, digits = name.partition("/")
    matches = [m.ref for m in artifacts.list(_kind(kind)) if m.digest.startswith(digits)]
    if len(matches) != 1:
        raise UserError(f"{name}: {len(matches)} artifacts begin so; `rlhf artifacts ls {kind}` lists them")
    return matches[0]
