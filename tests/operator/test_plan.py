"""The plan: what is decided from what is seen."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rlhf_api.errors import RETRIED, FailureClass
from rlhf_api.names import EXIT_INTERRUPTED
from rlhf_api.run import RLHFRun, RunStatus
from rlhf_api.stage import ArtifactRef, Progress, StageFailure, StageResult
from rlhf_operator.conditions import Hold
from rlhf_operator.plan import (
    BACKOFF_SECONDS,
    MAX_ATTEMPTS,
    Attempt,
    Delete,
    Observed,
    Plan,
    Start,
    Stop,
    asked_at,
    at_rest,
    plan,
)
from rlhf_operator.stages import STAGES, Link, chain

DATA: dict[str, Any] = {
    "sft": {"source": "hf://datasets/owner/texts"},
    "preferences": {"source": "hf://datasets/owner/pairs", "chosenColumn": "chosen", "rejectedColumn": "rejected"},
    "prompts": {"source": "hf://datasets/owner/prompts"},
    "evaluation": {"source": "hf://datasets/owner/labelled"},
}
FAILURES: tuple[FailureClass, ...] = ("user", "gate", "outOfMemory", "infrastructure", "bug")
IMPORTS = {"import-sft", "import-preferences", "import-prompts", "import-evaluation"}
NOW = 1000.0


def resource(suspend: bool = False, data: dict[str, Any] = DATA, **spec: Any) -> RLHFRun:
    document = {"model": {"source": "hf://owner/model"}, "data": data, "suspend": suspend, **spec}
    return RLHFRun.model_validate({"metadata": {"name": "run", "generation": 3}, "spec": document})


LINKS = {link.name: link for link in chain(resource(), {})}


def committed(*stages: str) -> dict[str, dict[str, float]]:
    return {str(LINKS[stage].output): {"loss": 0.5} for stage in stages}


def attempt(stage: str, number: int = 1, started: float = 900.0, **end: Any) -> Attempt:
    return Attempt(number=number, digest=LINKS[stage].output.digest, started=started, **end)


def failed(stage: str, failure: FailureClass, number: int = 1, finished: float = 950.0) -> Attempt:
    result = StageResult(stage=stage, failure=StageFailure(failure=failure, message=f"{stage} broke"))
    return attempt(stage, number, finished=finished, exit_code=4, result=result)


def interrupted(stage: str, number: int = 1, finished: float = 950.0) -> Attempt:
    return attempt(stage, number, finished=finished, exit_code=EXIT_INTERRUPTED)


def starts(decided: Plan) -> set[str]:
    return {action.link.name for action in decided.actions if isinstance(action, Start)}


def stops(decided: Plan) -> set[str]:
    return {action.stage for action in decided.actions if isinstance(action, Stop)}


def states(decided: Plan) -> dict[str, str]:
    return {stage.name: stage.state for stage in decided.status.stages}


def holds(status: RunStatus) -> set[str]:
    return {condition.type for condition in status.conditions if condition.status == "True"}


def test_the_reward_that_status_shows_is_ppos_in_four_digits() -> None:
    rewards = {"reward": {"reward": 0.25}, "ppo": {"reward": -1.0302891135}}
    artifacts = {str(LINKS[stage].output): metrics for stage, metrics in rewards.items()}
    assert plan(resource(), Observed(artifacts=artifacts), NOW).status.reward == -1.03
    assert plan(resource(), Observed(), NOW).status.reward is None


ALL = [stage.name for stage in STAGES]


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        ([], {"import-model"}),
        (["import-model"], IMPORTS),
        (["import-model", "import-sft"], {"import-preferences", "import-prompts", "import-evaluation", "sft"}),
        (["import-model", *IMPORTS], {"sft"}),
        (["import-model", *IMPORTS, "sft"], {"merge"}),
        (["import-model", *IMPORTS, "sft", "merge"], {"reward"}),
        (["import-model", *IMPORTS, "sft", "merge", "reward"], {"ppo"}),
        (ALL[:-1], {"evaluate"}),
        (ALL, set()),
    ],
)
def test_starts_every_stage_whose_inputs_are_there(done: list[str], expected: set[str]) -> None:
    assert starts(plan(resource(), Observed(artifacts=committed(*done)), NOW)) == expected


def test_everything_committed_is_success_by_reuse() -> None:
    decided = plan(resource(), Observed(artifacts=committed(*ALL)), NOW)
    assert decided.status.phase == "Succeeded"
    assert set(states(decided).values()) == {"Reused"}
    assert holds(decided.status) == {"Valid", "StoreReady", "Succeeded"}


def test_an_artifact_of_this_run_succeeded_rather_than_being_reused() -> None:
    result = StageResult(stage="import-model", artifact=LINKS["import-model"].output)
    done = attempt("import-model", finished=910.0, exit_code=0, result=result)
    seen = Observed(artifacts=committed("import-model"), attempts={"import-model": [done]})
    assert states(plan(resource(), seen, NOW))["import-model"] == "Succeeded"
    later = replace(seen, asked_at=920.0)
    assert states(plan(resource(), later, NOW))["import-model"] == "Reused"


def test_a_missing_artifact_that_nothing_needs_is_not_made_again() -> None:
    decided = plan(resource(), Observed(artifacts=committed("evaluate")), NOW)
    assert decided.actions == ()
    assert decided.status.phase == "Succeeded"


def test_a_missing_artifact_in_the_middle_is_made_again_from_what_there_is() -> None:
    seen = Observed(artifacts=committed("import-model", "import-sft", "sft", "reward", "ppo", "import-evaluation"))
    decided = plan(resource(), seen, NOW)
    assert starts(decided) == {"merge", "import-prompts"}
    assert states(decided)["import-preferences"] == "Skipped"


def test_skipped_stages_say_why() -> None:
    data = {name: value for name, value in DATA.items() if name != "sft"}
    decided = plan(resource(data=data), Observed(), NOW)
    sft = next(stage for stage in decided.status.stages if stage.name == "sft")
    assert (sft.state, sft.message, sft.artifact) == ("Skipped", "no data.sft", None)


def test_a_running_stage_is_not_started_again_and_shows_its_progress() -> None:
    progress = Progress(stage="import-model", step=3, total=9, phase="loading", metrics={"rows": 2.0})
    seen = Observed(attempts={"import-model": [attempt("import-model", progress=progress)]})
    decided = plan(resource(), seen, NOW)
    assert decided.actions == ()
    shown = decided.status.stages[0]
    assert (shown.state, shown.progress, shown.metrics, shown.message) == ("Running", "3/9", {"rows": 2.0}, "loading")
    assert decided.status.phase == "Running"


@pytest.mark.parametrize(
    ("eta", "age", "shown"),
    [
        (150.0, 0, "2 min"),
        (150.0, 40, "1 min"),
        (150.0, 110, "40 s"),
        (150.0, -30, "2 min"),  # a node's clock that is ahead
        (150.0, 151, None),
        (36000.0, 300, "9 h 55 min"),
        (36000.0, 1000, None),  # nothing was heard for so long that its pace is not known any more
        (None, 0, None),
    ],
)
def test_the_time_left_shrinks_while_nothing_is_heard_and_is_not_told_for_ever(
    eta: float | None, age: float, shown: str | None
) -> None:
    progress = Progress(stage="import-model", step=3, total=9, updated_at=NOW - age, eta_seconds=eta)
    seen = Observed(attempts={"import-model": [attempt("import-model", progress=progress)]})
    assert plan(resource(), seen, NOW).status.eta == shown


def test_one_stage_with_a_gpu_at_a_time() -> None:
    data = {name: value for name, value in DATA.items() if name != "sft"}
    run = resource(data=data)
    links = {link.name: link for link in chain(run, {})}
    have = {str(links[name].output): {} for name in ("import-model", "import-preferences", "import-prompts", "reward")}
    busy = Attempt(number=1, digest=links["reward"].output.digest, started=1.0)
    decided = plan(run, Observed(artifacts=have, attempts={"reward": [busy]}), NOW)
    assert "ppo" not in starts(decided)
    assert "ppo" in starts(plan(run, Observed(artifacts=have), NOW))


@pytest.mark.parametrize("failure", FAILURES)
def test_only_failures_that_a_retry_can_mend_are_retried(failure: FailureClass) -> None:
    seen = Observed(attempts={"import-model": [failed("import-model", failure)]})
    decided = plan(resource(), seen, NOW)
    if failure in RETRIED:
        assert decided.actions == (Start(LINKS["import-model"], 2),)
    else:
        assert decided.actions == ()
        assert decided.status.phase == "Failed"
        assert decided.status.stages[0].message == "import-model broke"
        condition = next(each for each in decided.status.conditions if each.type == "Failed")
        assert (condition.status, condition.reason.lower()) == ("True", failure.lower())


def test_retries_wait_longer_each_time_and_then_give_up() -> None:
    attempts: list[Attempt] = []
    waits = []
    for number in range(1, MAX_ATTEMPTS["infrastructure"]):
        attempts.append(failed("import-model", "infrastructure", number, finished=NOW))
        decided = plan(resource(), Observed(attempts={"import-model": attempts}), NOW)
        assert decided.actions == ()
        assert decided.status.phase == "Running"
        assert decided.wake_at is not None
        waits.append(decided.wake_at - NOW)
        assert starts(plan(resource(), Observed(attempts={"import-model": attempts}), decided.wake_at)) == {
            "import-model"
        }
    assert waits == [BACKOFF_SECONDS * 2**n for n in range(len(waits))]
    attempts.append(failed("import-model", "infrastructure", len(attempts) + 1))
    decided = plan(resource(), Observed(attempts={"import-model": attempts}), NOW + 1e6)
    assert decided.status.phase == "Failed"
    assert "gave up after 5 attempts" in str(decided.status.stages[0].message)


LADDER: dict[str, Any] = {"sft": {"batchSize": 8, "microBatchSize": 4}}


def out_of_memory(count: int, stage: str = "sft", **spec: Any) -> tuple[Plan, Link]:
    """The plan of a run whose stage has run out of memory so often, and the stage's link."""
    run = resource(**spec)
    links = {link.name: link for link in chain(run, {})}
    made = [replace(failed(stage, "outOfMemory", n + 1), digest=links[stage].output.digest) for n in range(count)]
    have = {str(links[name].output): {} for name in ALL[: ALL.index(stage)]}
    return plan(run, Observed(artifacts=have, attempts={stage: made}), NOW), links[stage]


