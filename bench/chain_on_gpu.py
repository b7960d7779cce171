"""Runs the whole chain of one RLHFRun on this machine and prints each stage's seconds and peak memory.

python bench/chain_on_gpu.py run.yaml [--home FOLDER] [--set seed=3 --set gpu.count=1 ...]

Peaks are PyTorch's reserved memory and the process's resident set, as each stage's manifest records them; gpu.memory
of the run caps the first on a larger card.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import yaml

from rlhf_api.run import RLHFRun, RunStatus
from rlhf_operator.local import Home, LocalRunner
from rlhf_operator.plan import Observed
from rlhf_operator.stages import chain
from rlhf_store.artifacts import open_artifacts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--home", type=Path, default=Path(".rlhf"))
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the spec")
    arguments = parser.parse_args()
    run = RLHFRun.model_validate(changed(yaml.safe_load(arguments.run.read_text()), arguments.set))
    home = Home(arguments.home)
    runner = LocalRunner(run, home.default_store(), home)
    seen: dict[str, tuple[str, str | None]] = {}
    begin = time.monotonic()

    def show(status: RunStatus, _: Observed) -> None:
        for stage in status.stages:
            if seen.get(stage.name) != (stage.state, stage.message):
                seen[stage.name] = (stage.state, stage.message)
                print(
                    f"{time.monotonic() - begin:7.1f} s  {stage.name:20} {stage.state:10} {stage.message or ''}",
                    flush=True,
                )

    status = runner.run(show)
    artifacts = open_artifacts(home.default_store())
    print(f"\n{status.phase} in {time.monotonic() - begin:.1f} s")
    print(f"{'stage':20} {'s':>7} {'GPU GiB':>8} {'host GiB':>8}  figures")
    for link in chain(run, runner.observe().fingerprints):
        manifest = None if link.skipped else artifacts.find(link.output)
        if manifest is None:
            continue
        meta = manifest.metadata
        figures = {name: round(value, 4) for name, value in meta.get("metrics", {}).items()}
        print(
            f"{link.name:20} {meta.get('seconds', 0):7.1f} {meta.get('peakGpuBytes', 0) / 2**30:8.2f} "
            f"{meta.get('peakHostBytes', 0) / 2**30:8.2f}  {json.dumps(figures)}"
        )


def changed(document: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    """The resource with some fields of its spec changed, each given as `section.field=value`, the value as YAML."""
    for change in changes:
        path, _, value = change.partition("=")
        *sections, field = path.split(".")
        place = document["spec"]
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = yaml.safe_load(value)
    return document


if __name__ == "__main__":
    main()
