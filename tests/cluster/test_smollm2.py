"""The README's example, a real model on real reviews, with fewer steps: from `kubectl apply` to a report."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from release import BUCKET, GPU_NODE, PREFIX, STAGES, Release

from rlhf_api.stage import ArtifactRef, StoreConfig
from rlhf_store.artifacts import open_artifacts

pytestmark = pytest.mark.timeout(2400)

EXAMPLE = Path(__file__).parents[2] / "manifests" / "examples" / "positive-reviews.yaml"
FEWER: dict[str, dict[str, Any]] = {
    "data": {"sft": {"heldOut": 0.005}, "preferences": {"heldOut": 0.005}},
    "sft": {"steps": 2},
    "reward": {"steps": 2, "minAccuracy": 0},
    "ppo": {"episodes": 32},
    "evaluate": {"samples": 8, "batchSize": 8},
    "placement": {"nodeSelector": GPU_NODE},
}


def test_the_example_runs_with_a_real_model(release: Release, tmp_path: Path) -> None:
    spec = yaml.safe_load(EXAMPLE.read_text())["spec"]
    for name, changes in FEWER.items():
        section = spec.setdefault(name, {})
        for field, value in changes.items():
            section[field] = section[field] | value if name == "data" else value
    release.apply("positive-reviews", spec)
    status = release.wait("positive-reviews", timeout=1500)
    assert release.jobs("positive-reviews") == {stage: [1] for stage in STAGES}
    stages = {stage["name"]: stage for stage in status["stages"]}
    assert stages["import-model"]["metrics"]["parameters"] > 130e6
    assert stages["ppo"]["metrics"]["kl"] >= 0
    with release.store_environment() as endpoint:
        artifacts = open_artifacts(StoreConfig(url=f"s3://{BUCKET}/{PREFIX}", endpoint=endpoint))
        folder = artifacts.fetch(ArtifactRef.parse(stages["evaluate"]["artifact"]), tmp_path / "evaluation")
    report = json.loads((folder / "report.json").read_text())
    assert {"vader", "classifier"} <= set(json.dumps(report).replace('"', " ").split())
    generations = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    assert len(generations) == 8
    assert (folder / "logs" / "report.html").stat().st_size > 10_000
