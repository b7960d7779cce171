"""Many runs at once, on an API server with KWOK's nodes: what bench/operator_load.py checks as it measures."""

import subprocess
import sys
from pathlib import Path

import pytest
from rendered_chart import BIN, ROOT

pytestmark = pytest.mark.timeout(3000)


def test_many_runs_at_once_converge_also_after_a_restart_and_a_kill(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if not all((BIN / name).exists() for name in ("kube-apiserver", "kwok")):
        if request.config.getoption("--kubeconfig") is None:
            pytest.fail("first `hack/cluster/tools.sh control-plane kwok`")
        pytest.skip("needs `hack/cluster/tools.sh control-plane kwok`")
    runs, more = request.config.getoption("--load")
    command = ["bench/operator_load.py", "--runs", runs, "--more", more, "--folder", tmp_path]
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, text=True, capture_output=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
