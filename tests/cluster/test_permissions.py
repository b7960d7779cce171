"""The operator with nothing but the chart's Roles: it lacks no permission, and has none that it does not use."""

import json
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from bare_plane import BarePlane, OperatorProcess, api_of, drop_lease, until
from kubectl import SOON
from rendered_chart import one, rendered
from stage_player import NOBODY, StagePlayer

from rlhf_api.names import API_VERSION, GROUP, KIND, LABEL_RUN, PLURAL, VERSION, job_name
from rlhf_operator.kubernetes_api import KubernetesApi, NotFound

pytestmark = pytest.mark.timeout(600)

RUNS = ("plain", "paused", "cleaned", "brief", "taken", "stage-pods")
RELEASE = ("ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding", "Lease")

Document = dict[str, Any]
Kubectl = Callable[..., "subprocess.CompletedProcess[str]"]
Rule = tuple[str, str, str]  # API group, resource, verb


@dataclass
class Installed:
    """The chart's ServiceAccount with its Roles in a namespace, and the operator that runs as it."""

    plane: BarePlane
    api: KubernetesApi
    documents: list[Document]
    namespace: str
    runs_namespaces: list[str]
    operator: OperatorProcess

    @property
    def account(self) -> str:
        """The operator's name to the API server."""
        return f"system:serviceaccount:{self.namespace}:{one(self.documents, 'ServiceAccount')['metadata']['name']}"

    def place(self, name: str) -> str:
        """Namespace of a run: each has some."""
        return self.runs_namespaces[RUNS.index(name) % len(self.runs_namespaces)]

    def path(self, name: str) -> str:
        return f"/apis/{GROUP}/{VERSION}/namespaces/{self.place(name)}/{PLURAL}/{name}"

    def apply(self, name: str, **spec: Any) -> None:
        """A run that shares no artifact with another one."""
        spec = {
            "model": {"source": f"hf://owner/{name}"},
            "data": {"prompts": {"source": "hf://datasets/owner/prompts"}},
            "reward": {"function": "module:callable"},
            "placement": {"podTemplate": NOBODY},
            **spec,
        }
        document = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}, "spec": spec}
        self.api.request("POST", self.path(name).removesuffix(f"/{name}"), document)

    def patch(self, name: str, spec: Document) -> None:
        self.api.request("PATCH", self.path(name), {"spec": spec})

    def until_phase(self, name: str, phase: str) -> None:
        def found() -> bool:
            run = self.api.request("GET", self.path(name))
            return bool(run.get("status", {}).get("phase") == phase)

        until(found, SOON, lambda: f"{name} is not {phase}\n{self.operator.last_lines()}")

    def waits_for(self, name: str) -> str | None:
        """The reason that the run's condition Progressing gives."""
        conditions = self.api.request("GET", self.path(name)).get("status", {}).get("conditions", [])
        return next((each["reason"] for each in conditions if each["type"] == "Progressing"), None)

    def until_gone(self, name: str) -> None:
        def gone() -> bool:
            with suppress(NotFound):
                self.api.request("GET", self.path(name))
                return False
            return True

        until(gone, SOON, lambda: f"{name} is still there\n{self.operator.last_lines()}")

    def requests(self) -> list[Document]:
        """The operator's requests as the API server wrote them down, without those about runs that other tests left."""
        lines = (self.plane.folder / "audit.log").read_text().splitlines()
        mine = [found for line in lines if (found := json.loads(line))["user"]["username"] == self.account]
        places = (None, self.namespace, *self.runs_namespaces)
        return [each for each in mine if each.get("objectRef", {}).get("namespace") in places]

    def used(self) -> set[Rule]:
        """The rules without which a request would have been refused."""
        found = [each["objectRef"] | {"verb": each["verb"]} for each in self.requests() if "objectRef" in each]
        return {(each.get("apiGroup", ""), _resource(each), each["verb"]) for each in found}

    def granted(self) -> set[Rule]:
        """The rules of every Role that is bound to the operator."""
        bound = {
            (each["roleRef"]["kind"], each["roleRef"]["name"], each["metadata"].get("namespace"))
            for each in self.documents
            if each["kind"] in ("RoleBinding", "ClusterRoleBinding")
        }
        roles = [
            each
            for each in self.documents
            if (each["kind"], each["metadata"]["name"], each["metadata"].get("namespace")) in bound
        ]
        assert len(roles) == len(bound) > 2
        return {
            (group, resource, verb)
            for role in roles
            for rule in role["rules"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        }

    def unused(self) -> set[Rule]:
        return self.granted() - self.used()


def _resource(reference: Document) -> str:
    resource, below = reference["resource"], reference.get("subresource")
    return f"{resource}/{below}" if below else resource


@pytest.fixture(scope="module", params=["namespaced", "two namespaces", "cluster-wide"])
def installed(
    request: pytest.FixtureRequest, own_plane: BarePlane, own_kubectl: Kubectl, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installed]:
    """The release in a namespace of its own, its runs in that one, or in one or two others."""
    namespace = f"release-{uuid.uuid4().hex[:8]}"
    others = {"namespaced": 0, "two namespaces": 2, "cluster-wide": 1}[request.param]
    runs_namespaces = [f"runs-{uuid.uuid4().hex[:8]}" for _ in range(others)] or [namespace]
    wide = request.param == "cluster-wide"
    for name in {namespace, *runs_namespaces}:
        own_kubectl("create", "namespace", name)
    watched = "*" if wide else ",".join(runs_namespaces)
    documents = rendered(*([f"watchNamespaces={{{watched}}}"] if others else []), namespace=namespace)
    documents = [each for each in documents if each["kind"] in RELEASE]
    own_kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(documents))
    account = one(documents, "ServiceAccount")["metadata"]["name"]
    token = own_kubectl("create", "token", account, "-n", namespace, "--duration=1h").stdout.strip()
    given = yaml.safe_load(own_plane.kubeconfig.read_text())
    given["users"][0]["user"] = {"token": token}
    folder = tmp_path_factory.mktemp("operator")
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(given))
    (folder / "store").mkdir()
    namespaces = [] if wide else runs_namespaces
    operator = OperatorProcess(kubeconfig, folder / "store", folder / "log", namespaces, namespace)
    api = api_of(own_plane.kubeconfig)
    operator.start()
    try:
        yield Installed(own_plane, api, documents, namespace, runs_namespaces, operator)
    finally:
        operator.kill()
        own_kubectl("delete", "-f", "-", "--wait=false", stdin=yaml.safe_dump_all(documents))
        own_kubectl("delete", "namespace", namespace, *runs_namespaces, "--wait=false", "--ignore-not-found")


