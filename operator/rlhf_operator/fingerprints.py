"""What the bytes of a run's local sources look like, so that a stage runs again when its source has changed."""

import hashlib
import json
import time
from pathlib import Path
from urllib.parse import unquote

from rlhf_api.canonical import sha256_of
from rlhf_api.errors import UserError
from rlhf_api.package_source import package_path
from rlhf_api.run import RLHFRun
from rlhf_api.stage import StageSettings
from rlhf_operator.forks import stages_taken
from rlhf_operator.stages import chain

SETTLED_SECONDS = 2.0  # a file changed more recently may change again within one tick of its clock


def fingerprints(run: RLHFRun, cache: Path) -> dict[str, str]:
    """Stage -> SHA-256 over the names and bytes of its file:// or package:// source.

    Other sources name their own version, or none. A file's hash is kept in `cache`, a JSON file, and used again while
    its size and time stay the same. Raises UserError, naming the field, if a source does not exist.
    """
    known = _read_cache(cache)
    kept: dict[str, list[int | str]] = {}
    found = {}
    taken = stages_taken(run)
    for link in chain(run, {}):
        field, source = _source(link.settings)
        if link.skipped is None and link.name not in taken and source and (path := _local_path(field, source)):
            found[link.name] = _fingerprint(path, known, kept)
    if kept != known:
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_name(f".{cache.name}.new")
        temporary.write_text(json.dumps(known | kept))
        temporary.replace(cache)
    return found


def _source(settings: StageSettings) -> tuple[str, str | None]:
    """The field that names what the stage reads from outside the store, and its value."""
    sections = {
        "spec.model.source": settings.model,
        "spec.data.sft.source": settings.sft_data,
        "spec.data.preferences.source": settings.preference_data,
        "spec.data.prompts.source": settings.prompt_data,
        "spec.data.evaluation.source": settings.evaluation_data,
        "spec.reward.classifier.source": settings.reward.classifier if settings.reward else None,
    }
    return next(((field, section.source) for field, section in sections.items() if section), ("", None))


def _local_path(field: str, source: str) -> Path | None:
    """Where a source lies on this machine; None if it lies elsewhere. A package is found without importing it."""
    scheme, _, rest = source.partition("://")
    if scheme == "file":
        path = Path(unquote(rest))
    elif scheme == "package":
        path = package_path(field, source)
    else:
        return None
    if path.exists():
        return path.resolve()
    raise UserError(f"{field}: {source}: {path} does not exist; correct the path")


def _fingerprint(path: Path, known: dict[str, list[int | str]], kept: dict[str, list[int | str]]) -> str:
    if path.is_file():
        return _hash(path, known, kept)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return sha256_of([[file.relative_to(path).as_posix(), _hash(file, known, kept)] for file in files])


def _hash(file: Path, known: dict[str, list[int | str]], kept: dict[str, list[int | str]]) -> str:
    stat = file.stat()
    seen = known.get(str(file))
    if seen and seen[:2] == [stat.st_size, stat.st_mtime_ns]:
        kept[str(file)] = seen
        return str(seen[2])
    with file.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
    if time.time() - stat.st_mtime > SETTLED_SECONDS:
        kept[str(file)] = [stat.st_size, stat.st_mtime_ns, digest]
    return digest


def _read_cache(cache: Path) -> dict[str, list[int | str]]:
    try:
        content = json.loads(cache.read_text())
    except (OSError, ValueError):  # no cache, or not one: hash again
        return {}
    return content if isinstance(content, dict) else {}