@pytest.mark.parametrize(("failures", "micro"), [(0, 4), (1, 2), (2, 1)])
def test_a_stage_out_of_memory_goes_one_step_down_at_the_same_address(failures: int, micro: int) -> None:
    decided, link = out_of_memory(failures, **LADDER)
    [action] = decided.actions
    assert isinstance(action, Start)
    assert action.link.settings.sft is not None
    assert (action.number, action.link.settings.sft.micro_batch_size) == (failures + 1, micro)
    assert action.link.output == link.output


def test_a_stage_at_the_foot_of_its_ladder_is_given_up_and_says_what_was_tried_and_what_is_left() -> None:
    decided, _ = out_of_memory(3, **LADDER)
    assert (decided.actions, decided.status.phase) == ((), "Failed")
    shown = next(stage for stage in decided.status.stages if stage.name == "sft")
    assert "gave up after 3 attempts, the last with microBatchSize 1 instead of 4" in str(shown.message)
    assert "sft.sequenceLength" in str(shown.message)
    assert shown.lowered == "microBatchSize 1 instead of 4"


@pytest.mark.parametrize("stage", ["merge", "sft"])
def test_a_stage_with_nothing_to_lower_is_tried_once_more_as_it_is(stage: str) -> None:
    decided, link = out_of_memory(1, stage)
    assert decided.actions == (Start(link, 2),)
    assert out_of_memory(2, stage)[0].status.phase == "Failed"


