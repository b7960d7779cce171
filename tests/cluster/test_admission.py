"""What the API server itself does with an RLHFRun: refuses the wrong ones, fills in defaults, explains the fields."""

import copy
import json
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client, config

from rlhf_api.names import API_VERSION, GROUP, KIND, PLURAL, VERSION
from rlhf_api.run import RLHFRun

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "manifests" / "examples").rglob("*.yaml"))
CASES: list[dict[str, Any]] = yaml.safe_load((ROOT / "tests" / "api" / "wrong.yaml").read_text())
MINIMAL: dict[str, Any] = {
    "apiVersion": API_VERSION,
    "kind": KIND,
    "metadata": {"name": "reviews"},
    "spec": {
        "model": {"source": "hf://owner/model"},
        "data": {
            "sft": {"source": "file:///texts.csv"},
            "preferences": {"source": "file:///pairs.csv", "chosenColumn": "good", "rejectedColumn": "bad"},
            "prompts": {"source": "file:///prompts.csv"},
        },
    },
}

# What the API server accepts, and why: the operator refuses these when it parses the run.
PASSED: list[dict[str, Any]] = [
    {"lora.targetModules": "mlp"},  # text or a list: a structural schema says neither
    {"lora.targetModules": []},
    {"lora.targetModules": ["q_proj", 3]},
    {"sft.steps": None},  # nothing is left out before defaults are filled in
    {"/status": {"phase": "Done"}},  # status is dropped when a run is created
]
# Refused before the schema is asked, in words that name no field.
UNREADABLE = ("apiVersion:", "kind:", "metadata:", "spec.sft.learningRate: nan")

Kubectl = Callable[..., Any]


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """The minimal run with values at dotted paths, below spec or, with a slash, at the root; "..." removes one."""
    document = copy.deepcopy(MINIMAL)
    for path, value in changes.items():
        parts = path[1:].split(".") if path.startswith("/") else ["spec", *path.split(".")]
        section = document
        for part in parts[:-1]:
            section = section.setdefault(part, {})
        if value == "...":
            section.pop(parts[-1])
        else:
            section[parts[-1]] = value
    return document


class Runs:
    """RLHFRuns of one namespace, by the API."""

    def __init__(self, kubeconfig: Path, namespace: str) -> None:
        self._client = client.CustomObjectsApi(config.new_client_from_config(str(kubeconfig)))
        self._place = (GROUP, VERSION, namespace, PLURAL)

    def try_out(self, document: dict[str, Any]) -> dict[str, Any]:
        """What the server would store, by a strict dry run."""
        stored: dict[str, Any] = self._client.create_namespaced_custom_object(
            *self._place, document, dry_run="All", field_validation="Strict"
        )
        return stored

    def refusal(self, document: dict[str, Any]) -> str | None:
        """The server's message about `document`, None if it is accepted."""
        try:
            self.try_out(document)
        except client.ApiException as error:
            if error.status not in (400, 422):
                raise
            return str(json.loads(error.body)["message"])
        return None


@pytest.fixture(scope="module")
def runs(api_server: Path, api_kubectl: Kubectl) -> Iterator[Runs]:
    """The runs of a namespace of this module's own."""
    namespace = f"admission-{uuid.uuid4().hex[:8]}"
    api_kubectl("create", "namespace", namespace)
    yield Runs(api_server, namespace)
    api_kubectl("delete", "namespace", namespace, "--wait=false")


def paths(case: dict[str, Any]) -> list[str]:
    """The fields that our own parser blames."""
    return [line.split(": ")[0] for line in case["error"].splitlines() if not line.startswith(" ")]


def is_unreadable(case: dict[str, Any]) -> bool:
    """Whether the document is no RLHFRun, or no JSON."""
    return str(case["error"]).startswith(UNREADABLE)


