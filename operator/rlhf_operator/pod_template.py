"""A pod template laid over another, as the Kubernetes API's strategic merge patch does it for pods."""

from typing import Any, Final

from rlhf_api.errors import UserError

Document = dict[str, Any]

# The lists whose items are merged, by the field that tells items apart; every other list replaces.
KEYS: Final = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
}
ADDED: Final = ("tolerations", "envFrom")  # lists that have no such field: the overlay's items come after


def overlaid(base: Document, overlay: Document, path: str) -> Document:
    """`base` with `overlay` laid over it: mappings field by field, lists by their items' names, null removes.

    `path` is where the overlay is written, for messages. Raises UserError if the two do not fit together.
    """
    merged = dict(base)
    for name, value in overlay.items():
        field, below = f"{path}.{name}", merged.get(name)
        if value is None:
            merged.pop(name, None)
        elif below is None:
            merged[name] = _checked(name, value, field)
        elif isinstance(below, dict):
            merged[name] = overlaid(below, _mapping(value, field), field)
        elif name in KEYS:
            merged[name] = _merged_list(below, _checked(name, value, field), KEYS[name], field)
        elif name in ADDED:
            merged[name] = [*below, *_list(value, field)]
        else:
            merged[name] = value
    return merged


def _merged_list(base: list[Document], overlay: list[Document], key: str, path: str) -> list[Document]:
    places = {item[key]: place for place, item in enumerate(base)}
    merged = list(base)
    for item in overlay:
        if (place := places.get(item[key])) is None:
            merged.append(item)
        else:
            merged[place] = overlaid(merged[place], item, f"{path}[{item[key]}]")
    return merged


def _checked(name: str, value: Any, path: str) -> Any:
    """`value`, if it may stand under `name`: the items of a list that is merged need the field that names them."""
    if name not in KEYS:
        return value
    for place, item in enumerate(_list(value, path)):
        if not isinstance(_mapping(item, f"{path}[{place}]").get(KEYS[name]), str | int):
            raise UserError(f"{path}[{place}]: has no {KEYS[name]}; give it one, so that it is known which is meant")
    return value


def _mapping(value: Any, path: str) -> Document:
    if not isinstance(value, dict):
        raise UserError(f"{path}: {value!r} should be a mapping, as in a pod")
    return value


def _list(value: Any, path: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{path}: {value!r} should be a list, as in a pod")
    return value