def test_only_failures_of_memory_since_the_asking_step_down_and_they_still_count_after_others() -> None:
    run = resource(**LADDER)
    links = {link.name: link for link in chain(run, {})}
    digest = links["sft"].output.digest
    have = {str(links[name].output): {} for name in ALL[:5]}
    made = [
        replace(failed("sft", "outOfMemory", 1), digest=digest, started=100.0),
        replace(failed("sft", "infrastructure", 2), digest=digest),
        replace(failed("sft", "outOfMemory", 3), digest=digest),
        replace(interrupted("sft", 4), digest=digest),
        replace(attempt("sft", 5), digest=digest),
    ]
    seen = Observed(artifacts=have, attempts={"sft": made[:4]}, asked_at=800.0)
    [action] = plan(run, seen, NOW).actions
    assert isinstance(action, Start)
    assert action.link.settings.sft is not None
    assert action.link.settings.sft.micro_batch_size == 2
    shown = next(each for each in plan(run, replace(seen, attempts={"sft": made}), NOW).status.stages if each.attempt)
    assert (shown.state, shown.lowered) == ("Running", "microBatchSize 2 instead of 4")


def test_what_is_told_is_what_the_last_attempt_had_and_not_what_the_next_will_have() -> None:
    for failures, lowered in ((1, None), (2, "microBatchSize 2 instead of 4")):
        shown = next(stage for stage in out_of_memory(failures, **LADDER)[0].status.stages if stage.name == "sft")
        assert shown.lowered == lowered


