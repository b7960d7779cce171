"""What the report knows of each stage, read from the artifacts that an artifact was made from."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_api.stage import ArtifactRef
from rlhf_store.artifacts import Artifacts, Manifest

REPORT_FILE = "report.json"
CURVE_FILE = "logs/metrics.jsonl"
GENERATIONS_FILE = "generations.jsonl"
SAMPLES_FILE = "samples.jsonl"
READ = (REPORT_FILE, CURVE_FILE, GENERATIONS_FILE, SAMPLES_FILE)


@dataclass(frozen=True)
class Record:
    """One stage that ran. Whatever it did not leave is empty."""

    stage: str
    ref: str  # kind/digest
    metadata: dict[str, Any] = field(default_factory=dict)  # the manifest's
    size: int = 0  # bytes of the artifact
    content: str = ""  # digest of the files outside logs/
    created_at: float = 0.0  # Unix time
    report: dict[str, Any] = field(default_factory=dict)
    curve: list[dict[str, float | None]] = field(default_factory=list)
    generations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """The parts of the spec that the stage read, camelCase."""
        settings: dict[str, Any] = self.metadata.get("config", {}).get("settings", {})
        return settings


def ancestors(artifacts: Artifacts, refs: Iterable[ArtifactRef], work: Path) -> list[Record]:
    """A record of every artifact among `refs` and of every one they were made from, oldest first.

    work: folder for the small files that are read. Artifacts that are gone are left out; raises IntegrityError for
    damaged ones.
    """
    found: dict[str, Manifest] = {}
    waiting = list(refs)
    while waiting:
        ref = waiting.pop()
        if str(ref) in found or (manifest := artifacts.find(ref)) is None:
            continue
        found[str(ref)] = manifest
        waiting += [ArtifactRef.parse(text) for text in manifest.metadata.get("inputs", {}).values()]
    order = sorted(found.values(), key=lambda manifest: (manifest.created_at, str(manifest.ref)))
    return [_record(artifacts, manifest, work) for manifest in order]


def read_folder(folder: Path) -> dict[str, Any]:
    """The fields of a Record that a stage's output folder holds."""
    return {
        "report": _document(folder / REPORT_FILE),
        "curve": _lines(folder / CURVE_FILE),
        "generations": _lines(folder / GENERATIONS_FILE),
        "samples": _lines(folder / SAMPLES_FILE),
    }


def _record(artifacts: Artifacts, manifest: Manifest, work: Path) -> Record:
    ref = manifest.ref
    folder = work / f"{ref.kind}-{ref.digest[:12]}"
    wanted = [path for path in READ if path in manifest.files]
    if wanted:
        artifacts.fetch(ref, folder, wanted)
    return Record(
        stage=manifest.metadata.get("config", {}).get("stage", ref.kind),
        ref=str(ref),
        metadata=manifest.metadata,
        size=manifest.size,
        content=manifest.content,
        created_at=manifest.created_at,
        **read_folder(folder),
    )


def _document(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    return document


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
