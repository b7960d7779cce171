"""The CRD is a structural schema, by the rules of the Kubernetes API, and knows every field and default."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from rlhf_api.crd import crd, structural
from rlhf_api.names import GROUP, PLURAL
from rlhf_api.rules import RULES
from rlhf_api.run import RunSpec

ROOT = Path(__file__).parents[2]
CRD_FILE = ROOT / "manifests/crd/rlhfruns.yaml"
CHART_SCHEMA = ROOT / "charts/rlhf-operator/values.schema.json"
SCHEMA: dict[str, Any] = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
SPEC = SCHEMA["properties"]["spec"]

# What a structural schema may hold here; all else is refused or ignored by the API server.
ALLOWED = {
    "type", "description", "properties", "items", "additionalProperties", "required", "default", "nullable", "enum",
    "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "maxProperties",
    "x-kubernetes-validations", "x-kubernetes-preserve-unknown-fields", "x-kubernetes-int-or-string",
    "x-kubernetes-list-type", "x-kubernetes-list-map-keys",
}  # fmt: skip


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema inside a schema, with its path."""
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[]")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from nodes(schema["additionalProperties"], f"{path}{{}}")


NODES = list(nodes(SCHEMA))


def test_only_keywords_that_the_api_server_keeps() -> None:
    assert {key for _, node in NODES for key in node} <= ALLOWED


def test_every_value_has_one_type_or_says_that_it_has_none() -> None:
    for path, node in NODES:
        free = "x-kubernetes-preserve-unknown-fields" in node or "x-kubernetes-int-or-string" in node
        assert ("type" in node) or free, path
        assert node.get("type") in (None, "object", "array", "string", "integer", "number", "boolean"), path
        assert not ("type" in node and "x-kubernetes-int-or-string" in node), path


def test_only_free_form_fields_keep_unknown_fields() -> None:
    free = {path for path, node in NODES if "x-kubernetes-preserve-unknown-fields" in node}
    assert free == {
        ".spec.lora.targetModules",
        ".spec.placement.tolerations[]",
        ".spec.placement.podTemplate",
        ".spec.placement.stagePodTemplates{}",
        ".status.budget[]",
    }


def test_objects_and_arrays_say_what_is_in_them() -> None:
    for path, node in NODES:
        if node.get("type") == "array":
            assert "items" in node, path
        if node.get("type") == "object" and path != ".metadata":
            kinds = [key for key in ("properties", "additionalProperties") if key in node]
            assert len(kinds) == (0 if "x-kubernetes-preserve-unknown-fields" in node else 1), path


def test_numbers_have_inclusive_bounds_and_defaults_lie_within() -> None:
    for path, node in NODES:
        default = node.get("default")
        if node.get("type") in ("integer", "number") and default is not None:
            assert node.get("minimum", default) <= default <= node.get("maximum", default), path


def test_what_has_a_null_default_in_python_has_none_here() -> None:
    assert all(node.get("default", ...) is not None for _, node in NODES)


def test_null_is_kept_only_where_it_differs_from_the_default() -> None:
    assert {path for path, node in NODES if node.get("nullable")} == {".spec.ppo.missingEosPenalty"}


def test_every_part_of_the_spec_is_bounded_so_that_rules_have_a_bounded_cost() -> None:
    for path, node in nodes(SPEC):
        if node.get("type") == "string" and "enum" not in node:
            assert "maxLength" in node, path
        if node.get("type") == "array":
            assert "maxItems" in node, path
        if "additionalProperties" in node:
            assert "maxProperties" in node, path


def test_every_field_of_the_spec_is_explained() -> None:
    for path, node in nodes(SPEC):
        if not path.endswith(("[]", "{}")):
            assert len(node.get("description", "")) > 4, path


def test_a_section_left_out_gets_the_defaults_that_python_gives() -> None:
    assert _defaulted(SPEC, {}) == _without_nulls(_python_defaults(RunSpec))


