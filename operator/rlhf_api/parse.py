"""A document made into an RLHFRun, or into every complaint about it at once, each naming field, value and remedy."""

import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from rlhf_api.errors import UserError
from rlhf_api.names import API_VERSION, KIND
from rlhf_api.rules import problems
from rlhf_api.run import RLHFRun

BRANCHES = ("str", "int", "bool", "float")  # how pydantic names the parts of a union in an error's location


def parse_run(document: Any) -> RLHFRun:
    """The run that a YAML or JSON document describes. Raises UserError with one line for each problem.

    Types are strict, as the Kubernetes API's are: "8" is no number.
    """
    if not isinstance(document, dict):
        raise UserError(
            f"the document is a {_kind_of(document)}; write a mapping with apiVersion, kind, metadata and spec"
        )
    for field, wanted in (("apiVersion", API_VERSION), ("kind", KIND)):
        if document.get(field) != wanted:
            found = repr(document[field]) if field in document else "missing"
            raise UserError(f"{field}: is {found}; it must be {wanted}")
    try:
        run = RLHFRun.model_validate(document, strict=True)
    except ValidationError as error:
        raise UserError("\n".join(_lines(error.errors()))) from None
    if lines := [str(problem) for problem in problems(run.spec)]:
        raise UserError("\n".join(lines))
    return run


def _lines(details: Iterable[Any]) -> list[str]:
    """One line a field: the branches of a union complain one by one, and are told as one."""
    lines: dict[str, str] = {}
    for detail in details:
        branch = detail["loc"][-1] if detail["loc"] else ""
        if branch in BRANCHES or str(branch).startswith(("list[", "literal[")):
            detail = {**detail, "loc": detail["loc"][:-1]}
            field, line = _path(detail["loc"]), _line(detail)
            lines[field] = f"{lines[field]} or {line.rsplit(': ', 1)[-1]}" if field in lines else line
        else:
            lines[_path(detail["loc"])] = _line(detail)
    return list(lines.values())


def _line(detail: Any) -> str:
    location, kind = detail["loc"], detail["type"]
    path = _path(location)
    if kind == "extra_forbidden":
        return f"{path}: unknown field{_suggestion(location)}"
    if kind == "missing":
        return f"{path}: is missing{_description(location)}"
    message = detail["msg"]
    if kind == "string_pattern_mismatch":
        message = f"has not the right form{_description(location)}"
    message = message.replace("Input should be", "should be").replace("Value error, ", "")
    value = detail["input"]
    shown = f"is a {_kind_of(value)}" if isinstance(value, dict | list) else f"{value!r}"
    return f"{path}: {shown}: {message}"


def _path(location: Iterable[str | int]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _suggestion(location: tuple[str | int, ...]) -> str:
    section = _section_at(location[:-1])
    names = sorted(_fields(section)) if section else []
    close = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; there are {', '.join(names)}" if names else ""


def _description(location: tuple[str | int, ...]) -> str:
    section = _section_at(location[:-1])
    field = _fields(section).get(str(location[-1])) if section else None
    return (
        f"; it is {field.description[0].lower()}{field.description[1:].rstrip('.')}"
        if field and field.description
        else ""
    )


def _fields(section: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _section_at(location: Iterable[str | int]) -> type[BaseModel] | None:
    """The model whose fields are found at `location`, or None where there is none."""
    section: type[BaseModel] | None = RLHFRun
    for part in location:
        if isinstance(part, int):
            continue
        field = _fields(section).get(part) if section else None
        section = _model_in(field.annotation) if field else None
    return section


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, typing.Annotated):
        for argument in typing.get_args(annotation):
            if found := _model_in(argument):
                return found
    return None


def _kind_of(value: Any) -> str:
    names = {dict: "mapping", list: "list", str: "text", int: "number", float: "number", bool: "boolean"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
