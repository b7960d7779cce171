"""`rlhf … --cluster` and `kubectl rlhf …`: what they say where there is no cluster."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rlhf_api.errors import StoreError, UserError
from rlhf_api.names import EXIT_CODES
from rlhf_operator.cluster_options import ClusterOptions
from rlhf_operator.port_forward import forwarded

ROOT = Path(__file__).parents[2]


def called(script: str, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """What a console script of pyproject.toml does with a kubeconfig that is not there."""
    module, function = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"][script].split(":")
    program = f"from {module} import {function}; {function}()"
    hidden = {name: value for name, value in os.environ.items() if not name.startswith("KUBERNETES_")}
    environment = {**hidden, "HOME": str(folder), "KUBECONFIG": str(folder / "none")}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "arguments",
    [("status",), ("logs", "x"), ("suspend", "x"), ("resume", "x"), ("report", "x")],
    ids=lambda each: each[0],
)
@pytest.mark.parametrize("script", ["rlhf", "kubectl-rlhf"])
def test_without_a_cluster_it_is_one_line_and_kubectl_rlhf_needs_no_option(
    script: str, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    option = ["--cluster"] if script == "rlhf" else []
    ended = called(script, tmp_path, *arguments, *option)
    assert ended.returncode == EXIT_CODES["user"]
    assert ended.stderr.startswith("rlhf: no cluster: ")
    assert len(ended.stderr.splitlines()) == 1


def test_a_kubeconfig_that_is_missing_is_named(tmp_path: Path) -> None:
    ended = called("kubectl-rlhf", tmp_path, "status", "--kubeconfig", "mine")
    assert (ended.returncode, ended.stderr) == (2, "rlhf: --kubeconfig mine: there is no such file\n")


def test_without_kubectl_the_way_to_a_store_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(UserError, match="Service store: is reached through kubectl, which is not in PATH"),
        forwarded(ClusterOptions(), "store", 9000),
    ):
        pass


def test_a_kubectl_that_ends_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kubectl = tmp_path / "kubectl"
    kubectl.write_text("#!/bin/sh\necho; echo error: no such pod >&2\nexit 1\n")
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with (
        pytest.raises(StoreError, match="Service store: cannot be reached: error: no such pod"),
        forwarded(ClusterOptions(), "store", 9000),
    ):
        pass