def test_a_shorter_length_is_another_address_that_a_run_of_that_length_shares() -> None:
    run = resource(**LADDER, gpu={"shortenOnOutOfMemory": True})
    shorter = resource(sft={**LADDER["sft"], "sequenceLength": 256}, gpu={"shortenOnOutOfMemory": True})
    long = {link.name: link for link in chain(run, {})}
    short = {link.name: link for link in chain(shorter, {})}
    have = {str(long[name].output): {} for name in ALL[:5]}
    made = [replace(failed("sft", "outOfMemory", number), digest=long["sft"].output.digest) for number in (1, 2, 3)]
    seen = Observed(artifacts=have, attempts={"sft": made})
    [action] = plan(run, seen, NOW).actions
    assert isinstance(action, Start)
    assert action.link.settings.sft is not None
    assert (action.link.settings.sft.micro_batch_size, action.link.settings.sft.sequence_length) == (1, 256)
    assert action.link.output == short["sft"].output != long["sft"].output

    made.append(replace(failed("sft", "outOfMemory", 4), digest=short["sft"].output.digest))
    [action] = plan(run, seen, NOW).actions
    assert isinstance(action, Start)
    assert action.link.settings.sft is not None
    assert (action.number, action.link.settings.sft.sequence_length) == (5, 128)

    made[3:] = [replace(attempt("sft", 4, finished=950.0, exit_code=0), digest=short["sft"].output.digest)]
    decided = plan(run, replace(seen, artifacts={**have, str(short["sft"].output): {}}), NOW)
    [action] = decided.actions
    assert isinstance(action, Start)
    assert action.link.output == short["merge"].output
    shown = next(stage for stage in decided.status.stages if stage.name == "sft")
    told = "microBatchSize 1 instead of 4 and sequenceLength 256 instead of 512"
    assert (shown.state, shown.lowered, shown.artifact) == ("Succeeded", told, str(short["sft"].output))


def test_what_was_made_at_a_shorter_length_stays_when_the_run_is_resumed() -> None:
    gpu = {"shortenOnOutOfMemory": True}
    run, suspended = resource(**LADDER, gpu=gpu), resource(suspend=True, **LADDER, gpu=gpu)
    shorter = resource(sft={**LADDER["sft"], "sequenceLength": 128}, gpu=gpu)
    long, short = ({link.name: link for link in chain(each, {})} for each in (run, shorter))
    between = next(
        link for link in chain(resource(sft={**LADDER["sft"], "sequenceLength": 256}), {}) if link.name == "sft"
    )
    tried = [long["sft"].output.digest] * 3 + [between.output.digest]
    made = [replace(failed("sft", "outOfMemory", n), digest=digest) for n, digest in enumerate(tried, 1)]
    made.append(replace(attempt("sft", 5, finished=950.0, exit_code=0), digest=short["sft"].output.digest))
    seen = Observed(artifacts={str(short[name].output): {} for name in ALL[:7]}, attempts={"sft": made})
    before = plan(suspended, replace(seen, status=plan(run, seen, NOW).status), NOW).status
    resumed = replace(seen, asked_at=960.0, status=before)
    for _ in range(2):
        decided = plan(run, resumed, NOW)
        [action] = decided.actions
        assert isinstance(action, Start)
        assert action.link.output == short["reward"].output
        shown = next(stage for stage in decided.status.stages if stage.name == "sft")
        told = "microBatchSize 1 instead of 4 and sequenceLength 128 instead of 512"
        assert (shown.state, shown.lowered, shown.artifact) == ("Reused", told, str(short["sft"].output))
        resumed = replace(resumed, status=decided.status)
    assert starts(plan(resource(**LADDER), resumed, NOW)) == {"sft"}  # shorter ones are not wanted any more


def test_what_was_not_finished_at_a_shorter_length_begins_anew_when_the_run_is_resumed() -> None:
    run = resource(**LADDER, gpu={"shortenOnOutOfMemory": True})
    links = {link.name: link for link in chain(run, {})}
    made = [replace(failed("sft", "outOfMemory", n), digest=links["sft"].output.digest) for n in (1, 2, 3)]
    seen = Observed(artifacts={str(links[name].output): {} for name in ALL[:5]}, attempts={"sft": made})
    resumed = replace(seen, asked_at=960.0, status=plan(run, seen, NOW).status)
    assert plan(run, resumed, NOW).actions == (Start(links["sft"], 4),)


def test_asking_again_forgives_earlier_failures_but_not_their_numbers() -> None:
    seen = Observed(attempts={"import-model": [failed("import-model", "user")]}, asked_at=960.0)
    assert plan(resource(), seen, NOW).actions == (Start(LINKS["import-model"], 2),)


