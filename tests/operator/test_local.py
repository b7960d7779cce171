"""The local runner: real processes, a real store, and everything that can end a process."""

import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rlhf_api.errors import UserError
from rlhf_api.run import RunStatus
from rlhf_api.stage import StageConfig
from rlhf_operator.plan import MAX_ATTEMPTS
from rlhf_operator.stages import STAGES
from rlhf_store.artifacts import open_artifacts

if TYPE_CHECKING:
    from conftest import Bench  # type: ignore[import-not-found]

SHORT = ["import-model", "import-prompts", "reward", "ppo", "evaluate"]
RL = SHORT[2:]


def hurried_clock() -> Iterator[float]:
    """Three seconds pass with every look, so that no test waits for a retry."""
    return itertools.count(1_000_000.0, 3.0)  # type: ignore[return-value]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids(bench: "Bench") -> list[int]:
    return [int(line.split()[1]) for line in bench.script.with_suffix(".log").read_text().splitlines()]


def test_a_chain_runs_is_reused_and_runs_again_where_it_changed(bench: "Bench") -> None:
    status = bench.run(data=bench.sources, reward={})
    assert status.phase == "Succeeded"
    assert bench.states(status) == {stage.name: "Succeeded" for stage in STAGES}
    assert sorted(bench.began()) == sorted(stage.name for stage in STAGES)

    bench.forget()
    again = bench.run(data=bench.sources, reward={})
    assert set(bench.states(again).values()) == {"Reused"}
    assert bench.began() == []
    assert again.stages[-1].metrics["loss"] == 0.5

    changed = bench.run(data=bench.sources, reward={}, ppo={"epochs": 2})
    assert changed.phase == "Succeeded"
    assert bench.began() == ["ppo", "evaluate"]
    assert {stage for stage, state in bench.states(changed).items() if state == "Succeeded"} == {"ppo", "evaluate"}


def test_changed_bytes_of_a_source_are_imported_again(bench: "Bench") -> None:
    bench.have(*SHORT)
    (bench.folder / "reviews.csv").write_text("text,label\ngood,1\nbad,0\n")
    assert bench.run().phase == "Succeeded"
    assert bench.began() == ["import-prompts", "ppo", "evaluate"]


@pytest.mark.parametrize("failure", ["user", "gate", "bug"])
def test_a_failure_that_no_retry_mends_ends_the_run(bench: "Bench", failure: str) -> None:
    bench.misbehave(import_model=[failure])
    status = bench.run()
    assert (status.phase, bench.began()) == ("Failed", ["import-model"])
    assert status.stages[0].message == f"import-model went {failure}"


@pytest.mark.parametrize(("word", "text"), [("crash", "the sky fell"), ("segfault", "died of SIGSEGV")])
def test_a_process_that_dies_without_a_result_is_a_bug_with_its_last_words(
    bench: "Bench", word: str, text: str
) -> None:
    bench.misbehave(import_model=[word])
    message = str(bench.run().stages[0].message)
    assert text in message
    assert "import-model/1/stage.log" in message


def test_what_a_retry_can_mend_is_retried_and_what_is_committed_stays(bench: "Bench") -> None:
    bench.have("import-model")
    bench.misbehave(import_prompts=["infrastructure", "killed", "lie"])
    status = bench.run(clock=hurried_clock().__next__)
    assert status.phase == "Succeeded"
    assert sorted(bench.began()) == sorted([*["import-prompts"] * 4, *RL])
    assert next(stage for stage in status.stages if stage.name == "import-prompts").attempt == 4


@pytest.mark.parametrize(
    ("word", "counted", "failure", "told"),
    [
        ("starved", "pgfault 9\noom_kill 3\n", "outOfMemory", "out of host memory"),
        ("killed", "pgfault 9\noom_kill 3\n", "infrastructure", "someone other than the kernel's memory killer"),
        ("killed", None, "infrastructure", "someone other than the kernel's memory killer"),
        ("killed", "pgfault 9\n", "infrastructure", "someone other than the kernel's memory killer"),
        ("killed", "no counts at all\n", "infrastructure", "someone other than the kernel's memory killer"),
    ],
)
def test_a_killed_process_ran_out_of_memory_only_if_the_kernel_says_so(
    bench: "Bench", monkeypatch: pytest.MonkeyPatch, word: str, counted: str | None, failure: str, told: str
) -> None:
    vmstat = bench.script.with_suffix(".vmstat")
    if counted is not None:
        vmstat.write_text(counted)
    monkeypatch.setattr("rlhf_operator.processes.VMSTAT", vmstat)
    bench.misbehave(import_model=[word])
    shown: list[RunStatus] = []
    runner = bench.runner(hurried_clock().__next__)
    assert runner.run(lambda status, _: shown.append(status)).phase == "Succeeded"
    failures = [s.stages[0] for s in shown if s.stages[0].failure]
    assert {stage.failure for stage in failures} == {failure}
    assert told in str(failures[0].message)


