"""Whether a run fits: the condition, the budget in status, and what is refused before a GPU is asked for."""

from typing import Any

import pytest

from rlhf_api.budget import ModelShape, budget
from rlhf_api.run import RLHFRun, RunSpec
from rlhf_operator.memory_check import TOLERANCE, check_memory

NEOX_20B = ModelShape(
    hidden=6144, layers=44, heads=64, kv_heads=64, head_size=96, intermediate=24576, mlp_matrices=2, vocabulary=50432,
    positions=2048, tied=False, fused_qkv=True,
)  # fmt: skip
PENDING = ["sft", "merge", "reward", "ppo", "evaluate"]


def spec(**changes: Any) -> RunSpec:
    table = {"source": "hf://datasets/owner/texts"}
    short = {
        "model": {"source": "hf://owner/model"},
        "data": {"sft": table, "prompts": table},
        "reward": {"function": "module:callable"},
        "ppo": {"batchSize": 64, "microBatchSize": 4, "rolloutBatchSize": 8},
        "lora": {"layers": "top:11"},
    }
    return RLHFRun.model_validate({"metadata": {"name": "run"}, "spec": {**short, **changes}}).spec


def test_20b_on_24_gigabytes_fits() -> None:
    found = check_memory(spec(), NEOX_20B, PENDING)
    assert (found.condition.status, found.condition.reason, found.refusal) == ("True", "Estimated", None)
    assert {(line["stage"], line["phase"]) for line in found.lines} >= {("sft", "train"), ("ppo", "rollout")}
    assert all(line["fits"] for line in found.lines)


def test_what_cannot_fit_is_refused_with_the_settings_that_would() -> None:
    found = check_memory(spec(ppo={"batchSize": 64, "microBatchSize": 64, "responseTokens": 960}), NEOX_20B, PENDING)
    assert (found.condition.status, found.condition.reason) == ("False", "TooLarge")
    assert found.refusal is not None
    assert "set ppo.microBatchSize to" in found.refusal
    assert not all(line["fits"] for line in found.lines)


def test_only_stages_that_have_yet_to_run_are_refused() -> None:
    large = spec(sft={"batchSize": 64, "microBatchSize": 64, "sequenceLength": 2048})
    assert check_memory(large, NEOX_20B, PENDING).refusal is not None
    done = check_memory(large, NEOX_20B, ["ppo", "evaluate"])
    assert (done.condition.status, done.refusal) == ("False", None)


def test_a_little_over_the_estimate_is_said_but_not_refused() -> None:
    fits = budget(NEOX_20B, spec())
    size = fits.peak.total + (1 << 30)  # with the context's share, exactly the peak
    tight = spec(gpu={"memory": f"{size / TOLERANCE**0.5 / 2**20:.0f}Mi"})
    found = check_memory(tight, NEOX_20B, PENDING)
    assert (found.condition.status, found.refusal) == ("False", None)


@pytest.mark.parametrize(
    ("changes", "shape", "status", "reason"),
    [({"gpu": {"count": 0}}, NEOX_20B, "True", "NoGPU"), ({}, None, "Unknown", "ModelNotImported")],
)
def test_what_is_not_estimated_is_not_refused(
    changes: dict[str, Any], shape: ModelShape | None, status: str, reason: str
) -> None:
    found = check_memory(spec(**changes), shape, PENDING)
    assert (found.condition.status, found.condition.reason, found.lines, found.refusal) == (status, reason, [], None)