def test_a_failure_of_another_output_does_not_count() -> None:
    old = replace(failed("ppo", "user"), digest="0" * 64)
    seen = Observed(artifacts=committed(*ALL[:-2]), attempts={"ppo": [old]})
    assert plan(resource(), seen, NOW).actions == (Start(LINKS["ppo"], 2),)


def test_a_running_attempt_at_another_output_is_stopped_first() -> None:
    old = Attempt(number=4, digest="0" * 64, started=1.0)
    seen = Observed(artifacts=committed(*ALL[:-2]), attempts={"ppo": [old]})
    assert plan(resource(), seen, NOW).actions == (Stop("ppo", 4),)


def test_a_failed_stage_stops_the_others_and_nothing_starts() -> None:
    seen = Observed(
        artifacts=committed("import-model", "import-sft"),
        attempts={"import-prompts": [failed("import-prompts", "user")], "sft": [attempt("sft")]},
    )
    decided = plan(resource(), seen, NOW)
    assert decided.actions == (Stop("sft", 1),)
    assert decided.status.phase == "Running"
    after = replace(seen, attempts={**seen.attempts, "sft": [interrupted("sft")]})
    assert plan(resource(), after, NOW).status.phase == "Failed"


def test_suspend_stops_what_runs_and_waits() -> None:
    seen = Observed(artifacts=committed(*ALL[:5]), attempts={"sft": [attempt("sft")]})
    stopping = plan(resource(suspend=True), seen, NOW)
    assert (stopping.actions, stopping.status.phase) == ((Stop("sft", 1),), "Running")
    stopped = plan(resource(suspend=True), replace(seen, attempts={"sft": [interrupted("sft")]}), NOW)
    assert (stopped.actions, stopped.status.phase, states(stopped)["sft"]) == ((), "Suspended", "Suspended")
    resumed = plan(resource(), replace(seen, attempts={"sft": [interrupted("sft")]}), NOW)
    assert starts(resumed) == {"sft"}


def test_an_interrupted_stage_goes_on_at_once_but_not_in_a_tight_loop() -> None:
    once = [interrupted("import-model", finished=NOW)]
    assert starts(plan(resource(), Observed(attempts={"import-model": once}), NOW)) == {"import-model"}
    twice = [*once, interrupted("import-model", 2, finished=NOW)]
    decided = plan(resource(), Observed(attempts={"import-model": twice}), NOW)
    assert (decided.actions, decided.wake_at) == ((), NOW + BACKOFF_SECONDS)


@pytest.mark.parametrize("result", [StageResult(stage="import-model", artifact=LINKS["import-model"].output), None])
def test_success_without_an_artifact_is_tried_again_and_given_up(result: StageResult | None) -> None:
    lie = attempt("import-model", finished=950.0, exit_code=0, result=result)
    assert starts(plan(resource(), Observed(attempts={"import-model": [lie]}), NOW)) == {"import-model"}
    lies = [replace(lie, number=number) for number in range(1, 6)]
    decided = plan(resource(), Observed(attempts={"import-model": lies}), NOW)
    assert decided.status.phase == "Failed"
    assert "is not in the store" in str(decided.status.stages[0].message)


def test_an_exit_without_a_result_is_a_bug() -> None:
    silent = attempt("import-model", finished=950.0, exit_code=1)
    decided = plan(resource(), Observed(attempts={"import-model": [silent]}), NOW)
    assert decided.status.phase == "Failed"
    assert "exited with code 1" in str(decided.status.stages[0].message)


def test_a_condition_keeps_its_time_until_it_changes() -> None:
    first = plan(resource(), Observed(), NOW).status
    later = plan(resource(), Observed(status=first, artifacts=committed(*ALL)), NOW + 60).status
    times = {c.type: c.last_transition_time for c in later.conditions}
    assert times["Valid"] == "1970-01-01T00:16:40Z"
    assert times["Succeeded"] == times["Progressing"] == "1970-01-01T00:17:40Z"
    assert all(condition.observed_generation == 3 for condition in later.conditions)


def test_a_spec_that_breaks_a_rule_starts_nothing_and_says_which() -> None:
    run = resource(ppo={"batchSize": 8, "microBatchSize": 3})
    decided = plan(run, Observed(attempts={"import-model": [attempt("import-model")]}), NOW)
    assert (decided.actions, decided.status.phase) == ((Stop("import-model", 1),), "Running")
    decided = plan(run, Observed(), NOW)
    assert (decided.actions, decided.status.phase) == ((), "Failed")
    assert holds(decided.status) == {"StoreReady", "Failed"}
    valid = next(condition for condition in decided.status.conditions if condition.type == "Valid")
    assert "spec.ppo.microBatchSize: 3" in valid.message


