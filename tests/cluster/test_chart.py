"""The chart: refused where it is wrong, taken by a real API server where it is right, and true to the operator."""

import base64
import ipaddress
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rendered_chart import CHART, DIGEST, EXTERNAL, KUBERNETES, ROOT, VALUES, helm, one, pod_specs, rendered

from rlhf_api import names
from rlhf_operator.operator_settings import OperatorSettings

OWN = "rlhf-rlhf-operator-object-store"
PART_OF = "app.kubernetes.io/part-of=rlhf-operator"

Kubectl = Callable[..., "subprocess.CompletedProcess[str]"]
Document = dict[str, Any]


def user(secret: str, prefix: str) -> str:
    """A value: one more user of the bundled store."""
    return f"minio.users[0].secret={secret},minio.users[0].prefix={prefix}"


def lets_through(block: Document, address: str) -> bool:
    """Whether an ipBlock of a network policy does."""
    networks = [ipaddress.ip_network(each) for each in (block["cidr"], *block.get("except", []))]
    return [ipaddress.ip_address(address) in each for each in networks] == [True, *[False] * (len(networks) - 1)]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("objectstore.bucket=x", "objectstore"),
        ("objectStore.bucket=UPPER", "bucket"),
        ("objectStore.endpoint=s3.example.com", "endpoint"),
        ("minio.enabled=perhaps", "enabled"),
        ("minio.persistence.size=big", "size"),
        ("image.digest=sha256:12", "digest"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("watchNamespaces={a,*}", "watchNamespaces"),
        ("stage.terminationGracePeriodSeconds=0", "terminationGracePeriodSeconds"),
        ("networkPolicy.apiServer.ports={https}", "ports"),
        ("minio.enabled=false", "objectStore.existingSecret"),
        ("networkPolicy.storeCIDRs={private}", "storeCIDRs"),
        ("networkPolicy.storeCIDRs=null", "storeCIDRs"),
        ("objectStore.prefix=*", "prefix"),
        (user("team", "$"), "prefix"),
        (user(OWN, "team"), f"Secret {OWN} is there already"),
        (user("rlhf-rlhf-operator-minio-root", "team"), "Secret rlhf-rlhf-operator-minio-root is there already"),
        (user("team", "runs"), "overlaps"),
        (user("team", "runs/team/"), "overlaps"),
        (f"objectStore.prefix=team/runs,{user('team', 'team')}", "overlaps"),
        (f"objectStore.prefix=,{user('team', 'team')}", "overlaps"),
        (f"minio.enabled=false,objectStore.existingSecret=mine,{user('team', 'team')}", "not the store"),
    ],
)
def test_a_wrong_value_is_named(value: str, said: str) -> None:
    done = helm("template", "rlhf", CHART, KUBERNETES, f"--set={value}")
    assert done.returncode != 0
    assert said in done.stderr