WRONG = [case for case in CASES if case["change"] not in PASSED and not is_unreadable(case)]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: str(case["change"]))
def test_a_wrong_run_is_refused_with_its_field_named(runs: Runs, case: dict[str, Any]) -> None:
    message = runs.refusal(changed(case["change"]))
    assert message is not None
    assert unnamed(case, message) == []


def unnamed(case: dict[str, Any], message: str) -> list[str]:
    """The blamed fields that a refusal does not name."""
    # With a mapping in place of a list, the server names what is in it: `unknown field "spec.a.key"`.
    form = r"(^|[\s\"*\[]){}(:|(\.\w+)?\")"
    return [path for path in paths(case) if not re.search(form.format(re.escape(path)), message)]


def test_the_refused_are_many_and_concern_every_section() -> None:
    blamed = {path for case in WRONG for path in paths(case)}
    assert len(blamed) >= 40
    crd = yaml.safe_load((ROOT / "manifests" / "crd" / "rlhfruns.yaml").read_text())
    spec = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    assert set(spec) <= {path.split(".")[1] for path in blamed if path.startswith("spec.")}


@pytest.mark.parametrize("case", filter(is_unreadable, CASES), ids=lambda case: str(case["change"]))
def test_what_is_no_run_is_refused(runs: Runs, case: dict[str, Any]) -> None:
    assert runs.refusal(changed(case["change"]))


@pytest.mark.parametrize("change", PASSED, ids=str)
def test_what_the_schema_lets_through_is_known(runs: Runs, change: dict[str, Any]) -> None:
    assert change in [case["change"] for case in CASES]
    assert runs.refusal(changed(change)) is None


