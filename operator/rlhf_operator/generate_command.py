"""`rlhf generate`: a process of the pipeline that samples from the policy of a finished run."""

import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from rlhf_api.errors import UserError
from rlhf_api.stage import ArtifactRef
from rlhf_operator.open_run import OpenRun
from rlhf_operator.summary import artifact_of

GENERATE = (sys.executable, "-m", "rlhf_pipeline.generate")


def generate_from(
    run: OpenRun,
    prompts: Sequence[str],
    without_adapter: bool,
    tokens: int,
    temperature: float,
    seed: int,
    as_json: bool,
    command: Sequence[str] = GENERATE,
) -> int:
    """Sample from a run's policy; returns the process's exit code. Raises UserError if there is no policy yet."""
    if command is GENERATE and find_spec("torch") is None:
        raise UserError("generate: samples on this machine, which needs pip install 'rlhf-operator[pipeline]'")
    artifacts = run.artifacts

    def need(stage: str, what: str) -> ArtifactRef:
        ref = artifact_of(run.status, stage)
        if ref is None or artifacts.find(ref) is None:
            raise UserError(f"run {run.name!r} has no {what} yet: its phase is {run.status.phase}; {run.finish}")
        return ref

    base = need("merge" if artifact_of(run.status, "merge") else "import-model", "model")
    arguments = ["--store-url", run.store.url, "--model", str(base)]
    for option, value in (("--endpoint", run.store.endpoint), ("--region", run.store.region)):
        arguments += [option, value] if value else []
    if not without_adapter:
        arguments += ["--policy", str(need("ppo", "policy"))]
    for prompt in prompts:
        arguments += ["--prompt", prompt]
    arguments += ["--tokens", str(tokens), "--temperature", str(temperature), "--seed", str(seed)]
    every = [*command, *arguments, *(["--json"] if as_json else [])]
    return subprocess.run(every, env=run.environment, check=False).returncode