@pytest.mark.parametrize("value", ["networkPolicy.storeCIDRs", "networkPolicy.apiServer.cidrs"])
def test_no_list_of_addresses_is_empty(value: str) -> None:
    """A rule of a network policy without addresses would be one for all of them."""
    done = helm("template", "rlhf", CHART, KUBERNETES, f"--set-json={value}=[]")
    assert done.returncode != 0
    assert value.replace(".", "/") in done.stderr


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_every_container_is_confined_and_bounded(values: list[str]) -> None:
    found = dict(pod_specs(rendered(*values)))
    assert len(found) >= 3
    for name, spec in found.items():
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["automountServiceAccountToken"] == (name in ("rlhf-rlhf-operator", "rlhf")), name
        for container in spec["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"], name
            assert container["resources"]["limits"]["memory"], name


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_the_operator_understands_what_the_chart_tells_it(values: list[str]) -> None:
    deployment = one(rendered(*values), "Deployment")
    assert (deployment["spec"]["replicas"], deployment["spec"]["strategy"]) == (1, {"type": "Recreate"})
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    environment = {each["name"]: each.get("value", "from-elsewhere") for each in container["env"]}
    known = set(re.findall(r"read\.\w+\(\"(\w+)\"", (ROOT / "operator/rlhf_operator/operator_settings.py").read_text()))
    told = {name.removeprefix("RLHF_OPERATOR_") for name in environment if name.startswith("RLHF_OPERATOR_")}
    assert told <= known
    assert {names.ENV_ACCESS_KEY, names.ENV_SECRET_KEY} <= set(environment)
    settings = OperatorSettings.from_environment(environment)
    everything, wide = "fullnameOverride=rlhf" in values, "watchNamespaces={*}" in values
    image = f"rlhf-pipeline@{DIGEST}" if f"pipelineImage.digest={DIGEST}" in values else "rlhf-pipeline:0.1.0"
    assert settings.image == ("registry.example.com/ml/" if everything else "") + image
    assert settings.image_pull_secrets == (("a", "b") if everything else ())
    asked = tuple(each.split("=")[1] for each in container["args"] if each.startswith("--namespace="))
    assert settings.watch_namespaces == asked
    assert (asked == ()) == wide
    assert ("--all-namespaces" in container["args"]) == wide
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports == {"health": names.OPERATOR_HEALTH_PORT, "metrics": settings.metrics_port}
    assert f"--liveness=http://0.0.0.0:{names.OPERATOR_HEALTH_PORT}/healthz" in container["args"]


def test_the_store_of_the_operator_is_the_bundled_one_unless_another_is_named() -> None:
    def endpoint(*values: str) -> str:
        [container] = one(rendered(*values), "Deployment")["spec"]["template"]["spec"]["containers"]
        return next(str(e["value"]) for e in container["env"] if e["name"] == "RLHF_OPERATOR_STORE_ENDPOINT")

    service = one(rendered(), "Service", "rlhf-rlhf-operator-minio")
    assert endpoint() == f"http://{service['metadata']['name']}.rlhf.svc:{service['spec']['ports'][0]['port']}"
    assert endpoint(*EXTERNAL) == "https://s3.example.com"
    assert not [d for d in rendered(*EXTERNAL) if d["kind"] in ("StatefulSet", "Secret")]
    assert endpoint(*VALUES["aws"]) == ""


def test_what_a_pod_reads_as_it_starts_restarts_it_when_it_changes() -> None:
    """And not otherwise: generated credentials differ each time that the chart is rendered without a cluster."""

    def templates(*values: str) -> list[Document]:
        documents = rendered(*values)
        return [one(documents, kind)["spec"]["template"] for kind in ("Deployment", "StatefulSet")]

    def restarts(before: list[str], after: list[str]) -> list[bool]:
        return [old != new for old, new in zip(templates(*before), templates(*after), strict=True)]

    first, second = ["objectStore.secretKey=first-secret"], ["objectStore.secretKey=second-secret"]
    assert restarts([], []) == restarts(first, first) == [False, False]
    assert restarts([], first) == restarts(first, second) == [True, False]
    assert restarts(["objectStore.accessKey=a", *first], ["objectStore.accessKey=b", *first]) == [True, False]
    assert restarts([], ["objectStore.prefix=other"]) == [True, False]
    mine = "objectStore.existingSecret=mine"
    assert restarts([mine, *first], [mine, *second]) == [False, False]
    both = templates("operator.podAnnotations.note=x", *first)[0]["metadata"]["annotations"]
    assert set(both) == {"note", "checksum/object-store"}
    assert "first-secret" not in str(templates(*first))


def test_stage_pods_reach_dns_and_the_store_and_are_scraped() -> None:
    policy = one(rendered(), "NetworkPolicy", "rlhf-rlhf-operator-stages")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= names.STAGE_LABELS.items()
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert [[p["port"] for p in rule["ports"]] for rule in policy["ingress"]] == [[names.METRICS_PORT]]
    assert [[p["port"] for p in rule["ports"]] for rule in policy["egress"]] == [[53, 53], [9000]]
    outside = one(rendered(*EXTERNAL), "NetworkPolicy", "rlhf-rlhf-operator-stages")["spec"]
    assert outside["egress"][1]["ports"] == [{"port": 443}]
    ported = [*EXTERNAL, "objectStore.endpoint=http://10.0.0.9:9001"]
    assert one(rendered(*ported), "NetworkPolicy", "rlhf-rlhf-operator-stages")["spec"]["egress"][1]["ports"] == [
        {"port": 9001}
    ]


