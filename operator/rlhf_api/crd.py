"""The CustomResourceDefinition, made from the models and the rules: nothing of it is written by hand."""

from typing import Any

from rlhf_api.names import GROUP, KIND, PLURAL, SHORT_NAMES, SINGULAR, VERSION
from rlhf_api.rules import RULES
from rlhf_api.run import RunSpec, RunStatus

Schema = dict[str, Any]

MUTABLE = ("suspend",)  # every other part of the spec decides what artifacts mean, and is fixed once applied
ANY: Schema = {"x-kubernetes-preserve-unknown-fields": True}
DROPPED = ("title", "$defs", "discriminator")
COLUMNS = (
    ("Phase", "string", ".status.phase"),
    ("Stage", "string", ".status.stage"),
    ("Progress", "string", ".status.progress"),
    ("Reward", "number", ".status.reward"),
    ("Age", "date", ".metadata.creationTimestamp"),
)


def crd() -> Schema:
    """The CRD as a document for YAML."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": SINGULAR,
                "shortNames": list(SHORT_NAMES),
                "categories": ["all", "ml"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        {"name": name, "type": kind, "jsonPath": path} for name, kind, path in COLUMNS
                    ],
                    "schema": {"openAPIV3Schema": _root()},
                }
            ],
        },
    }


def _root() -> Schema:
    spec = _structural_of(RunSpec)
    spec["x-kubernetes-validations"] = [
        {"rule": rule.cel, "message": f"{rule.path}: {rule.message}"} for rule in RULES
    ] + [
        {"rule": f"self.{name} == oldSelf.{name}", "message": f"{name}: cannot be changed; apply a run of another name"}
        for name in spec["properties"]
        if name not in MUTABLE
    ]
    return {
        "description": "One run of the chain: import, sft, merge, reward, ppo, evaluate.",
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": _structural_of(RunStatus),
        },
    }


def _structural_of(model: type[RunSpec] | type[RunStatus]) -> Schema:
    schema = model.model_json_schema(by_alias=True)
    return structural(schema, schema.get("$defs", {}))


def structural(node: Schema, definitions: dict[str, Schema]) -> Schema:
    """`node` as a Kubernetes structural schema: references inlined, unions and constants in the forms it allows.

    A union of a type and null is the type; it is nullable where null differs from leaving the field out. Another union
    accepts anything here and is checked when the run is parsed.
    """
    node = {key: value for key, value in node.items() if key not in DROPPED}
    if reference := node.pop("$ref", None):
        inlined = structural(definitions[reference.rsplit("/", 1)[-1]], definitions)
        return inlined | {key: node[key] for key in ("description",) if key in node}
    if "anyOf" in node:
        return _union(node, definitions)
    if "const" in node:
        node["enum"] = [node.pop("const")]
    _exclusive_bounds(node)
    if node.get("default", ...) is None:
        del node["default"]
    if node.get("type") == "array":
        node["items"] = structural(node["items"], definitions) or dict(ANY)
    if node.get("type") == "object":
        _object(node, definitions)
    return node


def _union(node: Schema, definitions: dict[str, Schema]) -> Schema:
    branches = [branch for branch in node.pop("anyOf") if branch.get("type") != "null"]
    default = node.pop("default", None)
    about = {"description": node["description"]} if "description" in node else {}
    if len(branches) > 1:
        return dict(ANY) | about | ({"default": default} if default is not None else {})
    schema = structural(branches[0], definitions) | about
    if default is not None:
        schema |= {"default": default, "nullable": True}
    return schema


def _exclusive_bounds(node: Schema) -> None:
    rules = []
    for key, sign in (("exclusiveMinimum", ">"), ("exclusiveMaximum", "<")):
        if key in node:
            bound = float(node.pop(key))
            rules.append({"rule": f"self {sign} {bound}", "message": f"must be {sign} {bound:g}"})
    if rules:
        node["x-kubernetes-validations"] = rules


def _object(node: Schema, definitions: dict[str, Schema]) -> None:
    additional = node.pop("additionalProperties", None)
    if "properties" not in node:
        if isinstance(additional, dict) and additional:
            node["additionalProperties"] = structural(additional, definitions)
        else:
            node["x-kubernetes-preserve-unknown-fields"] = True
        return
    required = node.get("required", [])
    properties = {}
    for name, child in node["properties"].items():
        schema = structural(child, definitions)
        optional = "anyOf" in child
        if name not in required and not optional and "default" not in schema:
            # A section left out still gets the defaults of its fields, and rules may read them.
            if schema.get("type") == "object":
                schema["default"] = {}
            elif schema.get("type") == "array":
                schema["default"] = []
        properties[name] = schema
    node["properties"] = properties