def test_kubectl_apply_names_the_field_too_and_creates_none(
    api_kubectl: Kubectl, api_namespace: str, tmp_path: Path
) -> None:
    for number, case in enumerate(WRONG):
        (tmp_path / f"{number:03}.yaml").write_text(yaml.safe_dump(changed(case["change"])))
    done = api_kubectl("apply", "-n", api_namespace, "--validate=strict", "-f", tmp_path, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    said = re.split(r"(?m)^(?=Error from server|The RLHFRun)", done.stderr)[1:]  # in the order of the files
    missing = {str(case["change"]): unnamed(case, message) for case, message in zip(WRONG, said, strict=True)}
    assert not any(missing.values()), missing
    assert api_kubectl("get", "rlhfruns", "-n", api_namespace, "-o", "name").stdout == ""


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_accepted(api_kubectl: Kubectl, api_namespace: str, example: Path) -> None:
    tried = api_kubectl("apply", "-n", api_namespace, "--dry-run=server", "--validate=strict", "-f", example)
    assert "created (server dry run)" in tried.stdout


def test_the_server_fills_in_the_defaults_that_the_operator_would(runs: Runs) -> None:
    stored = runs.try_out(MINIMAL)["spec"]
    assert stored == RLHFRun.model_validate(MINIMAL).model_dump(mode="json", by_alias=True, exclude_none=True)["spec"]


def test_explain_says_something_of_every_field(api_kubectl: Kubectl) -> None:
    sections = ["spec"]
    while sections:
        section = sections.pop()
        said = api_kubectl("explain", f"rlhfruns.{section}").stdout
        assert "<no description>" not in said, section
        assert "<empty>" not in said, section
        sections += [f"{section}.{name}" for name in re.findall(r"(?m)^  (\w+)\t<(?:\[\])?Object>", said)]


def test_explain_of_the_spec_reads_well(api_kubectl: Kubectl) -> None:
    said = api_kubectl("explain", "rlhfrun.spec").stdout
    assert re.search(r"DESCRIPTION:\s+What to align, on what data, and how\.", said)
    assert re.search(r"(?m)^  model\t<Object> -required-\n    The pretrained model\.$", said)


def test_the_table_has_the_columns_that_a_person_looks_for(api_kubectl: Kubectl, api_namespace: str) -> None:
    api_kubectl("create", "-n", api_namespace, "-f", "-", stdin=MINIMAL)
    status = {"phase": "Running", "stage": "ppo", "progress": "120/625"}
    patch(api_kubectl, api_namespace, {"status": status}, "--subresource=status")
    header, row = api_kubectl("get", "rlhf", "-n", api_namespace).stdout.splitlines()
    shown = dict(zip(re.split(r"  +", header.strip()), re.split(r"  +", row.strip()), strict=False))
    assert shown["NAME"] == "reviews"
    assert (shown["PHASE"], shown["STAGE"], shown["PROGRESS"]) == ("Running", "ppo", "120/625")
    assert {"REWARD", "AGE"} <= set(header.split())
    assert "rlhfrun.rlhf.dev/reviews" in api_kubectl("get", "all", "-n", api_namespace, "-o", "name").stdout
    assert "rlhfrun.rlhf.dev/reviews" in api_kubectl("get", "ml", "-n", api_namespace, "-o", "name").stdout


def test_spec_and_status_are_written_apart(api_kubectl: Kubectl, api_namespace: str) -> None:
    created = changed({"/status": {"phase": "Succeeded"}})
    api_kubectl("create", "-n", api_namespace, "-f", "-", stdin=created)
    assert "status" not in get(api_kubectl, api_namespace)
    patch(api_kubectl, api_namespace, {"status": {"phase": "Failed"}})
    assert "status" not in get(api_kubectl, api_namespace)
    patch(
        api_kubectl, api_namespace, {"spec": {"suspend": True}, "status": {"phase": "Failed"}}, "--subresource=status"
    )
    run = get(api_kubectl, api_namespace)
    assert run["status"]["phase"] == "Failed"
    assert run["spec"]["suspend"] is False
    assert run["metadata"]["generation"] == 1


def test_kubectl_waits_for_a_condition(api_kubectl: Kubectl, api_namespace: str) -> None:
    api_kubectl("create", "-n", api_namespace, "-f", "-", stdin=MINIMAL)
    condition = {
        "type": "Succeeded",
        "status": "True",
        "reason": "AllStagesDone",
        "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    patch(api_kubectl, api_namespace, {"status": {"conditions": [condition]}}, "--subresource=status")
    api_kubectl("wait", "--for=condition=Succeeded", "rlhf/reviews", "-n", api_namespace, "--timeout=10s")


def test_what_an_artifact_means_cannot_be_changed(api_kubectl: Kubectl, api_namespace: str) -> None:
    api_kubectl("create", "-n", api_namespace, "-f", "-", stdin=MINIMAL)
    refused = patch(api_kubectl, api_namespace, {"spec": {"ppo": {"epochs": 7}}}, check=False)
    assert "spec.ppo: Forbidden: cannot be changed; apply a run of another name" in refused.stderr
    selector = {"spec": {"placement": {"nodeSelector": {"gpu": "a"}}}}
    refused = patch(api_kubectl, api_namespace, selector, check=False)
    assert "spec.placement: Forbidden: can be changed while suspend is true only" in refused.stderr
    patch(api_kubectl, api_namespace, {"spec": {"suspend": True}})
    patch(api_kubectl, api_namespace, selector)
    assert get(api_kubectl, api_namespace)["metadata"]["generation"] == 3


def patch(kubectl: Kubectl, namespace: str, change: dict[str, Any], *arguments: str, check: bool = True) -> Any:
    """Merge `change` into the run."""
    return kubectl(
        "patch",
        "rlhfrun",
        "reviews",
        "-n",
        namespace,
        "--type=merge",
        "-p",
        json.dumps(change),
        *arguments,
        check=check,
    )


def get(kubectl: Kubectl, namespace: str) -> dict[str, Any]:
    """The run as stored."""
    run: dict[str, Any] = json.loads(kubectl("get", "rlhfrun", "reviews", "-n", namespace, "-o", "json").stdout)
    return run
