"""A small valid document, and changes of it, for the tests of the contract."""

import copy
from typing import Any

MINIMAL: dict[str, Any] = {
    "apiVersion": "rlhf.dev/v1alpha1",
    "kind": "RLHFRun",
    "metadata": {"name": "reviews"},
    "spec": {
        "model": {"source": "hf://owner/model"},
        "data": {
            "sft": {"source": "file:///texts.csv"},
            "preferences": {"source": "file:///pairs.csv", "chosenColumn": "good", "rejectedColumn": "bad"},
            "prompts": {"source": "file:///prompts.csv"},
        },
    },
}
ABSENT = object()  # as a value in `changed`: remove the field


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """MINIMAL with values put at dotted paths below spec, or at paths that begin with a slash from the document's root."""
    document = copy.deepcopy(MINIMAL)
    for path, value in changes.items():
        parts = path[1:].split(".") if path.startswith("/") else ["spec", *path.split(".")]
        section = document
        for part in parts[:-1]:
            section = section.setdefault(part, {})
        if value is ABSENT:
            section.pop(parts[-1])
        else:
            section[parts[-1]] = value
    return document
