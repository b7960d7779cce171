"""The shape of a model that has not been imported yet, from its config.json alone: of a folder here, or of the hub."""

import json
import os
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError
from urllib.parse import quote, unquote
from urllib.request import Request, urlopen

from rlhf_api.budget import ModelShape, shape_of
from rlhf_api.run import Model

HUB: Final = "https://huggingface.co"
TIMEOUT_SECONDS: Final = 5.0


def shape_before_import(model: Model) -> ModelShape | str:
    """The shape, or why it is not known yet."""
    scheme, _, rest = model.source.partition("://")
    try:
        if rest.endswith(".gguf"):
            return "a GGUF file is read by the import"
        if scheme == "file":
            config = json.loads((Path(unquote(rest)) / "config.json").read_text())
        elif scheme == "hf" and rest.count("/") == 1:
            config = _from_hub(rest, model.revision or "main")
        else:
            return f"{scheme}:// is read by the import"
        return shape_of(config) or "its config.json names its sizes as no model known here"
    except HTTPError as error:
        return f"{error.url}: {error.code} {error.reason}"
    except (OSError, HTTPException, ValueError, AttributeError) as error:
        return f"config.json of {model.source}: {getattr(error, 'reason', error)}"


def _from_hub(name: str, revision: str) -> Any:
    """HF_ENDPOINT and HF_TOKEN count as they do in the import."""
    endpoint = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    request = Request(f"{endpoint}/{quote(name)}/resolve/{quote(revision, safe='')}/config.json")
    if token := os.environ.get("HF_TOKEN"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    with urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
        return json.load(answer)
