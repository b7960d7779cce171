"""The artifacts of runs in a cluster, read from here: with whose credentials, and by which way."""

import base64
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Final
from urllib.parse import urlsplit

from rlhf_api.errors import StoreError, UserError
from rlhf_api.names import ENV_ACCESS_KEY, ENV_SECRET_KEY, ENV_SESSION_TOKEN
from rlhf_api.run import StoreStatus
from rlhf_api.stage import ArtifactRef, StoreConfig
from rlhf_operator.cluster_options import ClusterOptions
from rlhf_operator.cluster_runs import ClusterRuns
from rlhf_operator.deletion import artifacts_named
from rlhf_operator.followed import status_of
from rlhf_operator.kubernetes_api import Denied
from rlhf_operator.open_run import OpenRun
from rlhf_operator.port_forward import forwarded
from rlhf_store.artifacts import Artifacts, open_artifacts

CREDENTIALS: Final = (ENV_ACCESS_KEY, ENV_SECRET_KEY, ENV_SESSION_TOKEN)
PORTS: Final = {"http": 80, "https": 443}


@contextmanager
def opened_in_cluster(name: str, where: ClusterOptions, endpoint: str | None) -> Iterator[OpenRun]:
    """A run of a cluster with its store within reach for as long as this lasts.

    `endpoint`: of the store, in place of the run's. Raises UserError that says what is missing.
    """
    runs = ClusterRuns(where)
    status = status_of(runs.get(name))
    if status is None or status.store is None:
        raise UserError(f"run {name!r}: no operator has looked at it yet; see `{where.command('status', name)}`")
    with _within_reach(runs, status.store, endpoint) as (store, environment):
        yield OpenRun(name, status, store, environment, f"see `{where.command('status', name)}`")


@contextmanager
def artifacts_in_cluster(where: ClusterOptions, url: str | None, endpoint: str | None) -> Iterator[Artifacts]:
    """The store of a namespace's runs, within reach for as long as this lasts.

    `url`: which of them, if there are several; `endpoint`: in place of the runs'. Raises UserError if that leaves none
    or more than one.
    """
    runs = ClusterRuns(where)
    statuses = [status_of(run) for run in runs.runs()]
    stores = {status.store.url: status.store for status in statuses if status and status.store}
    if url is not None and url not in stores:
        known = f"they have {', '.join(sorted(stores))}" if stores else "none of them has a store yet"
        raise UserError(f"--store {url}: no run of namespace {runs.namespace} has it; {known}")
    if url is None and len(stores) != 1:
        choice = (
            f"choose one with --store: {', '.join(sorted(stores))}" if stores else "look elsewhere with --namespace"
        )
        raise UserError(f"namespace {runs.namespace}: its runs have {len(stores) or 'no'} stores; {choice}")
    with _within_reach(runs, stores[url] if url else next(iter(stores.values())), endpoint) as (store, environment):
        yield open_artifacts(store, environment=environment)


def artifacts_of_all_runs(where: ClusterOptions) -> set[ArtifactRef]:
    """What the runs of every namespace made, mean to make or took over: they may share a store.

    Raises UserError if not every namespace may be read.
    """
    documents = ClusterRuns(where).runs(everywhere=True)
    return {ArtifactRef.parse(name) for document in documents for name in artifacts_named(document)}


@contextmanager
def _within_reach(
    runs: ClusterRuns, store: StoreStatus, endpoint: str | None
) -> Iterator[tuple[StoreConfig, Mapping[str, str]]]:
    """The store as this machine reaches it, and an environment with its keys; a failure says whose they are."""
    environment, whose = _credentials(runs, store)
    with _reachable(runs, store, endpoint) as config:
        try:
            yield config, environment
        except StoreError as error:
            raise StoreError(f"{error} (credentials: {whose})") from error


def _credentials(runs: ClusterRuns, store: StoreStatus) -> tuple[Mapping[str, str], str]:
    """An environment with the store's keys, and where they are from: the user's own go before the Secret's."""
    if os.environ.get(ENV_ACCESS_KEY) and os.environ.get(ENV_SECRET_KEY):
        return os.environ, "of the environment"
    where, remedy = f"Secret {store.credentials_secret}", f"set {ENV_ACCESS_KEY} and {ENV_SECRET_KEY}"
    try:
        secret = runs.secret(store.credentials_secret or "")
    except Denied as error:
        raise UserError(f"the credentials of {store.url}: {error}; {remedy}") from error
    if secret is None:
        raise UserError(f"the credentials of {store.url}: no {where} in namespace {runs.namespace}; {remedy}")
    found = {key: base64.b64decode(value).decode() for key, value in (secret.get("data") or {}).items()}
    kept = {name: value for name, value in os.environ.items() if name not in CREDENTIALS}
    return {**kept, **{name: found[name] for name in CREDENTIALS if name in found}}, where


@contextmanager
def _reachable(runs: ClusterRuns, store: StoreStatus, endpoint: str | None) -> Iterator[StoreConfig]:
    """The store as this machine reaches it: through a tunnel where its name is one of the cluster's."""
    if not store.url.startswith("s3://"):
        raise UserError(f"{store.url}: is a volume of the cluster; mount it, or read it in a pod that does")
    config = StoreConfig(url=store.url, endpoint=endpoint or store.endpoint, region=store.region)
    service = None if endpoint or runs.in_pod else _service(runs, store.endpoint)
    if service is None:
        yield config
        return
    url = urlsplit(store.endpoint or "")
    if url.scheme != "http":
        raise UserError(
            f"{store.endpoint}: is a name inside the cluster, and its certificate fits no tunnel; give --endpoint with "
            "an address of the store that this machine reaches"
        )
    name, namespace = service
    options = replace(runs.options, namespace=namespace)
    with forwarded(options, name, url.port or PORTS[url.scheme]) as address:
        yield config.model_copy(update={"endpoint": f"http://{address}"})


def _service(runs: ClusterRuns, endpoint: str | None) -> tuple[str, str] | None:
    """Name and namespace of the Service that an endpoint's host names; None if it is no name of the cluster."""
    host = urlsplit(endpoint or "").hostname or ""
    labels = host.split(".")
    if len(labels) > 2 and labels[2] == "svc":
        return labels[0], labels[1]
    if len(labels) > 2 or host in ("", "localhost") or ":" in host:
        return None
    name, namespace = labels[0], labels[1] if len(labels) == 2 else runs.namespace
    try:
        return (name, namespace) if runs.service(namespace, name) else None
    except Denied:
        return None
