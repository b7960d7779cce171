"""The CustomResourceDefinition, made from the models and the rules: nothing of it is written by hand.

Kubernetes takes structural schemas only (apiextensions.k8s.io/v1, "Specifying a structural schema"): every reference
inlined, one type for each value, no union but that of integer and string, nothing about other fields of an object.
"""

from typing import Any, Final

from rlhf_api.names import GROUP, KIND, PLURAL, SHORT_NAMES, SINGULAR, VERSION
from rlhf_api.rules import RULES
from rlhf_api.run import Metadata, RunSpec, RunStatus

Schema = dict[str, Any]

# Parts of the spec that may change: they decide where and whether stages run, never what an artifact means.
MUTABLE: Final = ("suspend", "activeDeadlineSeconds", "ttlSecondsAfterFinished", "artifacts")
MUTABLE_WHILE_SUSPENDED: Final = ("gpu", "placement", "tracking")

ANY: Final[Schema] = {"x-kubernetes-preserve-unknown-fields": True}
INT_OR_STRING: Final[Schema] = {"x-kubernetes-int-or-string": True}
LIST_KEYS: Final = {"conditions": "type", "stages": "name"}  # lists of status that server-side apply merges by a key
COLUMNS: Final = (
    ("Phase", "string", ".status.phase"),
    ("Stage", "string", ".status.stage"),
    ("Progress", "string", ".status.progress"),
    ("ETA", "string", ".status.eta"),
    ("Reward", "number", ".status.reward"),
    ("Age", "date", ".metadata.creationTimestamp"),
)


def crd() -> Schema:
    """The CRD as a document for YAML."""
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": [{"name": name, "type": kind, "jsonPath": path} for name, kind, path in COLUMNS],
        "schema": {"openAPIV3Schema": _root()},
    }
    names = {
        "kind": KIND,
        "listKind": f"{KIND}List",
        "plural": PLURAL,
        "singular": SINGULAR,
        "shortNames": list(SHORT_NAMES),
        "categories": ["all", "ml"],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {"group": GROUP, "scope": "Namespaced", "names": names, "versions": [version]},
    }


def transition_rules() -> list[Schema]:
    """What an update may change of a spec, as CEL rules on old and new."""
    rules = []
    for field in RunSpec.model_fields.values():
        name = field.alias
        if name in MUTABLE:
            continue
        rule, message = f"self.{name} == oldSelf.{name}", "cannot be changed; apply a run of another name"
        if field.default is None:  # it may be absent, which CEL does not compare
            rule = f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || {rule})"
        if name in MUTABLE_WHILE_SUSPENDED:
            rule, message = f"{rule} || oldSelf.suspend", "can be changed while suspend is true only"
        rules.append(
            {
                "rule": rule,
                "message": message,
                "fieldPath": f".{name}",
                "reason": "FieldValueForbidden",
            }
        )
    return rules


def _root() -> Schema:
    spec = _structural_of(RunSpec)
    spec["description"] = RunSpec.__doc__
    spec["x-kubernetes-validations"] = [
        {"rule": rule.cel, "message": rule.message, "fieldPath": f".{rule.path}"} for rule in RULES
    ] + transition_rules()
    status = _structural_of(RunStatus)
    for name, key in LIST_KEYS.items():
        status["properties"][name] |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}
    name = Metadata.model_json_schema()["properties"]["name"]
    return {
        "description": "One run of the chain: import, sft, merge, reward, ppo, evaluate.",
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {
                "type": "object",
                "properties": {"name": {"type": "string", "pattern": name["pattern"]}},
            },
            "spec": spec,
            "status": status,
        },
    }


def _structural_of(model: type[RunSpec] | type[RunStatus]) -> Schema:
    schema = model.model_json_schema(by_alias=True)
    return structural(schema, schema.get("$defs", {}))


def structural(node: Schema, definitions: dict[str, Schema]) -> Schema:
    """`node`, a schema of pydantic's, as a structural schema. `definitions` are those that `$ref` names.

    A union of a type and null is the type; it is nullable where null differs from leaving the field out. A union that
    Kubernetes cannot say accepts anything here and is checked when the run is parsed.
    """
    node = {key: value for key, value in node.items() if key not in ("title", "$defs")}
    reference, union = node.pop("$ref", None), node.pop("anyOf", None)
    if reference:
        inlined = structural(definitions[reference.rsplit("/", 1)[-1]], definitions)
        return inlined | ({"description": node["description"]} if "description" in node else {})
    if union:
        return _union(node, union, definitions)
    if "const" in node:
        node["enum"] = [node.pop("const")]
    if rules := _exclusive_bounds(node):
        node["x-kubernetes-validations"] = rules
    if node.get("default", ...) is None:
        del node["default"]
    if node.get("type") == "array":
        node["items"] = structural(node["items"], definitions)
    if node.get("type") == "object":
        _object(node, definitions)
    return node


def _union(node: Schema, union: list[Schema], definitions: dict[str, Schema]) -> Schema:
    branches = [branch for branch in union if branch.get("type") != "null"]
    about = {key: node[key] for key in ("description", "default") if node.get(key) is not None}
    if {branch.get("type") for branch in branches} == {"string", "integer"}:
        return INT_OR_STRING | about
    if len(branches) > 1:
        return ANY | about
    nullable = {"nullable": True} if "default" in about and len(union) > 1 else {}
    return structural(branches[0], definitions) | about | nullable


def _exclusive_bounds(node: Schema) -> list[Schema]:
    """Rules for bounds that a value may not touch, which structural schemas of v1 say with a boolean."""
    rules = []
    for key, sign, words in (("exclusiveMinimum", ">", "above"), ("exclusiveMaximum", "<", "below")):
        if key in node:
            bound = float(node.pop(key))
            rules.append({"rule": f"self {sign} {bound}", "message": f"must be {words} {bound:g}"})
    return rules


def _object(node: Schema, definitions: dict[str, Schema]) -> None:
    additional = node.pop("additionalProperties", None)
    if "properties" not in node:
        free = not isinstance(additional, dict) or not additional
        node |= ANY if free else {"additionalProperties": structural(additional, definitions)}
        return
    properties = {name: structural(child, definitions) for name, child in node["properties"].items()}
    for name, schema in properties.items():
        # A section left out still gets the defaults of its fields, and rules may read them.
        settled = name in node.get("required", []) or "anyOf" in node["properties"][name] or "default" in schema
        if not settled and schema.get("type") in ("object", "array"):
            schema["default"] = {} if schema["type"] == "object" else []
    node["properties"] = properties