def test_the_rules_are_all_there_with_their_fields() -> None:
    found = {(rule["rule"], rule["fieldPath"]) for rule in SPEC["x-kubernetes-validations"]}
    assert {(rule.cel, f".{rule.path}") for rule in RULES} <= found
    assert all(len(rule["message"]) > 10 for rule in SPEC["x-kubernetes-validations"])


def test_names_columns_and_status() -> None:
    document = crd()
    assert document["metadata"]["name"] == f"{PLURAL}.{GROUP}"
    assert document["spec"]["names"]["shortNames"] == ["rlhf"]
    [version] = document["spec"]["versions"]
    assert version["subresources"] == {"status": {}}
    assert [column["name"] for column in version["additionalPrinterColumns"]] == [
        "Phase", "Stage", "Progress", "ETA", "Reward", "Age",
    ]  # fmt: skip
    for column in version["additionalPrinterColumns"][:-1]:
        _, section, field = column["jsonPath"].split(".")
        assert SCHEMA["properties"][section]["properties"][field]["type"] == column["type"]


def test_the_generated_file_is_up_to_date() -> None:
    assert yaml.safe_load(CRD_FILE.read_text()) == crd()


@pytest.mark.parametrize(
    ("pydantic", "kubernetes"),
    [
        ({"const": "a", "type": "string"}, {"enum": ["a"], "type": "string"}),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}, {"type": "integer"}),
        (
            {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": 1},
            {"type": "integer", "default": 1, "nullable": True},
        ),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, {"x-kubernetes-int-or-string": True}),
        ({"anyOf": [{"type": "string"}, {"type": "array"}]}, {"x-kubernetes-preserve-unknown-fields": True}),
        ({"$ref": "#/$defs/A", "description": "here"}, {"type": "string", "description": "here"}),
        (
            {"type": "number", "exclusiveMinimum": 0},
            {"type": "number", "x-kubernetes-validations": [{"rule": "self > 0.0", "message": "must be above 0"}]},
        ),
        (
            {"type": "object", "additionalProperties": {"type": "string", "title": "X"}},
            {"type": "object", "additionalProperties": {"type": "string"}},
        ),
        (
            {"type": "object", "additionalProperties": False, "properties": {"a": {"type": "object"}}},
            {
                "type": "object",
                "properties": {"a": {"type": "object", "default": {}, "x-kubernetes-preserve-unknown-fields": True}},
            },
        ),
    ],
    ids=["const", "optional", "nullable", "int-or-string", "union", "reference", "bound", "map", "section"],
)
def test_structural(pydantic: dict[str, Any], kubernetes: dict[str, Any]) -> None:
    assert structural(pydantic, {"A": {"type": "string", "description": "there", "title": "A"}}) == kubernetes


def _defaulted(schema: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    """What the API server makes of `value`: defaults filled in, top down."""
    filled = {name: child["default"] for name, child in schema["properties"].items() if "default" in child} | value
    return {
        name: _defaulted(schema["properties"][name], inner) if "properties" in schema["properties"][name] else inner
        for name, inner in filled.items()
    }


def _python_defaults(model: type[BaseModel]) -> dict[str, Any]:
    fields = {field.alias: field.get_default(call_default_factory=True) for field in model.model_fields.values()
              if not field.is_required()}  # fmt: skip
    return {
        str(name): value.model_dump(mode="json", by_alias=True) if isinstance(value, BaseModel) else value
        for name, value in fields.items()
    }


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_nulls(inner) if isinstance(inner, dict) else inner
        for name, inner in value.items()
        if inner is not None
    }


@pytest.mark.parametrize("name", ["bucket", "prefix", "endpoint"])
def test_the_chart_takes_no_object_store_that_a_run_could_not_name(name: str) -> None:
    of_run = SPEC["properties"]["objectStore"]["properties"][name]
    of_chart = json.loads(CHART_SCHEMA.read_text())["properties"]["objectStore"]["properties"][name]
    limits = {key: of_run[key] for key in ("pattern", "minLength", "maxLength") if key in of_run}
    none = "^$|" if name == "endpoint" else ""  # the chart's default: the bundled store
    assert {key: of_chart.get(key) for key in limits} == limits | {"pattern": none + limits["pattern"]}
