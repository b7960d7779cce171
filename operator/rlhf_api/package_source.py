"""Where package://module/path lies: a file that an installed Python package ships."""

import importlib.util
from pathlib import Path

from rlhf_api.errors import UserError


def package_path(field: str, source: str) -> Path:
    """The path that `source` names, whether or not it exists. The package is found without importing it.

    Its own imports may be missing. Raises UserError, beginning with `field`, if no such package is installed.
    """
    package, _, inner = source.removeprefix("package://").partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{field}: {source}: no Python package {package!r} is installed; install it")
    candidates = [Path(location) / inner for location in spec.submodule_search_locations]
    return next((path for path in candidates if path.exists()), candidates[0])
