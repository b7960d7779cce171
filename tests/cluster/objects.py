"""Objects of a cluster, read in this process: a kubectl for each look would take more of the machine than the tests."""

import time
from functools import cache
from pathlib import Path
from typing import Any

from bare_plane import api_of

from rlhf_api.names import GROUP, PLURAL, VERSION
from rlhf_operator.kubernetes_api import ApiError, NotFound

AWAY_SECONDS = 60.0  # an API server that is about to come back refuses, and one that is just back knows no roles
APIS = {PLURAL: f"/apis/{GROUP}/{VERSION}", "jobs": "/apis/batch/v1", "statefulsets": "/apis/apps/v1"}
OF_THE_CLUSTER = ("nodes",)

Document = dict[str, Any]

_kept_api = cache(api_of)
"""One a cluster: a connection that is collected unclosed is an error of whichever test runs then."""


class Objects:
    """The objects of one namespace, and the nodes."""

    def __init__(self, kubeconfig: Path, namespace: str) -> None:
        self._api, self._namespace = _kept_api(kubeconfig), namespace

    def get(self, plural: str, name: str) -> Document:
        """One object. Raises NotFound."""
        return self._read(f"{self._path(plural)}/{name}", {})

    def list(self, plural: str, labels: str = "", fields: str = "") -> list[Document]:
        """Those with these labels and fields, each a selector; all without."""
        query = {"labelSelector": labels, "fieldSelector": fields}
        found: list[Document] = self._read(self._path(plural), {key: each for key, each in query.items() if each})[
            "items"
        ]
        return found

    def _path(self, plural: str) -> str:
        place = "" if plural in OF_THE_CLUSTER else f"/namespaces/{self._namespace}"
        return f"{APIS.get(plural, '/api/v1')}{place}/{plural}"

    def _read(self, path: str, query: dict[str, str]) -> Document:
        deadline = time.monotonic() + AWAY_SECONDS
        while True:
            try:
                return self._api.request("GET", path, query=query)
            except NotFound:
                raise
            except ApiError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(1)