def test_a_stage_that_always_runs_out_of_memory_is_given_up(bench: "Bench", monkeypatch: pytest.MonkeyPatch) -> None:
    counts = itertools.count()
    monkeypatch.setattr("rlhf_operator.processes.memory_kills", lambda _: next(counts))
    bench.misbehave(import_model=["killed"] * 9)
    status = bench.run(clock=hurried_clock().__next__)
    assert status.phase == "Failed"
    assert bench.began() == ["import-model"] * MAX_ATTEMPTS["outOfMemory"]
    assert "memory" in str(status.stages[0].message)
    assert [c.reason for c in status.conditions if c.type == "Failed"] == ["OutOfMemory"]


def test_a_stage_out_of_memory_is_given_less_to_hold_until_it_fits(bench: "Bench") -> None:
    ppo = {"batchSize": 4, "microBatchSize": 4, "rolloutBatchSize": 2}
    bench.have(*SHORT[:3])
    bench.misbehave(ppo=["outOfMemory"] * 3)
    status = bench.run(clock=hurried_clock().__next__, ppo=ppo)
    assert status.phase == "Succeeded"
    shown = next(stage for stage in status.stages if stage.name == "ppo")
    assert shown.lowered == "microBatchSize 1 instead of 4 and rolloutBatchSize 1 instead of 2"
    folder = bench.home.run_folder("tiny")
    given = [
        StageConfig.model_validate_json((folder.attempt_path("ppo", number) / "stage.json").read_bytes())
        for number in (1, 2, 3, 4)
    ]
    ppos = [each.settings.ppo for each in given if each.settings.ppo]
    sizes = [(each.micro_batch_size, each.rollout_batch_size) for each in ppos]
    assert sizes == [(4, 2), (2, 2), (1, 2), (1, 1)]
    assert {str(each.output) for each in given} == {shown.artifact}

    bench.forget()
    again = bench.run(ppo=ppo)
    assert bench.states(again)["ppo"] == "Reused"
    assert bench.began() == []


def test_a_run_that_may_be_shortened_ends_with_the_artifacts_of_the_shorter_one(bench: "Bench") -> None:
    ppo = {"batchSize": 1, "microBatchSize": 1, "responseTokens": 128}
    bench.have(*SHORT[:3])
    bench.misbehave(ppo=["outOfMemory"])
    status = bench.run(clock=hurried_clock().__next__, ppo=ppo, gpu={"shortenOnOutOfMemory": True})
    assert status.phase == "Succeeded"
    shown = next(stage for stage in status.stages if stage.name == "ppo")
    assert (shown.state, shown.lowered) == ("Succeeded", "responseTokens 64 instead of 128")
    bench.forget()
    shorter = bench.run(ppo={**ppo, "responseTokens": 64})
    assert set(bench.states(shorter).values()) <= {"Reused", "Skipped"}
    assert bench.began() == []


def test_running_again_keeps_what_was_made_at_a_shorter_length(bench: "Bench") -> None:
    run = {
        "ppo": {"batchSize": 1, "microBatchSize": 1, "responseTokens": 128},
        "gpu": {"shortenOnOutOfMemory": True},
    }
    bench.have(*SHORT[:3])
    bench.misbehave(ppo=["outOfMemory"], evaluate=["user"])
    assert bench.run(clock=hurried_clock().__next__, **run).phase == "Failed"
    bench.misbehave()
    assert bench.run(**run).phase == "Succeeded"
    assert bench.began() == ["evaluate"]


def test_running_again_after_a_failure_continues(bench: "Bench") -> None:
    bench.have(*SHORT[:2])
    bench.misbehave(reward=["user"])
    assert bench.run().phase == "Failed"
    assert bench.run().phase == "Succeeded"
    assert bench.began() == ["reward", *RL]


def test_ctrl_c_saves_a_checkpoint_and_running_again_continues_from_it(bench: "Bench") -> None:
    bench.have(*SHORT[:3])
    bench.misbehave(ppo=["slow"])
    driver = bench.drive()
    bench.wait_for_step("ppo", 20)
    driver.send_signal(signal.SIGINT)
    _, errors = driver.communicate(timeout=30)
    assert driver.returncode == 130
    assert "continues" in errors
    status = bench.home.run_folder("tiny").need_status()
    assert (status.phase, bench.states(status)["ppo"]) == ("Suspended", "Suspended")
    assert not any(map(alive, pids(bench)))

    finished = bench.run()
    assert finished.phase == "Succeeded"
    assert next(stage.metrics for stage in finished.stages if stage.name == "ppo")["resumedFrom"] >= 20