SHAPE: dict[str, float] = {
    "hidden": 64, "layers": 4, "heads": 4, "kv_heads": 4, "head_size": 16, "intermediate": 128, "mlp_matrices": 3,
    "vocabulary": 100, "positions": 1024, "tied": 0,
}  # fmt: skip


def test_what_the_imported_model_cannot_do_ends_the_run_before_anything_is_trained() -> None:
    run = resource(lora={"layers": "top:5"})
    links = chain(run, {})
    imported = {str(link.output): {} for link in links[1:5]}
    decided = plan(run, Observed(artifacts=imported | {str(links[0].output): SHAPE}), NOW)
    assert (decided.actions, decided.status.phase) == ((), "Failed")
    failed_because = next(each for each in decided.status.conditions if each.type == "Failed")
    assert (failed_because.reason, "has 4 layers" in failed_because.message) == ("User", True)
    assert starts(plan(run, Observed(artifacts=imported | {str(links[0].output): SHAPE | {"layers": 5}}), NOW))


def condition_of(status: RunStatus, kind: str) -> tuple[str, str, str]:
    found = next(each for each in status.conditions if each.type == kind)
    return found.status, found.reason, found.message


def test_a_model_that_cannot_fit_ends_the_run_before_a_gpu_is_asked_for() -> None:
    run = resource(sft={"batchSize": 64, "microBatchSize": 64, "sequenceLength": 1024})
    links = chain(run, {})
    big = SHAPE | {"hidden": 8192.0, "intermediate": 32768.0, "layers": 80.0, "heads": 64.0, "kv_heads": 64.0}
    imported = {str(link.output): {} for link in links[1:5]} | {str(links[0].output): big | {"head_size": 128.0}}
    decided = plan(run, Observed(artifacts=imported), NOW)
    assert (decided.actions, decided.status.phase) == ((), "Failed")
    assert condition_of(decided.status, "Failed")[:2] == ("True", "OutOfMemory")
    assert condition_of(decided.status, "FitsInMemory")[:2] == ("False", "TooLarge")
    assert decided.status.budget


def test_nothing_starts_while_the_store_is_away_and_a_success_is_not_doubted() -> None:
    result = StageResult(stage="import-model", artifact=LINKS["import-model"].output)
    done = attempt("import-model", finished=950.0, exit_code=0, result=result)
    away = Observed(attempts={"import-model": [done]}, store_problem="no answer")
    decided = plan(resource(), away, NOW)
    assert (decided.actions, decided.status.phase) == ((), "Running")
    assert condition_of(decided.status, "StoreReady") == ("False", "Unavailable", "no answer")
    assert condition_of(decided.status, "Progressing") == ("True", "StoreUnavailable", "no answer")
    assert decided.wake_at is not None
    assert decided.wake_at > NOW
    assert stops(plan(resource(True), replace(away, attempts={"sft": [attempt("sft")]}), NOW)) == {"sft"}


def test_a_pod_that_waits_for_a_node_is_pending_until_it_runs() -> None:
    waits = Hold("Unschedulable", "0/3 nodes are available")
    seen = Observed(attempts={"import-model": [attempt("import-model", job="run--import-model-1", held=waits)]})
    decided = plan(resource(), seen, NOW)
    assert (decided.status.phase, decided.status.stages[0].state) == ("Pending", "Pending")
    assert decided.status.stages[0].job == "run--import-model-1"
    assert condition_of(decided.status, "Progressing") == (
        "True", "Unschedulable", "import-model: 0/3 nodes are available",
    )  # fmt: skip
    stopping = plan(resource(suspend=True), seen, NOW)
    assert (stopping.actions, stopping.status.phase) == ((Stop("import-model", 1),), "Pending")


def test_one_pod_that_waits_does_not_hide_one_that_runs() -> None:
    waiting = attempt("import-prompts", held=Hold("Unschedulable", "no node"))
    seen = Observed(
        artifacts=committed("import-model"),
        attempts={"import-sft": [attempt("import-sft")], "import-prompts": [waiting]},
    )
    decided = plan(resource(), seen, NOW)
    assert decided.status.phase == "Running"
    assert condition_of(decided.status, "Progressing") == ("True", "Running", "import-sft")


def test_a_stage_that_can_never_be_made_fails_the_run() -> None:
    decided = plan(resource(), Observed(refused={"import-model": "no such field"}), NOW)
    assert (decided.actions, decided.status.phase) == ((), "Failed")
    assert condition_of(decided.status, "Failed") == ("True", "User", "import-model: no such field")


