"""A document made into an RLHFRun, or into every complaint about it at once, each naming field, value and remedy."""

import copy
import difflib
import re
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from rlhf_api.errors import UserError
from rlhf_api.names import API_VERSION, KIND
from rlhf_api.rules import RULES, Problem, Rule
from rlhf_api.run import RLHFRun, RunSpec

Location = Sequence[str | int]

# The names of a union's branches in the location of an error, which are no part of the document.
SCALAR = ("str", "int", "constrained-str", "constrained-int")
BRACKETED = re.compile(r"(list|literal|constrained-\w+|function-\w+)\[.*\]")
WORDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
BOUNDS = {
    "greater_than": ("gt", "above {}"),
    "greater_than_equal": ("ge", "{} or more"),
    "less_than": ("lt", "below {}"),
    "less_than_equal": ("le", "{} or less"),
}


def parse_run(document: Any) -> RLHFRun:
    """The run that a YAML or JSON document describes. Raises UserError with one line for each problem.

    Types are strict, as the Kubernetes API's are: "8" is no number. What one field breaks by itself and what several
    break together are told at once, except where the second may follow from the first.
    """
    if not isinstance(document, dict):
        kind = _kind_of(document)
        raise UserError(f"the document is {kind}; write a mapping with apiVersion, kind, metadata and spec")
    if lines := [line for field in ("apiVersion", "kind") if (line := _wrong_header(document, field))]:
        raise UserError("\n".join(lines))
    try:
        run = RLHFRun.model_validate(document, strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        details = error.errors()
        raise UserError("\n".join(_lines(details) + _broken_besides(document, details))) from None
    if lines := _broken(run.spec, RULES):
        raise UserError("\n".join(lines))
    return run


def _wrong_header(document: dict[Any, Any], field: str) -> str | None:
    wanted = {"apiVersion": API_VERSION, "kind": KIND}[field]
    if document.get(field) == wanted:
        return None
    return f"{field}: {document[field]!r} should be {wanted}" if field in document else f"{field}: is missing: {wanted}"


# ---- rules ----------------------------------------------------------------------------------------------------------


def _broken(spec: RunSpec, rules: Iterable[Rule]) -> list[str]:
    return [str(Problem(rule.path, rule.explain(spec))) for rule in rules if not rule.holds(spec)]


def _broken_besides(document: dict[Any, Any], details: Iterable[Any]) -> list[str]:
    """The rules that `document` breaks besides, of those that read none of the fields that are wrong."""
    wrong = []
    remaining = copy.deepcopy(document)
    for detail in details:
        # A wrong item spoils its list, and a wrong name its section: who knows what was meant.
        location = list(_field(detail["loc"]))
        location = location[: next((i for i, part in enumerate(location) if isinstance(part, int)), None)]
        _remove(remaining, location)
        wrong.append(location[:-1] if detail["type"] == "extra_forbidden" else location)
    spec = _spec_with_stand_ins(remaining.get("spec", {}))
    if spec is None:
        return []
    return _broken(spec, [rule for rule in RULES if not any(_reads(rule, location) for location in wrong)])


def _spec_with_stand_ins(document: dict[Any, Any]) -> RunSpec | None:
    """The spec in `document` with something in place of what is missing; None if more than that is wrong with it."""
    while True:
        try:
            return RunSpec.model_validate(document, strict=True, by_alias=True, by_name=False)
        except ValidationError as error:
            if any(detail["type"] != "missing" for detail in error.errors()):
                return None
            for detail in error.errors():
                section = _model_at(("spec", *detail["loc"]))
                _put(document, detail["loc"], {} if section else "file:///unknown")


def _reads(rule: Rule, location: Location) -> bool:
    """Whether the rule depends on the field at `location`, on a part of it, or on what contains it."""
    if location[:1] != ["spec"]:
        return False
    field = ".".join(map(str, ["self", *location[1:]]))
    read = re.findall(r"self(?:\.\w+)+", rule.cel.replace("__function__", "function"))
    return any(f"{path}.".startswith(f"{field}.") or f"{field}.".startswith(f"{path}.") for path in read)


def _remove(document: Any, location: Location) -> None:
    for part in location[:-1]:
        if not isinstance(document, dict):
            return
        document = document.get(part)
    if isinstance(document, dict) and location:
        document.pop(location[-1], None)


def _put(document: Any, location: Location, value: Any) -> None:
    for part in location[:-1]:
        document = document[part]
    document[location[-1]] = value


# ---- one line a field -----------------------------------------------------------------------------------------------


def _lines(details: Iterable[Any]) -> list[str]:
    """One line a field: the branches of a union complain one by one, and are told as one."""
    fields: dict[str, list[Any]] = {}
    for detail in details:
        fields.setdefault(_path(_field(detail["loc"])), []).append(detail)
    # Where an item of a list is wrong, that the field may also be something other than a list is beside the point.
    told = [path for path in fields if not any(other.startswith(f"{path}[") for other in fields)]
    return [f"{path}: {_complaint(fields[path])}" for path in told]


def _field(location: Location) -> Location:
    """`location` without the names of a union's branches."""
    location = [part for part in location if not BRACKETED.fullmatch(str(part))]
    scalar = len(location) > 1 and location[-1] in SCALAR and _model_at(location[:-1]) is None
    return location[:-1] if scalar else location


def _complaint(details: Sequence[Any]) -> str:
    detail = details[0]
    location, kind = _field(detail["loc"]), detail["type"]
    if kind == "extra_forbidden":
        return f"unknown field{_suggestion(location)}"
    if kind == "missing":
        return f"is missing{_description(location)}"
    wanted = list(dict.fromkeys(_wanted(each) for each in details))
    value = detail["input"]
    shown = _shown(value)
    if kind == "string_pattern_mismatch":
        return f"{shown} has not the right form{_description(location) or f': {detail["ctx"]["pattern"]}'}"
    quotes = "; remove the quotes" if isinstance(value, str) and _needs_no_quotes(value, details) else ""
    if "text" in wanted:
        quotes = (
            f"{', in quotes' if len(wanted) == 1 and isinstance(value, int | float) else ''}{_description(location)}"
        )
    return f"{shown} should be {' or '.join(wanted)}{quotes}"


def _shown(value: Any) -> str:
    """The value as YAML writes it, or its kind where it has parts."""
    if isinstance(value, dict | list) or value is None:
        return f"is {_kind_of(value)};"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


def _needs_no_quotes(value: str, details: Iterable[Any]) -> bool:
    kinds = {detail["type"] for detail in details}
    number = re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", value)
    return bool(number and kinds & {"int_type", "float_type"}) or (value in ("true", "false") and "bool_type" in kinds)


def _wanted(detail: Any) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in WORDS:
        return WORDS[kind]
    if kind in BOUNDS:
        name, words = BOUNDS[kind]
        return words.format(f"{context[name]:g}" if isinstance(context[name], float) else context[name])
    match kind:
        case "literal_error":
            return str(context["expected"]).replace("'", "")
        case "string_too_long":
            return f"at most {context['max_length']} characters"
        case "string_too_short":
            return f"at least {context['min_length']} characters"
        case "too_long":
            return f"a list of at most {context['max_length']}"
        case "too_short":
            return f"a list of at least {context['min_length']}"
    return str(detail["msg"]).removeprefix("Input should be ")


def _path(location: Location) -> str:
    path = ""
    for part in location:
        if isinstance(part, str) and re.fullmatch(r"[\w/-]+", part):
            path += f".{part}" if path else part
        else:
            path += f"[{part!r}]"
    return path


def _suggestion(location: Location) -> str:
    section = _model_at(location[:-1])
    names = sorted(_fields(section)) if section else []
    lower = {name.lower(): name for name in names}
    written = str(location[-1]).replace("_", "").replace("-", "").lower()
    close = difflib.get_close_matches(written, lower, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {lower[close[0]]}?"
    return f"; there are {', '.join(names)}" if names else ""


def _description(location: Location) -> str:
    section = _model_at(location[:-1])
    field = _fields(section).get(str(location[-1])) if section else None
    return f": {field.description.rstrip('.')}" if field and field.description else ""


# ---- the models, by location ----------------------------------------------------------------------------------------


def _fields(section: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _model_at(location: Location) -> type[BaseModel] | None:
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
    names = {dict: "a mapping", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