def test_a_second_ctrl_c_kills_a_stage_that_does_not_listen(bench: "Bench") -> None:
    bench.misbehave(import_model=["deaf"])
    driver = bench.drive()
    bench.wait_for_step("import-model", 0)
    driver.send_signal(signal.SIGINT)
    bench.wait_for_step("import-model", 30)  # it goes on
    driver.send_signal(signal.SIGINT)
    driver.communicate(timeout=30)
    assert driver.returncode == 130
    assert not any(map(alive, pids(bench)))


def test_a_killed_runner_leaves_no_orphan_and_running_again_continues(bench: "Bench") -> None:
    bench.have(*SHORT[:3])
    bench.misbehave(ppo=["slow"])
    driver = bench.drive()
    bench.wait_for_step("ppo", 5)
    driver.kill()
    driver.communicate(timeout=30)
    bench.wait_for(lambda: not any(map(alive, pids(bench))))
    finished = bench.run()
    assert finished.phase == "Succeeded"
    ppo = next(stage for stage in finished.stages if stage.name == "ppo")
    assert (ppo.attempt, ppo.metrics["resumedFrom"] >= 5) == (2, True)


def test_an_orphan_that_will_not_end_is_ended_before_the_run_continues(
    bench: "Bench", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_operator.run_folder.ORPHAN_GRACE_SECONDS", 0.3)
    bench.misbehave(import_model=["deaf"])
    driver = bench.drive()
    bench.wait_for_step("import-model", 0)
    driver.kill()
    driver.communicate(timeout=30)
    orphan = pids(bench)[0]
    bench.have("evaluate")  # nothing is left to do but that
    assert alive(orphan)
    assert bench.run().phase == "Succeeded"
    assert not alive(orphan)


def test_one_run_is_driven_by_one_process(bench: "Bench") -> None:
    bench.misbehave(import_model=["slow"])
    driver = bench.drive()
    try:
        bench.wait_for_step("import-model", 0)
        with pytest.raises(UserError, match=rf"tiny: process {driver.pid} is running this run already"):
            bench.run()
    finally:
        driver.send_signal(signal.SIGINT)
        driver.communicate(timeout=30)


def test_a_suspended_run_starts_nothing(bench: "Bench") -> None:
    assert bench.run(suspend=True).phase == "Suspended"
    assert bench.began() == []


def test_two_runs_of_equal_settings_share_their_artifacts(bench: "Bench") -> None:
    bench.have(*SHORT)
    other: dict[str, Any] = bench.document()
    other["metadata"] = {"name": "other"}
    runner = bench.runner()
    runner = type(runner)(
        runner.run_resource.model_validate(other), bench.home.default_store(), bench.home, bench.command
    )
    assert set(bench.states(runner.run(lambda *_: None)).values()) <= {"Reused", "Skipped"}
    assert bench.began() == []
    assert bench.home.run_names() == ["other"]


def test_training_has_the_machine_to_itself(bench: "Bench") -> None:
    bench.have("import-model")
    bench.misbehave(import_prompts=["infrastructure"])  # its retry is due while reward runs
    assert bench.run(clock=lambda: time.time() * 30).phase == "Succeeded"
    spans = {}
    for name in SHORT[1:]:
        made = bench.home.run_folder("tiny").attempts(name)[-1]
        assert made.finished is not None
        spans[name] = (made.started, made.finished)
    for name in RL:
        begin, end = spans.pop(name)
        assert all(other[1] <= begin or other[0] >= end for other in spans.values()), name


def test_a_finished_stage_leaves_no_working_folder_but_its_log(bench: "Bench") -> None:
    bench.have(*SHORT[:3])
    bench.run()
    folder = bench.home.run_folder("tiny")
    assert not folder.work("ppo").exists()
    assert (folder.attempt_path("ppo", 1) / "stage.log").exists()
    manifest = open_artifacts(folder.store())
    assert [each.kind for each in manifest.list("policy")] == ["policy"]


def test_stages_share_the_cores_unless_the_person_says_otherwise(
    bench: "Bench", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    bench.misbehave(import_model=["environment"])
    cores = len(os.sched_getaffinity(0))
    assert str(bench.run().stages[0].message).endswith(f"OMP_NUM_THREADS={cores}")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    bench.misbehave(import_model=["environment"])
    assert str(bench.run().stages[0].message).endswith("OMP_NUM_THREADS=7")