def test_a_stage_that_cannot_be_made_now_is_tried_again() -> None:
    decided = plan(resource(), Observed(held={"import-model": Hold("Denied", "quota")}), NOW)
    assert (starts(decided), decided.status.phase) == ({"import-model"}, "Pending")
    assert condition_of(decided.status, "Progressing") == ("True", "Denied", "import-model: quota")
    assert decided.wake_at == NOW + 30


def test_a_deadline_counts_from_the_asking_and_not_while_suspended() -> None:
    run = resource(activeDeadlineSeconds=60)
    seen = Observed(attempts={"import-model": [attempt("import-model", started=NOW)]}, asked_at=NOW)
    before = plan(run, seen, NOW + 59)
    assert (before.actions, before.wake_at) == ((), NOW + 60)
    after = plan(run, seen, NOW + 60)
    assert (after.actions, after.status.phase) == ((Stop("import-model", 1),), "Running")
    ended = replace(seen, attempts={"import-model": [interrupted("import-model")]})
    assert condition_of(plan(run, ended, NOW + 60).status, "Failed")[:2] == ("True", "DeadlineExceeded")
    suspended = resource(suspend=True, activeDeadlineSeconds=60)
    assert plan(suspended, ended, NOW + 60).status.phase == "Suspended"
    assert plan(run, replace(ended, artifacts=committed(*ALL)), NOW + 60).status.phase == "Succeeded"


def test_a_new_ask_is_later_than_every_attempt_before_it_whatever_the_clocks_say() -> None:
    ahead = [attempt("import-model", started=NOW + 500)]
    first = asked_at(resource(), None, [], NOW + 0.7)
    assert first == NOW
    published = plan(resource(), Observed(asked_at=first), NOW).status
    assert asked_at(resource(), published, ahead, NOW + 99) == first
    suspended = plan(resource(suspend=True), Observed(asked_at=first, status=published), NOW + 50).status
    assert asked_at(resource(suspend=True), suspended, ahead, NOW + 99) == first
    assert asked_at(resource(), suspended, ahead, NOW + 99) == NOW + 501
    assert asked_at(resource(), suspended, [], NOW + 99) == NOW + 99


def test_an_end_is_final_until_the_run_is_resumed() -> None:
    ended = plan(resource(), Observed(artifacts=committed(*ALL)), NOW).status
    assert at_rest(ended, 3, False, None, NOW + 1) == Plan((), ended)
    suspended = ended.model_copy(update={"suspend": True})
    assert at_rest(ended, 3, True, None, NOW + 1) == Plan((), suspended)
    assert at_rest(suspended, 3, False, None, NOW + 1) is None
    assert at_rest(None, 3, False, None, NOW) is None
    running = plan(resource(), Observed(), NOW).status
    assert at_rest(running, 3, False, None, NOW) is None


def test_a_run_that_ended_is_deleted_when_its_time_is_up() -> None:
    ended = plan(resource(), Observed(artifacts=committed(*ALL)), NOW).status
    assert at_rest(ended, 3, False, 60, NOW + 59) == Plan((), ended, NOW + 60)
    assert at_rest(ended, 3, False, 60, NOW + 60) == Plan((Delete(),), ended)


attempts_of = st.lists(st.sampled_from(["running", "interrupted", "success", *FAILURES]), max_size=4)


@st.composite
def observations(draw: st.DrawFn) -> Observed:
    """Anything that could be seen, sense or not; at most one attempt of a stage runs, the last."""
    attempts: dict[str, list[Attempt]] = {}
    for stage in ALL:
        made = []
        for number, outcome in enumerate(draw(attempts_of), 1):
            if outcome == "running":
                made.append(attempt(stage, number))
                break
            finished = draw(st.floats(900, 1100))
            if outcome == "interrupted":
                made.append(interrupted(stage, number, finished))
            elif outcome == "success":
                result = StageResult(stage=stage, artifact=LINKS[stage].output)
                made.append(attempt(stage, number, finished=finished, exit_code=0, result=result))
            else:
                made.append(failed(stage, outcome, number, finished))  # type: ignore[arg-type]
        attempts[stage] = made
    return Observed(
        artifacts=committed(*draw(st.sets(st.sampled_from(ALL)))),
        attempts=attempts,
        asked_at=draw(st.sampled_from([0.0, 905.0])),
    )


