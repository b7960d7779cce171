"""One request to the Kubernetes API: documents in, documents out, and each refusal as an error that says what to do."""

import json
from collections.abc import Mapping
from typing import Any, Final

import urllib3
from kubernetes import client, config

from rlhf_api.errors import RLHFError, StoreError
from rlhf_operator.pod_template import Document

TIMEOUT: Final = urllib3.Timeout(connect=5, read=30)
CONTENT_TYPES: Final = {"PATCH": "application/merge-patch+json"}


class ApiError(RLHFError):
    """The API server did not do what it was asked to; trying again may help."""

    failure = "infrastructure"


class NotFound(ApiError):
    """There is no such object."""


class AlreadyExists(ApiError):
    """There is an object of that name."""


class Conflict(ApiError):
    """The object has changed since it was read."""


class Denied(ApiError):
    """Not now: a quota, a missing permission, an admission policy."""


class Invalid(RLHFError):
    """The API server says that the object can never be."""

    failure = "user"


class KubernetesApi:
    """The API server that the pod's service account, or the kubeconfig, names. Safe to use from several threads."""

    def __init__(self, connections: int) -> None:
        """Raises StoreError if neither is there. `connections`: kept open at once."""
        settings = client.Configuration()
        try:
            config.load_incluster_config(client_configuration=settings)
        except config.ConfigException:
            try:
                config.load_kube_config(client_configuration=settings)
            except config.ConfigException as error:
                raise StoreError(f"no Kubernetes API: {error}; run in a pod, or set KUBECONFIG") from error
        settings.connection_pool_maxsize = connections
        self._client = client.ApiClient(settings)

    def request(
        self, method: str, path: str, body: Document | None = None, query: Mapping[str, str] | None = None
    ) -> Document:
        """Send one request; returns the document that came back. PATCH is a merge patch.

        Raises ApiError, of the class that fits the answer, or Invalid.
        """
        _, url, headers, _, _ = self._client.param_serialize(
            method,
            path,
            query_params=list((query or {}).items()),
            header_params={
                "Accept": "application/json",
                "Content-Type": CONTENT_TYPES.get(method, "application/json"),
            },
            auth_settings=["BearerToken"],
        )
        try:
            response = self._client.rest_client.pool_manager.request(
                method,
                url,
                body=json.dumps(body).encode() if body is not None else None,
                headers=headers,
                timeout=TIMEOUT,
                retries=False,
            )
        except urllib3.exceptions.HTTPError as error:
            raise ApiError(f"{method} {path}: no answer from the API server ({error}); it is asked again") from error
        if response.status >= 400:
            raise _error(method, path, response.status, response.data)
        document: Document = json.loads(response.data)
        return document


def _error(method: str, path: str, status: int, data: bytes) -> RLHFError:
    answer: dict[str, Any] = {}
    try:
        answer = json.loads(data)
        text = str(answer["message"])
    except (ValueError, KeyError, TypeError):
        text = data[:200].decode(errors="replace")
    message = f"{method} {path}: {text}"
    match status:
        case 404:
            return NotFound(message)
        case 409:
            return (AlreadyExists if answer.get("reason") == "AlreadyExists" else Conflict)(message)
        case 400 | 422:
            return Invalid(text)
        case 403:
            return Denied(text)
    return ApiError(f"{message} (HTTP {status}); it is asked again")
