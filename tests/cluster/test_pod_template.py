"""What a real API server says of a Job whose pod template a run has changed."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bare_plane import OperatorProcess, api_of, until
from kubectl import SOON

from rlhf_api.names import API_VERSION, GROUP, KIND, PLURAL, STAGE_CONTAINER, VERSION

SPEC: dict[str, Any] = {
    "model": {"source": "hf://owner/model"},
    "data": {"prompts": {"source": "file:///prompts.csv"}},
    "reward": {"function": "module:callable"},
}
Kubectl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize(
    ("template", "field"),
    [
        ({"spec": {"nodeSelectr": {"gpu": "a"}}}, "spec.template.spec.nodeSelectr"),
        (
            {"spec": {"containers": [{"name": STAGE_CONTAINER, "resources": {"limit": {"memory": "48Gi"}}}]}},
            "spec.template.spec.containers[0].resources.limit",
        ),
    ],
    ids=["pod", "container"],
)
def test_a_field_that_there_is_not_fails_the_run_with_its_name(
    api_server: Path, api_kubectl: Kubectl, api_namespace: str, tmp_path: Path, template: dict[str, Any], field: str
) -> None:
    operator = OperatorProcess(api_server, tmp_path / "store", tmp_path / "operator.log", [api_namespace])
    operator.start()
    try:
        run = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "typo"}, "spec": SPEC}
        run["spec"] = SPEC | {"placement": {"podTemplate": template}}
        api_kubectl("create", "-n", api_namespace, "-f", "-", stdin=run)
        api, path = api_of(api_server), f"/apis/{GROUP}/{VERSION}/namespaces/{api_namespace}/{PLURAL}/typo"

        def failed() -> str | None:
            conditions = (api.request("GET", path).get("status") or {}).get("conditions", [])
            found = [each for each in conditions if each["type"] == "Failed" and each["status"] == "True"]
            return f"{found[0]['reason']}: {found[0]['message']}" if found else None

        message = until(failed, SOON, operator.last_lines)
        assert message.startswith("User: import-model: ")
        assert f'unknown field "{field}"' in message
        assert not api.request("GET", f"/apis/batch/v1/namespaces/{api_namespace}/jobs")["items"]
    finally:
        operator.kill()