@settings(max_examples=200, deadline=None)
@given(observations(), st.booleans(), st.floats(900, 2000))
def test_whatever_is_seen_the_plan_is_sound(seen: Observed, suspend: bool, now: float) -> None:
    decided = plan(resource(suspend), seen, now)
    running = {name for name, made in seen.attempts.items() if made and made[-1].finished is None}
    for action in decided.actions:
        if isinstance(action, Start):
            assert action.link.name not in running
            assert all(str(ref) in seen.artifacts for ref in action.link.inputs.values())
            assert str(action.link.output) not in seen.artifacts
            assert action.number > len(seen.attempts[action.link.name])
        else:
            assert isinstance(action, Stop)
            assert action.stage in running
    gpu = {stage.name for stage in STAGES if stage.gpu}
    assert len(gpu & starts(decided)) <= (0 if gpu & running else 1)
    if suspend:
        assert not starts(decided)
        assert stops(decided) == running
    assert plan(resource(suspend), seen, now) == decided
    again = plan(resource(suspend), replace(seen, status=decided.status), now)
    assert again == decided
    if decided.status.phase in ("Failed", "Succeeded", "Suspended"):
        assert not running
        assert not decided.actions
    elif not decided.actions and not running:
        assert decided.wake_at is not None  # never waits for nothing


class AnyRun(RuleBasedStateMachine):
    """A world that starts what the plan starts, and in which stages end in every way, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.artifacts: dict[str, dict[str, float]] = {}
        self.attempts: dict[str, list[Attempt]] = {name: [] for name in ALL}
        self.troubles = 0

    @property
    def seen(self) -> Observed:
        return Observed(artifacts=self.artifacts, attempts=self.attempts)

    def running(self) -> list[str]:
        return [name for name, made in self.attempts.items() if made and made[-1].finished is None]

    def end(self, stage: str, result: StageResult | None, code: int) -> None:
        last = self.attempts[stage][-1]
        self.attempts[stage][-1] = replace(last, finished=self.now, result=result, exit_code=code)

    def apply(self, suspend: bool = False) -> Plan:
        decided = plan(resource(suspend), self.seen, self.now)
        for action in decided.actions:
            if isinstance(action, Start):
                link: Link = action.link
                self.attempts[link.name].append(Attempt(action.number, link.output.digest, self.now))
            elif isinstance(action, Stop):
                self.end(action.stage, None, EXIT_INTERRUPTED)
        self.now = max(self.now, decided.wake_at or 0.0)
        return decided

    @initialize()
    def begin(self) -> None:
        self.apply()

    @rule(suspend=st.booleans())
    def step(self, suspend: bool) -> None:
        self.apply(suspend)

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def succeed(self, data: st.DataObject) -> None:
        stage = data.draw(st.sampled_from(self.running()))
        self.artifacts[str(LINKS[stage].output)] = {}
        self.end(stage, StageResult(stage=stage, artifact=LINKS[stage].output), 0)

    @precondition(lambda self: self.running() and self.troubles < 4)
    @rule(data=st.data(), failure=st.sampled_from(["interrupted", "infrastructure"]))
    def trouble(self, data: st.DataObject, failure: str) -> None:
        stage = data.draw(st.sampled_from(self.running()))
        self.troubles += 1
        if failure == "interrupted":
            self.end(stage, None, EXIT_INTERRUPTED)
        else:
            reason = StageFailure(failure="infrastructure", message="the store is away")
            self.end(stage, StageResult(stage=stage, failure=reason), 4)

    @precondition(lambda self: self.artifacts)
    @rule(data=st.data())
    def lose_an_artifact(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.artifacts)))
        kind, _, digest = key.partition("/")
        assert ArtifactRef.model_validate({"kind": kind, "digest": digest})
        stage = next(name for name, link in LINKS.items() if str(link.output) == key)
        if not any(key in map(str, LINKS[busy].inputs.values()) for busy in self.running()):
            del self.artifacts[key]
            self.attempts[stage] = []  # its record went with it

    @invariant()
    def never_two_attempts_of_one_stage(self) -> None:
        for made in self.attempts.values():
            assert sum(each.finished is None for each in made) <= 1
            assert [each.number for each in made] == sorted({each.number for each in made})

    def teardown(self) -> None:
        """Left alone, with stages that succeed, every run ends well in a bounded number of turns."""
        for _ in range(60):
            decided = self.apply()
            if decided.status.phase == "Succeeded":
                return
            for stage in self.running():
                self.artifacts[str(LINKS[stage].output)] = {}
                self.end(stage, StageResult(stage=stage, artifact=LINKS[stage].output), 0)
        raise AssertionError(f"did not end: {decided.status}")


AnyRun.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestAnyRun = AnyRun.TestCase
