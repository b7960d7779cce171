"""A small valid document, and changes of it, for the tests of the contract."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

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


@pytest.fixture(scope="session")
def changed() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A function that puts values at dotted paths of the small document; `...` removes a field.

    A path begins below spec, or with a slash at the document's root.
    """

    def change(changes: dict[str, Any]) -> dict[str, Any]:
        document = copy.deepcopy(MINIMAL)
        for path, value in changes.items():
            parts = path[1:].split(".") if path.startswith("/") else ["spec", *path.split(".")]
            section = document
            for part in parts[:-1]:
                section = section.setdefault(part, {})
            if value is ...:
                section.pop(parts[-1])
            else:
                section[parts[-1]] = value
        return document

    return change
