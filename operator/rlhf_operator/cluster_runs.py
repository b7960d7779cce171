"""What a person's commands ask of a cluster: runs, their Jobs, pods and logs. A refusal is one line with its remedy."""

import difflib
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from rlhf_api.errors import UserError
from rlhf_api.names import GROUP, LABEL_RUN, PLURAL, STAGE_CONTAINER, STAGE_LABELS, VERSION
from rlhf_operator.cluster_options import ClusterOptions
from rlhf_operator.pod_template import Document

try:
    import urllib3
    import yaml
    from kubernetes import client, config

    from rlhf_operator.kubernetes_api import (
        AlreadyExists,
        Denied,
        KubernetesApi,
        NotFound,
        Unauthorized,
        Unreachable,
    )
except ModuleNotFoundError as error:
    raise UserError(f"--cluster: {error.name} is missing; pip install 'rlhf-operator[operator]'") from None

MANAGER: Final = "rlhf"  # of the fields that these commands set
CRD: Final = f"{PLURAL}.{GROUP}"
MAX_NAMED: Final = 10  # runs that an error lists
PAGE: Final = 500  # objects of a list at once
POD_NAMESPACE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class ClusterRuns:
    """The runs of one namespace. Its errors are UserError, or ApiError where trying again may help."""

    def __init__(self, options: ClusterOptions) -> None:
        """Reads the kubeconfig, or in a pod the service account. Nothing is sent yet."""
        self.options = options
        self._settings, self.namespace, self.in_pod = _settings(options)
        self._api = KubernetesApi(connections=4, settings=self._settings)

    def at(self, namespace: str) -> "ClusterRuns":
        """The runs of another namespace of the same cluster."""
        if namespace == self.namespace:
            return self
        return ClusterRuns(replace(self.options, namespace=namespace))

    def runs(self, everywhere: bool = False) -> list[Document]:
        """The runs of the namespace, or of all, by namespace and name."""
        path = f"/apis/{GROUP}/{VERSION}/{PLURAL}" if everywhere else self._path()
        query = {"limit": str(PAGE)}
        found: list[Document] = []
        try:
            with self._explained():
                while True:
                    page = self._api.request("GET", path, query=query)
                    found += page["items"]
                    if not (more := page["metadata"].get("continue")):
                        return found
                    query["continue"] = more
        except NotFound as error:
            raise UserError(
                f"{self._settings.host}: knows no {CRD}; install the chart (charts/rlhf-operator), or choose another "
                "cluster with --context"
            ) from error

    def find(self, name: str) -> Document | None:
        """A run, or None. Raises UserError if the cluster knows no runs at all."""
        try:
            with self._explained():
                return self._api.request("GET", self._path(name))
        except NotFound:
            self.runs()  # says so if there is no such kind
            return None

    def get(self, name: str) -> Document:
        """A run. Raises UserError that names those there are."""
        if (found := self.find(name)) is None:
            raise UserError(f"run {name!r} is not in namespace {self.namespace}; {self._elsewhere(name)}")
        return found

    def newest(self) -> Document:
        """The run created last. Raises UserError if there is none."""
        if not (found := self.runs()):
            raise UserError(f"no runs in namespace {self.namespace}; look elsewhere with --namespace")
        return max(found, key=lambda run: str(run["metadata"]["creationTimestamp"]))

    def create(self, document: Document) -> Document | None:
        """Create a run. Returns it; None if there is one of its name."""
        query = {"fieldManager": MANAGER, "fieldValidation": "Strict"}
        try:
            with self._explained():
                return self._api.request("POST", self._path(), document, query)
        except AlreadyExists:
            return None
        except NotFound as error:
            self.runs()
            remedy = shlex.join(self._everywhere.kubectl("create", "namespace", self.namespace))
            raise UserError(f"namespace {self.namespace}: does not exist; create it with `{remedy}`") from error

    def patch(self, name: str, patch: Document) -> Document:
        """Merge a patch into a run. Returns the run as it is then."""
        with self._explained():
            return self._api.request("PATCH", self._path(name), patch, {"fieldManager": MANAGER})

    def jobs(self, run: Document) -> list[Document]:
        """The Jobs of a run."""
        return self._owned("/apis/batch/v1", "jobs", run["metadata"]["name"], run["metadata"]["uid"])

    def pods(self, run: Document, job: Document) -> list[Document]:
        """The pods of one of its Jobs."""
        return self._owned("/api/v1", "pods", run["metadata"]["name"], job["metadata"]["uid"])

    def log(self, pod: Document, follow: bool) -> Iterator[str]:
        """The lines that a stage's container wrote; with `follow`, as it writes them, until it ends."""
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod['metadata']['name']}/log"
        query = {"container": STAGE_CONTAINER, **({"follow": "true"} if follow else {})}
        with self._explained():
            yield from self._api.lines(path, query)

    def secret(self, name: str) -> Document | None:
        """A Secret of the namespace, or None. Raises Denied if it may not be read."""
        return self._read(self.namespace, "secrets", name)

    def service(self, namespace: str, name: str) -> Document | None:
        """A Service, or None. Raises Denied if it may not be read."""
        return self._read(namespace, "services", name)

    @property
    def _everywhere(self) -> ClusterOptions:
        return replace(self.options, namespace=None)

    def _read(self, namespace: str, plural: str, name: str) -> Document | None:
        try:
            return self._api.request("GET", f"/api/v1/namespaces/{namespace}/{plural}/{name}")
        except NotFound:
            return None

    def _owned(self, api: str, plural: str, run: str, owner: str) -> list[Document]:
        labels = STAGE_LABELS | {LABEL_RUN: run}
        query = {"labelSelector": ",".join(f"{label}={value}" for label, value in labels.items())}
        with self._explained():
            found = self._api.request("GET", f"{api}/namespaces/{self.namespace}/{plural}", query=query)["items"]
        return [each for each in found if owner in [one["uid"] for one in each["metadata"].get("ownerReferences", [])]]

    def _path(self, name: str = "") -> str:
        path = f"/apis/{GROUP}/{VERSION}/namespaces/{self.namespace}/{PLURAL}"
        return f"{path}/{name}" if name else path

    def _elsewhere(self, name: str) -> str:
        """Where the run might be: under a name like it, in another namespace."""
        names = sorted(run["metadata"]["name"] for run in self.runs())
        if near := difflib.get_close_matches(name, names, 1):
            return f"did you mean {near[0]}?"
        try:
            every = self.runs(everywhere=True)
        except UserError:  # may look into this namespace alone
            every = []
        if there := [run["metadata"]["namespace"] for run in every if run["metadata"]["name"] == name]:
            return f"there is one in {there[0]}: add --namespace {there[0]}"
        if not names:
            return "it has no runs"
        return f"there are: {', '.join(names[:MAX_NAMED])}{', …' if len(names) > MAX_NAMED else ''}"

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what the API server refused into what to do about it."""
        server = self._settings.host
        try:
            yield
        except Unreachable as error:
            reason = _reason(error.__cause__)
            raise Unreachable(
                f"{server}: no answer ({reason}); see that the cluster runs, or choose another with --context"
            ) from error
        except Unauthorized as error:
            raise UserError(f"{server}: does not know who asks; renew the credentials of the kubeconfig") from error
        except Denied as error:
            # Another may be denied by a quota or a policy, which no role changes.
            who = "; ask whoever runs the cluster for the role view, or edit to change runs"
            raise UserError(f"{error}{who if ' cannot ' in str(error) else ''}") from error


def _settings(options: ClusterOptions) -> tuple[Any, str, bool]:
    """The client's settings, the namespace, and whether they are those of the pod that this runs in."""
    settings = client.Configuration()
    if options.kubeconfig and not options.kubeconfig.exists():
        raise UserError(f"--kubeconfig {options.kubeconfig}: there is no such file")
    file = str(options.kubeconfig) if options.kubeconfig else None
    try:
        contexts, current = config.list_kube_config_contexts(file)
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"the kubeconfig cannot be read: {' '.join(str(error).split())}; correct it") from error
    except config.ConfigException as error:
        if not (options.kubeconfig or options.context):
            try:
                config.load_incluster_config(client_configuration=settings)
            except config.ConfigException:
                pass
            else:
                return settings, options.namespace or POD_NAMESPACE.read_text().strip(), True
        raise UserError(
            f"no cluster: {' '.join(str(error).split())}; give --kubeconfig FILE, or set KUBECONFIG"
        ) from error
    wanted = options.context or current["name"]
    chosen = next((each for each in contexts if each["name"] == wanted), None)
    if chosen is None:
        names = ", ".join(str(each["name"]) for each in contexts)
        raise UserError(f"--context {wanted}: is not in the kubeconfig; there are: {names}")
    try:
        config.load_kube_config(file, wanted, settings, persist_config=False)
    except config.ConfigException as error:
        raise UserError(f"context {wanted}: {' '.join(str(error).split())}; correct the kubeconfig") from error
    return settings, options.namespace or chosen["context"].get("namespace") or "default", False


def _reason(cause: BaseException | None) -> str:
    """What lies under urllib3's many layers."""
    while isinstance(cause, urllib3.exceptions.MaxRetryError):
        cause = cause.reason
    return str(cause).rsplit(": ", 1)[-1]