def test_no_permission_lacks_and_none_is_unused(installed: Installed) -> None:
    """Runs that end, wait for a name, are suspended, resumed, go with their artifacts or by their age; a lost Lease."""
    with StagePlayer(installed.plane.kubeconfig) as player:
        player.held |= {"reward"}
        installed.apply("plain")
        installed.apply("paused")
        installed.apply("cleaned", artifacts={"onDelete": "Delete"})
        installed.apply("brief", ttlSecondsAfterFinished=1)
        theirs = _take_name_of(installed, job_name("taken", "import-model", 1))
        installed.apply("taken")
        until(lambda: installed.waits_for("taken") == "NameTaken", SOON, installed.operator.last_lines)
        installed.api.request("DELETE", theirs)
        until(lambda: _job(installed, "paused", "reward"), SOON, installed.operator.last_lines)
        installed.patch("paused", {"suspend": True})
        installed.until_phase("paused", "Suspended")
        player.held.clear()
        drop_lease(installed.api, installed.namespace)
        installed.patch("paused", {"suspend": False})
        for name in ("plain", "paused", "cleaned", "taken"):
            installed.until_phase(name, "Succeeded")
        installed.api.request("DELETE", installed.path("cleaned"))
        installed.until_gone("cleaned")
        installed.until_gone("brief")
        until(lambda: not installed.unused(), SOON, lambda: f"granted and not used: {installed.unused()}")
    assert installed.operator.runs
    refused = [each for each in installed.requests() if each["responseStatus"]["code"] in (401, 403)]
    assert [(each["verb"], each["requestURI"]) for each in refused] == []
    assert installed.used() == installed.granted()


def test_stage_pods_have_an_account_without_rights_and_no_token_of_it(
    installed: Installed, own_kubectl: Kubectl
) -> None:
    installed.apply("stage-pods")

    def found() -> list[Document]:
        path = f"/api/v1/namespaces/{installed.place('stage-pods')}/pods"
        query = {"labelSelector": f"{LABEL_RUN}=stage-pods"}
        pods: list[Document] = installed.api.request("GET", path, query=query)["items"]
        return pods

    pod = until(found, SOON, installed.operator.last_lines)[0]["spec"]
    assert pod["serviceAccountName"] == "default"
    assert pod["automountServiceAccountToken"] is False
    assert not [volume for volume in pod["volumes"] if "projected" in volume or "secret" in volume]

    def rights(account: str) -> list[str]:
        asked = [
            "auth",
            "can-i",
            "--list",
            "-n",
            installed.place("stage-pods"),
            f"--as=system:serviceaccount:{account}",
        ]
        return sorted(own_kubectl(*asked).stdout.splitlines())

    own = rights(f"{installed.place('stage-pods')}:default")
    assert own == rights("nowhere:nobody")  # what Kubernetes lets every account do, such as ask for its own rights


def _job(installed: Installed, run: str, stage: str) -> bool:
    path = f"/apis/batch/v1/namespaces/{installed.place(run)}/jobs"
    query = {"labelSelector": f"{LABEL_RUN}={run},rlhf.dev/stage={stage}"}
    return bool(installed.api.request("GET", path, query=query)["items"])


def _take_name_of(installed: Installed, job: str) -> str:
    """Make a Job of nobody by that name, beside the run "taken"; returns its path."""
    container = {"name": "idle", "image": "none"}
    template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    document = {"metadata": {"name": job}, "spec": {"suspend": True, "template": template}}
    jobs = f"/apis/batch/v1/namespaces/{installed.place('taken')}/jobs"
    installed.api.request("POST", jobs, document)
    return f"{jobs}/{job}"
