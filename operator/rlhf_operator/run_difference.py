"""In which fields two runs differ: what somebody asks for, and what is there under the same name."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from rlhf_api.run import RLHFRun

ABSENT: Final = "not set"


def differences(asked: RLHFRun, there: RLHFRun) -> dict[str, tuple[str, str]]:
    """Field -> its value as asked for and as it is there. Equal are fields left out and set to their default.

    `spec.suspend` is left out: it says when, not what. Of labels only those asked for count: others may be added.
    """
    old = dict(_fields("spec", _spec(there)))
    new = dict(_fields("spec", _spec(asked)))
    labels = (there.metadata.model_extra or {}).get("labels") or {}
    for name, value in ((asked.metadata.model_extra or {}).get("labels") or {}).items():
        field = f"metadata.labels.{name}"
        new[field] = _shown(value)
        old[field] = _shown(labels[name]) if name in labels else ABSENT
    both = [(field, new.get(field, ABSENT), old.get(field, ABSENT)) for field in {**new, **old}]
    return {field: (mine, its) for field, mine, its in both if mine != its}


def _spec(run: RLHFRun) -> dict[str, Any]:
    return run.spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"suspend"})


def _fields(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every field below a path with its value; a list is one value."""
    if isinstance(value, Mapping) and value:
        for name, below in value.items():
            yield from _fields(f"{path}.{name}", below)
    elif value != {}:
        yield path, _shown(value)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
