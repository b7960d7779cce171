"""The ladder: what is lowered when a stage runs out of memory, and what stays."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_api.rules import problems
from rlhf_api.run import RunSpec
from rlhf_api.stage import StageSettings
from rlhf_operator.ladder import MAX_STEPS, ladder, remedy, stepped_down, told
from rlhf_operator.stages import STAGES

PAIRS = {"source": "hf://datasets/owner/pairs", "chosenColumn": "chosen", "rejectedColumn": "rejected"}


def spec(**sections: Any) -> RunSpec:
    data = {"prompts": {"source": "hf://datasets/owner/prompts"}, "preferences": PAIRS}
    return RunSpec.model_validate({"model": {"source": "hf://owner/model"}, "data": data, **sections})


def settings_of(stage: str, **sections: Any) -> StageSettings:
    row = next(row for row in STAGES if row.name == stage)
    return row.settings(spec(**sections), None)


def sizes(stage: str, shorten: bool = False, **sections: Any) -> list[tuple[str, int]]:
    return [(step.size, step.after) for step in ladder(stage, settings_of(stage, **sections), shorten)]


def test_a_trained_adapter_halves_its_micro_batches_to_one() -> None:
    for stage in ("sft", "reward"):
        steps = sizes(stage, **{stage: {"batchSize": 24, "microBatchSize": 12}})
        assert steps == [("microBatchSize", 6), ("microBatchSize", 3), ("microBatchSize", 1)]
        assert sizes(stage) == []  # its default is 1


def test_ppo_halves_its_micro_batches_and_then_the_rows_decoded_together() -> None:
    steps = sizes("ppo", ppo={"batchSize": 16, "microBatchSize": 4})
    assert steps == [
        *[("microBatchSize", size) for size in (2, 1)],
        *[("rolloutBatchSize", size) for size in (8, 4, 2, 1)],
    ]


def test_ppo_on_several_gpus_begins_with_the_share_of_each() -> None:
    given = settings_of("ppo", ppo={"batchSize": 64, "microBatchSize": 8})  # 16 an optimiser step
    steps = ladder("ppo", given, False, gpus=4)
    assert [(step.size, step.before, step.after) for step in steps][:4] == [
        ("microBatchSize", 4, 2), ("microBatchSize", 2, 1), ("rolloutBatchSize", 16, 8), ("rolloutBatchSize", 8, 4),
    ]  # fmt: skip


def test_the_defaults_of_ppo_and_evaluate_reach_one() -> None:
    assert sizes("ppo")[-1] == ("rolloutBatchSize", 1)
    of_one = [("microBatchSize", size) for size in (4, 2, 1)]
    assert sizes("evaluate")[3:] == [("batchSize", 1), *of_one]


def test_lengths_are_halved_last_down_to_a_floor_and_only_where_the_run_allows_it() -> None:
    assert sizes("sft", True, sft={"batchSize": 2, "microBatchSize": 2, "sequenceLength": 300}) == [
        ("microBatchSize", 1), ("sequenceLength", 150), ("sequenceLength", 75),
    ]  # fmt: skip
    small = {"batchSize": 1, "microBatchSize": 1}
    assert sizes("reward", True, reward={**small, "sequenceLength": 128}) == [("sequenceLength", 64)]
    assert sizes("ppo", True, ppo={**small, "responseTokens": 128}) == [("responseTokens", 64)]
    assert sizes("ppo", False, ppo={**small, "responseTokens": 128}) == []


@pytest.mark.parametrize(
    "reward", [{"function": "module:callable"}, {"classifier": {"source": "hf://a/b", "label": "x"}}]
)
def test_a_reward_that_is_not_trained_and_a_stage_without_batches_have_no_step(reward: dict[str, Any]) -> None:
    given = settings_of("reward", reward={**reward, "batchSize": 8, "microBatchSize": 8})
    assert (ladder("reward", given, True), remedy("reward", given)) == ((), "give it more memory")
    assert ladder("merge", settings_of("merge", sft={"microBatchSize": 8}), True) == ()


def test_an_optimiser_step_sees_as_many_episodes_as_before() -> None:
    # With microBatchSize 32 a mini-batch is all of batchSize by default, with 16 it would be a quarter.
    given = settings_of("ppo", ppo={"batchSize": 64, "microBatchSize": 32})
    after = stepped_down(ladder("ppo", given, False), given, 1).ppo
    assert given.ppo is not None
    assert after is not None
    assert (after.micro_batch_size, after.effective_mini_batch_size) == (16, given.ppo.effective_mini_batch_size)


def test_what_was_changed_is_told_from_the_first_to_the_last() -> None:
    given = settings_of("ppo", ppo={"batchSize": 16, "microBatchSize": 4})
    assert told(ladder("ppo", given, False), 0) is None
    assert told(ladder("ppo", given, False), 2) == "microBatchSize 1 instead of 4"
    assert told(ladder("ppo", given, False), 3) == "microBatchSize 1 instead of 4 and rolloutBatchSize 8 instead of 16"


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 512), st.integers(1, 64), st.integers(1, 64), st.booleans(), st.integers(0, 12))
def test_every_step_keeps_the_rules_and_changes_nothing_but_sizes(
    micro: int, of_mini: int, of_batch: int, mini_given: bool, count: int
) -> None:
    mini = {"miniBatchSize": micro * of_mini} if mini_given else {}
    sections = {
        "sft": {"batchSize": micro * of_mini, "microBatchSize": micro},
        "ppo": {"batchSize": micro * of_mini * of_batch, "microBatchSize": micro, **mini},
    }
    before = spec(**sections)
    for stage in ("sft", "ppo", "evaluate"):
        given = settings_of(stage, **sections)
        after = stepped_down(ladder(stage, given, False), given, count)
        changed = {name: getattr(after, name) for name in ("sft", "ppo", "evaluate") if getattr(after, name)}
        assert problems(before.model_copy(update=changed)) == []
        assert len(ladder(stage, given, True)) <= MAX_STEPS
        same = {"micro_batch_size", "mini_batch_size", "rollout_batch_size"} | (
            {"batch_size"} if stage == "evaluate" else set()
        )
        for name, section in changed.items():
            old = getattr(given, name).model_dump(exclude=same)
            assert section.model_dump(exclude=same) == old
        if given.ppo and after.ppo:
            assert after.ppo.effective_mini_batch_size == given.ppo.effective_mini_batch_size
