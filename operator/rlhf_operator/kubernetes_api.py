"""One request to the Kubernetes API: documents in, documents out, and each refusal as an error that says what to do."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

import urllib3
from kubernetes import client, config

from rlhf_api.errors import RLHFError, StoreError
from rlhf_operator.pod_template import Document

TIMEOUT: Final = urllib3.Timeout(connect=5, read=30)
MERGE_PATCH: Final = "application/merge-patch+json"
APPLY_PATCH: Final = "application/apply-patch+yaml"
LOG_TIMEOUT: Final = urllib3.Timeout(connect=5, read=None)  # a stage may say nothing for long


class ApiError(RLHFError):
    """The API server did not do what it was asked to; trying again may help."""

    failure = "infrastructure"


class Unreachable(ApiError):
    """The API server did not answer."""


class Unauthorized(ApiError):
    """The API server does not know who asks."""


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

    def __init__(self, connections: int, settings: Any = None) -> None:
        """`connections`: kept open at once. `settings`: a client.Configuration in place of those two.

        Raises StoreError if there is none of them.
        """
        settings = settings or _found_settings()
        settings.connection_pool_maxsize = connections
        self._client = client.ApiClient(settings)

    def request(
        self,
        method: str,
        path: str,
        body: Document | None = None,
        query: Mapping[str, str] | None = None,
        patch: str = MERGE_PATCH,
        timeout: urllib3.Timeout = TIMEOUT,
    ) -> Document:
        """Send one request; returns the document that came back. `patch`: what a PATCH is.

        Raises ApiError, of the class that fits the answer, or Invalid.
        """
        content = patch if method == "PATCH" else "application/json"
        response = self._send(method, path, body, query, {"Content-Type": content}, timeout, preload_content=True)
        document: Document = json.loads(response.data)
        return document

    def lines(self, path: str, query: Mapping[str, str]) -> Iterator[str]:
        """The lines of a text as they come, such as a pod's log. Raises as `request` does, also while they are read."""
        response = self._send("GET", path, None, query, {"Accept": "*/*"}, LOG_TIMEOUT, preload_content=False)
        return _lines(path, response)

    def _send(
        self,
        method: str,
        path: str,
        body: Document | None,
        query: Mapping[str, str] | None,
        headers: Mapping[str, str],
        timeout: urllib3.Timeout,
        *,
        preload_content: bool,
    ) -> Any:
        _, url, headers, _, _ = self._client.param_serialize(
            method,
            path,
            query_params=list((query or {}).items()),
            header_params={"Accept": "application/json", **headers},
            auth_settings=["BearerToken"],
        )
        try:
            response = self._client.rest_client.pool_manager.request(
                method,
                url,
                body=json.dumps(body).encode() if body is not None else None,
                headers=headers,
                timeout=timeout,
                retries=False,
                preload_content=preload_content,
            )
            if response.status >= 400:
                raise _error(method, path, response.status, response.data)
        except urllib3.exceptions.HTTPError as error:
            raise _unreachable(method, path, error) from error
        return response


def _found_settings() -> Any:
    settings = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=settings)
    except config.ConfigException:
        try:
            config.load_kube_config(client_configuration=settings)
        except config.ConfigException as error:
            raise StoreError(f"no Kubernetes API: {error}; run in a pod, or set KUBECONFIG") from error
    return settings


def _lines(path: str, response: Any) -> Iterator[str]:
    rest = b""
    try:
        for chunk in response.stream(1 << 16):
            *whole, rest = (rest + chunk).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
    except urllib3.exceptions.HTTPError as error:
        raise _unreachable("GET", path, error) from error
    finally:
        response.close()
    if rest:
        yield rest.decode(errors="replace")


def _unreachable(method: str, path: str, error: Exception) -> Unreachable:
    return Unreachable(f"{method} {path}: no answer from the API server ({error}); it is asked again")


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
        case 401:
            return Unauthorized(message)
    return ApiError(f"{message} (HTTP {status}); it is asked again")
