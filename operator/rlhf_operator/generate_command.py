"""`rlhf generate`: a process of the pipeline that samples from the policy of a finished run."""

import subprocess
import sys
from collections.abc import Sequence

from rlhf_api.errors import UserError
from rlhf_api.stage import ArtifactRef
from rlhf_operator.place import home
from rlhf_operator.summary import artifact_of
from rlhf_store.artifacts import open_artifacts

GENERATE = (sys.executable, "-m", "rlhf_pipeline.generate")


def generate_from(
    name: str,
    prompts: Sequence[str],
    without_adapter: bool,
    tokens: int,
    temperature: float,
    seed: int,
    as_json: bool,
    command: Sequence[str] = GENERATE,
) -> int:
    """Sample from a run's policy; returns the process's exit code. Raises UserError if there is no policy yet."""
    folder = home().run_folder(name)
    status, store = folder.need_status(), folder.store()
    artifacts = open_artifacts(store)

    def need(stage: str, what: str) -> ArtifactRef:
        ref = artifact_of(status, stage)
        if ref is None or artifacts.find(ref) is None:
            raise UserError(f"run {name!r} has no {what} yet: its phase is {status.phase}; finish it with `rlhf run`")
        return ref

    base = need("merge" if artifact_of(status, "merge") else "import-model", "model")
    arguments = ["--store-url", store.url, "--model", str(base)]
    if store.endpoint:
        arguments += ["--endpoint", store.endpoint]
    if not without_adapter:
        arguments += ["--policy", str(need("ppo", "policy"))]
    for prompt in prompts:
        arguments += ["--prompt", prompt]
    arguments += ["--tokens", str(tokens), "--temperature", str(temperature), "--seed", str(seed)]
    return subprocess.run([*command, *arguments, *(["--json"] if as_json else [])], check=False).returncode
