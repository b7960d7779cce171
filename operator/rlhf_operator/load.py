"""Reads an RLHFRun from a YAML file as Kubernetes would, and refuses what YAML lets slip by."""

import re
from pathlib import Path
from typing import Any

import yaml

from rlhf_api.errors import UserError
from rlhf_api.parse import parse_run
from rlhf_api.run import RLHFRun


def load_run(path: Path) -> RLHFRun:
    """The run that a file describes. Raises UserError, each line beginning with the file's name or a field's path."""
    document = load_document(path)
    try:
        return parse_run(document)
    except UserError as error:
        raise UserError(f"{path} is not a valid RLHFRun:\n{error}") from None


def load_document(path: Path) -> Any:
    """What the file says, with no default filled in. Raises UserError unless it is YAML, or JSON, of one document."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        documents = [document for document in yaml.load_all(text, _Loader) if document is not None]
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is no valid YAML: {' '.join(str(error).split())}") from None
    if len(documents) != 1:
        raise UserError(f"{path}: holds {len(documents)} documents; write one RLHFRun")
    return documents[0]


class _Loader(yaml.SafeLoader):
    """YAML as Kubernetes reads it: 2e-4 is a number, dates are text, a key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key is no text", key.start_mark)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} is given twice", key.start_mark)
            seen.add(name)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