def test_a_store_elsewhere_leaves_the_private_addresses_shut_but_those_it_is_at() -> None:
    def reach(*values: str) -> set[str]:
        policy = one(rendered(*EXTERNAL, *values), "NetworkPolicy", "rlhf-rlhf-operator-stages")["spec"]
        blocks = [target["ipBlock"] for target in policy["egress"][1]["to"]]
        return {address for address in (*private, *public) if any(lets_through(block, address) for block in blocks)}

    private = ("10.96.0.1", "172.18.0.2", "192.168.49.2", "100.64.0.1", "169.254.169.254", "fd00::1")
    public = ("52.216.0.1", "2600:1f00::1")
    assert reach() == set(public)
    assert reach("networkPolicy.storeCIDRs={172.18.0.0/16}") == {"172.18.0.2"}
    assert reach("networkPolicy.storeCIDRs={public,fd00::1/128}") == {*public, "fd00::1"}


def test_only_minio_and_the_job_that_makes_its_users_have_the_roots_keys() -> None:
    for values in ([], VALUES["other-namespaces"], VALUES["cluster-wide"]):
        documents = rendered(*values)
        root = "root" if "minio.existingSecret=root" in values else "rlhf-rlhf-operator-minio-root"
        readers = {name for name, spec in pod_specs(documents) if root in json.dumps(spec)}
        assert readers == {"rlhf-rlhf-operator-minio", "rlhf-rlhf-operator-bucket"}
        secrets = [d["metadata"]["namespace"] for d in documents if d["kind"] == "Secret" and "MINIO" in json.dumps(d)]
        assert secrets == ([] if root == "root" else ["rlhf"])


def test_each_user_of_the_bundled_store_has_one_secret_in_all_namespaces_of_runs() -> None:
    documents = rendered(*VALUES["other-namespaces"])
    [users] = [c for c in one(documents, "Job")["spec"]["template"]["spec"]["containers"] if c["name"] == "users"]
    assert users["args"][-2:] == [f"/users/{OWN}=runs", "/users/team=team"]
    keys: set[str] = set()
    for name in (OWN, "team"):
        found = [d for d in documents if d["kind"] == "Secret" and d["metadata"]["name"] == name]
        assert {d["metadata"]["namespace"] for d in found} == {"default", "kube-public", "rlhf"}
        assert len({json.dumps(d["stringData"]) for d in found}) == 1
        keys |= set(found[0]["stringData"].values())
    assert len(keys) == 4


