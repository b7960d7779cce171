"""The table of stages: what reads what, and which change of the spec moves which address."""

import json
from typing import Any

import pytest

from rlhf_api.run import RLHFRun
from rlhf_api.stage import StageConfig, StoreConfig, stage_digest
from rlhf_operator.stages import STAGES, Link, chain

SPEC: dict[str, Any] = {
    "model": {"source": "hf://owner/model"},
    "data": {
        "sft": {"source": "hf://datasets/owner/texts"},
        "preferences": {"source": "hf://datasets/owner/pairs", "chosenColumn": "chosen", "rejectedColumn": "rejected"},
        "prompts": {"source": "hf://datasets/owner/prompts"},
        "evaluation": {"source": "hf://datasets/owner/labelled"},
    },
}


def resource(**spec: Any) -> RLHFRun:
    return RLHFRun.model_validate({"metadata": {"name": "run"}, "spec": {**SPEC, **spec}})


def without(*data: str) -> dict[str, Any]:
    return {name: value for name, value in SPEC["data"].items() if name not in data}


def links(run: RLHFRun, **fingerprints: str) -> dict[str, Link]:
    known = {name.replace("_", "-"): value for name, value in fingerprints.items()}
    return {link.name: link for link in chain(run, known)}


def moved(before: dict[str, Link], after: dict[str, Link]) -> set[str]:
    """The stages whose output has another address."""
    return {name for name in before if before[name].output != after[name].output}


RL = {"reward", "ppo", "evaluate"}


def test_each_kind_of_artifact_has_one_stage() -> None:
    kinds = [stage.output for stage in STAGES]
    assert len(set(kinds)) == len(kinds)


def test_inputs_are_made_by_earlier_stages() -> None:
    made: set[str] = set()
    for stage in STAGES:
        assert set(stage.inputs.values()) <= made, stage.name
        made.add(stage.output)


def test_a_whole_chain_feeds_every_stage_as_the_table_says() -> None:
    found = links(resource())
    for stage in STAGES:
        link = found[stage.name]
        assert link.skipped is None
        assert {name: ref.kind for name, ref in link.inputs.items()} == stage.inputs
        assert link.output.digest == stage_digest(stage.program, link.settings, link.inputs)


def test_without_sft_the_model_stands_for_the_merged_model() -> None:
    found = links(resource(data=without("sft")))
    model = found["import-model"].output
    assert {name for name, link in found.items() if link.skipped} == {"import-sft", "sft", "merge"}
    assert all(found[name].inputs["model"] == model for name in RL)
    assert set(found["reward"].inputs) == {"model", "data"}
    assert set(found["evaluate"].inputs) == {"model", "reward", "policy", "prompts", "data"}


@pytest.mark.parametrize(
    "reward",
    [{"function": "module:callable"}, {"classifier": {"source": "hf://owner/classifier", "label": "POSITIVE"}}],
)
def test_a_reward_that_is_not_trained_needs_no_preferences(reward: dict[str, Any]) -> None:
    found = links(resource(reward=reward))
    assert next(iter(reward)) in str(found["import-preferences"].skipped)
    assert "data" not in found["reward"].inputs


def test_without_evaluation_data_evaluate_still_runs() -> None:
    found = links(resource(data=without("evaluation")))
    assert found["import-evaluation"].skipped
    assert found["evaluate"].skipped is None
    assert "data" not in found["evaluate"].inputs


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({"ppo": {"epochs": 2}}, {"ppo", "evaluate"}),
        ({"ppo": {"promptTokens": 32}}, {"import-prompts", "ppo", "evaluate"}),
        ({"evaluate": {"samples": 8}}, {"evaluate"}),
        ({"reward": {"steps": 7}}, RL),
        ({"merge": {"shardSize": "1Gi"}}, {"merge", *RL}),
        ({"sft": {"steps": 7}}, {"sft", "merge", *RL}),
        ({"lora": {"layers": "top:2"}}, RL),
        ({"lora": {"rank": 4}}, {"sft", "merge", *RL}),
        ({"quantization": {"type": "int8"}}, {"sft", "merge", *RL}),
        ({"model": {"source": "hf://owner/other"}}, {stage.name for stage in STAGES}),
        ({"gpu": {"memory": "48Gi"}, "tracking": {"wandbProject": "p"}, "suspend": True}, set()),
    ],
)
def test_a_change_moves_the_stages_that_read_it_and_those_after(change: dict[str, Any], stages: set[str]) -> None:
    assert moved(links(resource()), links(resource(**change))) == stages


def test_changed_bytes_of_a_source_move_what_reads_them() -> None:
    before = links(resource(), import_prompts="a")
    assert moved(before, links(resource(), import_prompts="b")) == {"import-prompts", "ppo", "evaluate"}


def test_two_runs_of_one_spec_share_every_address() -> None:
    other = RLHFRun.model_validate({"metadata": {"name": "other", "uid": "u"}, "spec": SPEC})
    assert moved(links(resource()), links(other)) == set()


def test_a_config_is_read_back_as_it_was_written() -> None:
    link = links(resource())["ppo"]
    config = link.config(resource(), StoreConfig(url="s3://bucket/prefix"), "run-1")
    text = config.model_dump_json(by_alias=True, exclude_none=True)
    assert StageConfig.model_validate_json(text) == config
    assert json.loads(text)["settings"].keys() == {"quantization", "lora", "ppo", "seed"}