def test_the_chart_ships_the_crd_and_keeps_it_on_uninstall() -> None:
    shipped = one(rendered(), "CustomResourceDefinition")
    assert shipped["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert shipped == yaml.safe_load((ROOT / "manifests/crd/rlhfruns.yaml").read_text())
    assert "annotations" not in one(rendered("crds.keep=false"), "CustomResourceDefinition")["metadata"]


def test_every_value_is_explained() -> None:
    table = (CHART / "README.md").read_text().split("## Values")[1]
    told = set(re.findall(r"`\.?([A-Za-z.*]+)`", table))
    for section, value in yaml.safe_load((CHART / "values.yaml").read_text()).items():
        fields = value if isinstance(value, dict) else {}
        for field in fields:
            assert {field, f"{section}.{field}", f"{section}.*", f"{section}.{field}.*"} & told or any(
                each.startswith(f"{section}.{field}.") for each in told
            ), f"{section}.{field}"
        assert fields or section in told, section


def test_the_plain_install_is_the_charts(tmp_path: Path, api_kubectl: Kubectl) -> None:
    subprocess.run([ROOT / "hack/render-manifests.sh", tmp_path / "operator.yaml"], check=True)
    assert (tmp_path / "operator.yaml").read_text() == (ROOT / "manifests/install/operator.yaml").read_text()
    built = [d for d in yaml.safe_load_all(api_kubectl("kustomize", ROOT / "manifests").stdout) if d]
    assert {"Namespace", "CustomResourceDefinition", "Deployment", "StatefulSet"} <= {d["kind"] for d in built}
    assert "helm" not in (tmp_path / "operator.yaml").read_text().split("\n", 1)[1].lower()


def test_an_upgrade_keeps_the_generated_credentials(api_server: Path, api_kubectl: Kubectl, api_namespace: str) -> None:
    def credentials() -> dict[str, Document]:
        found = yaml.safe_load(api_kubectl("-n", api_namespace, "get", "secrets", "-l", PART_OF, "-o", "yaml").stdout)
        return {each["metadata"]["name"]: each["data"] for each in found["items"]}

    release = ["rlhf", CHART, "--namespace", api_namespace, "--no-hooks", "--set=fullnameOverride=rlhf",
               "--set=crds.install=false", "--set=rbac.create=false", f"--set={user('team', 'team')}"]  # fmt: skip
    for action in ("install", "upgrade"):
        done = helm(action, *release, kubeconfig=api_server)
        assert done.returncode == 0, done.stderr
        if action == "install":
            first = credentials()
    assert first.keys() == {"rlhf-object-store", "rlhf-minio-root", "team"}
    assert credentials() == first
    assert len(base64.b64decode(first["rlhf-object-store"][names.ENV_SECRET_KEY])) == 40
    done = helm("upgrade", *release, "--set=objectStore.secretKey=my-own-secret-key", kubeconfig=api_server)
    assert done.returncode == 0, done.stderr
    second = credentials()
    own = second.pop("rlhf-object-store")
    assert base64.b64decode(own[names.ENV_SECRET_KEY]) == b"my-own-secret-key"
    assert own[names.ENV_ACCESS_KEY] == first.pop("rlhf-object-store")[names.ENV_ACCESS_KEY]
    assert second == first


def test_the_operator_may_do_what_it_does_and_nothing_else(
    api_server: Path, api_kubectl: Kubectl, api_namespace: str
) -> None:
    done = helm("install", "rlhf", CHART, "--namespace", api_namespace, "--no-hooks", "--set=crds.install=false",
                kubeconfig=api_server)  # fmt: skip
    assert done.returncode == 0, done.stderr
    account = f"--as=system:serviceaccount:{api_namespace}:rlhf-rlhf-operator"

    def may(verb: str, what: str, *where: str) -> bool:
        resource, _, subresource = what.partition(":")
        options = [account, *where, *([f"--subresource={subresource}"] if subresource else [])]
        return api_kubectl("auth", "can-i", verb, resource, *options, check=False).stdout.strip() == "yes"

    here = ["--namespace", api_namespace]
    try:
        for verb, what in [
            ("list", "rlhfruns.rlhf.dev"), ("watch", "rlhfruns.rlhf.dev"), ("patch", "rlhfruns.rlhf.dev:status"),
            ("patch", "rlhfruns.rlhf.dev"), ("delete", "rlhfruns.rlhf.dev"),
            ("create", "jobs.batch"), ("patch", "jobs.batch"), ("watch", "pods"),
            ("create", "events"), ("update", "leases.coordination.k8s.io/rlhf-operator"),
        ]:  # fmt: skip
            assert may(verb, what, *here), (verb, what)
        for verb, what, where in [
            ("get", "secrets", here), ("create", "pods", here), ("delete", "pods", here), ("create", "pods:exec", here),
            ("update", "rlhfruns.rlhf.dev", here), ("delete", "jobs.batch", here), ("update", "leases/other", here),
            ("list", "jobs.batch", ["--namespace", "default"]), ("list", "rlhfruns.rlhf.dev", ["--all-namespaces"]),
            ("create", "deployments.apps", here), ("escalate", "roles", here), ("list", "nodes", []),
        ]:  # fmt: skip
            assert not may(verb, what, *where), (verb, what)
    finally:
        helm("uninstall", "rlhf", "--namespace", api_namespace, kubeconfig=api_server)
