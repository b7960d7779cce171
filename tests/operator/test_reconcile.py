"""One run reconciled, against a small cluster in memory and a real file store."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_world import NOW, STAGES_OF_RUN, Document, World, merged

from rlhf_api.names import (
    ANNOTATION_OUTCOME,
    ANNOTATION_STOPPED,
    EXIT_INTERRUPTED,
    LABEL_RUN,
    LABEL_STAGE,
    STAGE_NAMES,
)
from rlhf_api.stage import Progress, StageFailure, StageResult
from rlhf_operator.attempts import attempts_of, outcomes_to_keep
from rlhf_operator.conditions import stamp
from rlhf_operator.kubernetes_api import ApiError, Conflict, Denied, Invalid
from rlhf_operator.plan import Attempt
from rlhf_operator.reconcile import merge_patch
from rlhf_operator.stages import STAGES


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_run_goes_from_stage_to_stage_with_one_job_each(world: World) -> None:
    world.apply()
    world.finish()
    assert list(world.cluster.jobs_) == [f"run--{stage}-1" for stage in STAGES_OF_RUN]
    assert world.status().phase == "Succeeded"
    assert set(world.states().values()) == {"Succeeded"}
    ppo = next(stage for stage in world.status().stages if stage.name == "ppo")
    assert (ppo.attempt, ppo.job, ppo.metrics) == (1, "run--ppo-1", {"loss": 0.5})
    assert world.status().observed_generation == 1
    for stage in STAGES_OF_RUN:
        told = [event.reason for event in world.cluster.events if event.message.startswith(f"{stage}:")]
        assert told == ["StageStarted", "StageSucceeded"]
    assert world.reasons()[-1] == "RunSucceeded"


def test_status_says_where_the_artifacts_are(world: World) -> None:
    world.apply(objectStore={"bucket": "mine", "prefix": "a", "endpoint": "http://there", "credentialsSecret": "keys"})
    world.settle()
    place = {"url": "s3://mine/a", "endpoint": "http://there", "credentialsSecret": "keys"}
    assert world.cluster.runs_["run"]["status"]["store"] == place


def _outcome(world: World) -> Any:
    """Everything that must not depend on where an operator died."""
    status = world.status().model_dump(exclude={"store"})  # each world has a folder of its own
    for condition in status["conditions"]:
        condition.pop("last_transition_time")
    jobs = {name: job["metadata"]["labels"] for name, job in world.cluster.jobs_.items()}
    return status, jobs, sorted(str(manifest.ref) for manifest in world.artifacts.list())


def _failing_once(world: World) -> None:
    """A run with a failure, a suspension and a resumption in it."""
    world.apply()
    world.settle()
    world.fail("import-model", "outOfMemory")
    world.settle()
    world.cluster.pods_.clear()
    world.settle()
    world.cluster.now += 6
    world.settle()
    world.apply(suspend=True)
    world.settle()
    world.cluster.end_stopped()
    world.settle()
    world.cluster.now += 5
    world.apply()
    world.finish()


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_operator_that_dies_at_any_write_is_followed_as_if_it_had_not(tmp_path: Path, after: bool) -> None:
    whole = World(tmp_path / "whole")
    _failing_once(whole)
    wanted = _outcome(whole)
    assert whole.status().phase == "Succeeded"
    deaths = 0
    for turn in range(1, whole.cluster.writes + 1):
        world = World(tmp_path / f"{after}-{turn}")
        world.cluster.crash_at, world.cluster.crash_after = turn, after
        _failing_once(world)
        deaths += world.deaths
        assert _outcome(world) == wanted, f"died {'after' if after else 'before'} write {turn}"
    assert deaths == whole.cluster.writes


def test_a_status_write_on_old_news_is_refused_and_nothing_is_started(world: World) -> None:
    world.apply()
    real = world.cluster.run

    def stale(namespace: str, name: str) -> Document | None:
        found = real(namespace, name)
        world.cluster.touch("run")
        return found

    world.cluster.run = stale  # type: ignore[method-assign]
    with pytest.raises(Conflict):
        world.operator.reconcile("default", "run")
    assert not world.cluster.jobs_
    world.cluster.run = real  # type: ignore[method-assign]
    world.settle()
    assert list(world.cluster.jobs_) == ["run--import-model-1"]


def test_a_job_that_is_not_seen_yet_is_not_made_twice(world: World) -> None:
    world.apply()
    world.settle()
    world.cluster.jobs = lambda namespace, run: []  # type: ignore[method-assign]
    world.look()
    world.look()
    assert list(world.cluster.jobs_) == ["run--import-model-1"]
    assert world.conditions()["Progressing"][1] != "NameTaken"


def test_a_job_of_somebody_else_by_that_name_is_waited_for_and_told(world: World) -> None:
    owner = {"kind": "RLHFRun", "name": "other", "uid": "other", "controller": True}
    theirs = {"name": "run--import-model-1", "labels": {LABEL_RUN: "other"}, "ownerReferences": [owner]}
    world.cluster.jobs_["run--import-model-1"] = {"metadata": theirs, "spec": {}}
    world.apply()
    world.settle()
    assert world.states()["import-model"] == "Pending"
    _, reason, message = world.conditions()["Progressing"]
    assert reason == "NameTaken"
    assert "the Job run--import-model-1 of RLHFRun other (uid other)" in message
    theirs["ownerReferences"] = []
    world.look()
    world.settle()
    assert "the Job run--import-model-1 of nobody" in world.conditions()["Progressing"][2]
    world.cluster.jobs_.clear()
    world.finish()
    assert world.status().phase == "Succeeded"


def test_nothing_is_written_while_nothing_changes(world: World) -> None:
    world.apply()
    world.settle()
    world.cluster.start_pods()
    world.settle()
    before = world.state_of_world()
    for _ in range(5):
        world.cluster.now += 30
        world.look()
    assert world.state_of_world() == before


def test_suspend_stops_the_pod_keeps_the_record_and_resume_starts_the_next_attempt(world: World) -> None:
    world.apply()
    world.settle()
    world.cluster.start_pods()
    world.apply(suspend=True)
    world.settle()
    job = world.cluster.jobs_["run--import-model-1"]
    assert job["spec"]["activeDeadlineSeconds"] == 1
    assert "suspend" not in job["spec"]  # which a queue would take as its own
    assert world.status().phase == "Running"
    world.cluster.end_stopped()
    world.settle()
    assert (world.status().phase, world.states()["import-model"]) == ("Suspended", "Suspended")
    world.cluster.now += 60
    world.apply()
    world.settle()
    assert set(world.cluster.jobs_) == {"run--import-model-1", "run--import-model-2"}
    world.finish()
    assert world.status().phase == "Succeeded"
    assert {"RunSuspended", "RunResumed"} <= set(world.reasons())


def test_a_failed_run_is_forgiven_when_it_is_suspended_and_resumed(world: World) -> None:
    world.apply()
    world.settle()
    world.fail("import-model", "user")
    world.settle()
    assert world.status().phase == "Failed"
    assert world.conditions()["Failed"] == ("True", "User", "import-model: import-model broke")
    assert {"StageFailed", "RunFailed"} <= set(world.reasons())
    world.cluster.now += 60
    world.apply(ttlSecondsAfterFinished=3600)  # a change that asks for nothing
    world.settle()
    assert (world.status().phase, world.status().observed_generation) == ("Failed", 2)
    world.apply(suspend=True)
    world.settle()
    world.apply()
    world.finish()
    assert world.status().phase == "Succeeded"


def test_failures_are_retried_after_a_while_and_told(world: World) -> None:
    world.apply()
    world.settle()
    world.fail("import-model", "infrastructure")
    world.settle()
    assert len(world.cluster.jobs_) == 1
    world.cluster.now += 6
    world.settle()
    assert len(world.cluster.jobs_) == 2
    assert "Retrying" in world.reasons()
    assert world.status().stages[0].attempt == 2


def test_a_pod_killed_for_its_memory_is_followed_by_one_that_holds_less_at_the_same_address(world: World) -> None:
    run = {"evaluate": {"batchSize": 8}}
    world.apply(**run)
    for _ in range(4):
        world.settle()
        world.succeed(*(stage for stage in STAGE_NAMES if stage != "evaluate"))
    world.settle()
    world.cluster.start_pods()
    first = world.job("evaluate")
    world.cluster.end_pod(first, 137, "", "OOMKilled")
    world.settle()
    world.cluster.now += 6
    world.settle()
    before, after = world.config(first), world.config(world.job("evaluate"))
    assert after.settings.evaluate is not None
    assert (after.settings.evaluate.batch_size, after.output) == (4, before.output)
    told = next(event.message for event in world.cluster.events if event.reason == "Retrying")
    assert told.startswith("evaluate: attempt 2 with batchSize 4 instead of 8, after: attempt 1 failed")
    world.finish()
    assert world.status().phase == "Succeeded"
    assert world.status().stages[-1].lowered == "batchSize 4 instead of 8"


def test_what_a_pod_said_as_it_ended_is_known_when_it_is_gone(world: World) -> None:
    """Drained again and again, and each time deleted at once: no attempt counts as failed."""
    world.apply()
    for _ in range(8):
        world.settle()
        world.cluster.start_pods()
        world.cluster.end_pod(world.job("import-model"), EXIT_INTERRUPTED, "")
        world.settle()
        world.cluster.pods_.clear()
        world.settle()
        world.cluster.now += 301
    world.finish()
    assert world.status().phase == "Succeeded"
    assert not set(world.reasons()) & {"StageFailed", "Retrying"}


def test_a_pod_that_is_gone_before_its_job_has_ended_was_heard(world: World) -> None:
    world.apply()
    world.settle()
    job = world.job("import-model")
    world.cluster.start_pods()
    world.cluster.end_pod(job, EXIT_INTERRUPTED, "")
    conditions = world.cluster.jobs_[job["metadata"]["name"]]["status"].pop("conditions")
    world.settle()
    world.cluster.pods_.clear()
    world.cluster.jobs_[job["metadata"]["name"]]["status"]["conditions"] = conditions
    world.restart()
    world.settle()
    assert world.status().stages[0].attempt == 2
    assert "StageFailed" not in world.reasons()


def test_lengths_that_memory_left_stay_when_pods_are_gone_and_when_the_run_is_resumed(world: World) -> None:
    ppo = {"batchSize": 8, "microBatchSize": 1, "rolloutBatchSize": 8, "responseTokens": 128}
    spec: Document = {"gpu": {"shortenOnOutOfMemory": True}, "ppo": ppo}
    world.apply(**spec)
    for _ in range(2):
        world.settle()
        world.succeed()
    world.settle()
    while world.config(world.job("ppo")).settings.ppo.response_tokens == 128:  # type: ignore[union-attr]
        world.fail("ppo", "outOfMemory")
        world.settle()
        world.cluster.now += 6
        world.settle()
    world.cluster.pods_.clear()
    world.settle()
    job = world.job("ppo")
    assert "activeDeadlineSeconds" not in job["spec"]
    ppo = next(stage for stage in world.status().stages if stage.name == "ppo")
    assert (ppo.state, "responseTokens 64 instead of 128" in str(ppo.lowered)) == ("Running", True)

    world.succeed()
    world.settle()
    world.apply(**spec, suspend=True)
    world.settle()
    world.cluster.end_stopped()
    world.restart()
    world.settle()
    assert world.status().phase == "Suspended"
    world.cluster.now += 60
    world.apply(**spec)
    world.finish()
    assert world.status().phase == "Succeeded"
    ppo = next(stage for stage in world.status().stages if stage.name == "ppo")
    assert (ppo.state, ppo.artifact) == ("Reused", str(world.config(job).output))


def test_only_what_would_be_lost_with_the_pod_is_written_on_its_job_and_once(world: World) -> None:
    world.apply()
    world.settle()
    world.fail("import-model", "infrastructure")
    world.settle()
    kept = world.cluster.jobs_["run--import-model-1"]["metadata"]
    version = kept["resourceVersion"]
    world.cluster.pods_.clear()
    world.cluster.now += 6
    world.finish()
    assert (world.status().phase, kept["resourceVersion"]) == ("Succeeded", version)
    assert "import-model broke" in kept["annotations"][ANNOTATION_OUTCOME]
    noted = [name for name, job in world.cluster.jobs_.items() if ANNOTATION_OUTCOME in job["metadata"]["annotations"]]
    assert noted == ["run--import-model-1"]


def test_a_pod_that_no_node_takes_is_pending_and_goes_on_when_one_does(world: World) -> None:
    world.apply()
    world.settle()
    world.cluster.start_pods()
    pod = world.cluster.pods_["run--import-model-1-abcde"]
    running = pod["status"]
    why = "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector."
    unscheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": why}
    pod["status"] = {"phase": "Pending", "conditions": [unscheduled]}
    world.settle()
    assert (world.status().phase, world.states()["import-model"]) == ("Pending", "Pending")
    assert world.conditions()["Progressing"] == ("True", "Unschedulable", f"import-model: {why}")
    assert "StagePending" in world.reasons()
    pod["status"] = running
    world.settle()
    assert (world.status().phase, world.states()["import-model"]) == ("Running", "Running")
    assert world.conditions()["Progressing"] == ("True", "Running", "import-model")


def test_progress_is_read_from_the_pod(world: World) -> None:
    world.apply()
    world.settle()
    world.cluster.start_pods()
    world.cluster.pages["import-model"] = Progress(stage="import-model", step=3, total=9, metrics={"rows": 2.0})
    world.settle()
    assert (world.status().progress, world.status().stages[0].metrics) == ("3/9", {"rows": 2.0})


def test_no_pod_starts_while_the_store_is_away_and_nothing_is_lost(world: World, tmp_path: Path) -> None:
    world.apply()
    world.settle()
    world.succeed()
    world.settle()
    assert world.states()["import-model"] == "Succeeded"
    store, away, jobs = tmp_path / "store", tmp_path / "away", list(world.cluster.jobs_)
    world.succeed()
    store.rename(away)
    store.write_text("no folder")
    world.settle()
    assert world.conditions()["StoreReady"][:2] == ("False", "Unavailable")
    assert world.conditions()["Progressing"][:2] == ("True", "StoreUnavailable")
    assert (world.states()["import-model"], list(world.cluster.jobs_)) == ("Succeeded", jobs)
    world.restart()  # knows nothing but the status
    world.settle()
    assert (world.states()["import-model"], list(world.cluster.jobs_)) == ("Succeeded", jobs)
    store.unlink()
    away.rename(store)
    world.cluster.now += 20
    world.finish()
    assert [name for name in world.cluster.jobs_ if not name.endswith("-1")] == []


def test_what_stages_report_is_believed_where_only_they_have_the_credentials(world: World) -> None:
    world.apply(objectStore={"credentialsSecret": "mine"})
    world.finish()
    assert world.status().phase == "Succeeded"
    assert world.conditions()["StoreReady"][:2] == ("Unknown", "NotAsked")


def test_a_pod_template_that_makes_no_pod_fails_the_run_with_its_field(world: World) -> None:
    world.apply(placement={"podTemplate": {"containers": []}})
    world.settle()
    assert world.status().phase == "Failed"
    status, reason, message = world.conditions()["Failed"]
    assert (status, reason) == ("True", "User")
    assert message.startswith("import-model: spec.placement.podTemplate.containers: unknown field")


def test_a_job_that_the_api_server_refuses_fails_the_run_with_its_words(world: World) -> None:
    def refuse(job: Document) -> None:
        raise Invalid("Job.batch is invalid: spec.template.spec.priority: Invalid value")

    world.cluster.refuse = refuse
    world.apply()
    world.settle()
    assert "spec.template.spec.priority" in world.conditions()["Failed"][2]


def test_a_quota_holds_a_run_back_until_there_is_room(world: World) -> None:
    def refuse(job: Document) -> None:
        raise Denied("exceeded quota: count/jobs.batch=10")

    world.cluster.refuse = refuse
    world.apply()
    world.settle()
    assert world.status().phase == "Pending"
    assert world.conditions()["Progressing"] == (
        "True", "Denied", "import-model: exceeded quota: count/jobs.batch=10",
    )  # fmt: skip
    again = world.look()
    assert again is not None
    assert again - world.cluster.now <= 36
    world.cluster.refuse = lambda job: None
    world.finish()
    assert world.status().phase == "Succeeded"


def test_an_api_server_that_is_away_changes_nothing(world: World) -> None:
    def refuse(job: Document) -> None:
        raise ApiError("no answer")

    world.cluster.refuse = refuse
    world.apply()
    with pytest.raises(ApiError):
        world.operator.reconcile("default", "run")
    world.cluster.refuse = lambda job: None
    world.finish()
    assert list(world.cluster.jobs_) == [f"run--{stage}-1" for stage in STAGES_OF_RUN]


@pytest.mark.parametrize(
    "spec",
    [
        {"lora": {"targetModules": 5}},
        {"model": None},
        {"data": {"prompts": {"source": 3}}},
        {"sft": {"steps": "many"}},
        {"placement": {"tolerations": ["x"]}},
    ],
    ids=str,
)
def test_a_spec_that_is_none_is_a_failed_run_and_no_crash(world: World, spec: Document) -> None:
    world.apply(**spec)
    world.settle()
    assert world.status().phase == "Failed"
    assert world.conditions()["Valid"][:2] == ("False", "Rejected")
    assert "spec." in world.conditions()["Valid"][2]
    assert not world.cluster.jobs_


def tighten(world: World) -> None:
    """An operator comes that does not take the run's spec any more."""
    world.cluster.runs_["run"]["spec"]["lora"] = {"targetModules": 5}
    world.cluster.touch("run")
    world.restart()


def test_a_run_whose_spec_is_refused_in_its_course_stops_and_then_fails(world: World) -> None:
    world.apply()
    world.settle()
    world.succeed()
    world.settle()
    world.cluster.start_pods()
    world.settle()
    tighten(world)
    world.settle()
    assert world.cluster.active()
    assert all(job["spec"]["activeDeadlineSeconds"] == 1 for job in world.cluster.active())
    assert (world.status().phase, world.conditions()["Valid"][1]) == ("Running", "Rejected")
    world.cluster.end_stopped()
    world.settle()
    assert world.status().phase == "Failed"
    assert world.conditions()["Failed"][:2] == ("True", "User")
    assert {state for name, state in world.states().items() if name != "import-model"} == {"Waiting"}
    assert world.states()["import-model"] == "Succeeded"  # its artifact is still the run's


def test_a_run_whose_spec_is_refused_after_its_end_stays_as_it_is_until_it_is_deleted(world: World) -> None:
    world.apply(ttlSecondsAfterFinished=100)
    world.finish()
    before = world.status()
    tighten(world)
    assert world.look() == pytest.approx(world.cluster.now + 100, abs=1)
    assert world.status() == before
    world.cluster.now += 101
    world.look()
    assert not world.cluster.runs_


def test_a_run_that_was_refused_is_looked_at_anew_when_it_is_resumed(world: World) -> None:
    world.apply(lora={"targetModules": 5})
    world.settle()
    for suspend in (True, False):
        world.apply(suspend=suspend)
        world.settle()
    world.finish()
    assert world.status().phase == "Succeeded"


def test_a_status_that_another_version_wrote_is_made_anew(world: World) -> None:
    world.apply()
    world.cluster.runs_["run"]["status"] = {"phase": "Dreaming", "unheard": 1}
    world.finish()
    assert world.status().phase == "Succeeded"
    assert "unheard" not in world.cluster.runs_["run"]["status"]


def test_a_deadline_stops_the_run_and_fails_it(world: World) -> None:
    world.apply(activeDeadlineSeconds=100)
    world.settle()
    world.cluster.start_pods()
    wake = world.look()
    assert wake is not None
    assert wake <= NOW + 100
    world.cluster.now += 101
    world.settle()
    assert "activeDeadlineSeconds" in world.cluster.jobs_["run--import-model-1"]["spec"]
    world.cluster.end_stopped()
    world.settle()
    assert world.conditions()["Failed"][:2] == ("True", "DeadlineExceeded")


def test_a_finished_run_is_deleted_when_its_time_is_up(world: World) -> None:
    world.apply(ttlSecondsAfterFinished=100)
    world.finish()
    ended_at = world.cluster.now
    assert world.look() == pytest.approx(ended_at + 100, abs=1)
    world.cluster.now += 101
    world.look()
    assert world.cluster.runs_ == world.cluster.jobs_ == {}
    assert len(list(world.artifacts.list())) == 5
    assert world.look() is None


def test_a_finished_run_rests_whatever_becomes_of_its_artifacts(world: World, tmp_path: Path) -> None:
    world.apply()
    world.finish()
    jobs = list(world.cluster.jobs_)
    (tmp_path / "store").rename(tmp_path / "gone")
    world.cluster.jobs_.clear()
    world.restart()
    for _ in range(3):
        world.cluster.now += 1000
        assert world.look() is None
    assert (world.status().phase, world.cluster.jobs_, len(jobs)) == ("Succeeded", {}, 5)


def test_a_failed_run_rests_even_when_its_record_is_gone(world: World) -> None:
    world.apply()
    world.settle()
    world.fail("import-model", "user")
    world.settle()
    world.cluster.jobs_.clear()
    world.settle()
    assert (world.status().phase, world.cluster.jobs_) == ("Failed", {})


def test_a_run_that_is_being_deleted_is_left_alone(world: World) -> None:
    world.apply()
    world.cluster.runs_["run"]["metadata"]["deletionTimestamp"] = stamp(NOW)
    assert world.look() is None
    assert not world.cluster.jobs_


def test_jobs_of_an_earlier_run_of_that_name_do_not_count(world: World) -> None:
    world.apply()
    world.settle()
    world.fail("import-model", "user")
    world.cluster.runs_.clear()  # deleted, and its Jobs not collected yet
    world.apply()
    world.settle()
    assert (world.status().phase, world.conditions()["Progressing"][1]) == ("Pending", "NameTaken")
    world.cluster.jobs_.clear()
    world.settle()
    assert list(world.cluster.jobs_) == ["run--import-model-1"]


def test_a_second_run_reuses_what_the_first_made(world: World) -> None:
    world.apply()
    world.finish()
    world.cluster.delete_run(world.cluster.runs_["run"])
    world.cluster.events.clear()
    world.apply()
    world.finish()
    assert not world.cluster.jobs_
    assert set(world.states().values()) == {"Reused"}


def test_a_merge_patch_makes_one_document_into_the_other() -> None:
    old = {"a": 1, "b": {"c": 1, "d": 2}, "e": [1], "f": {"g": 1}}
    new = {"a": 1, "b": {"c": 1, "d": 3}, "e": [1, 2], "h": {"i": {}}}
    patch = merge_patch(old, new)
    assert patch == {"b": {"d": 3}, "e": [1, 2], "f": None, "h": {"i": {}}}
    assert merged(old, patch) == new
    assert merge_patch(new, new) == {}


# ---- what Jobs and pods amount to ----------------------------------------------------------------------------------

JOB: Document = {
    "metadata": {
        "name": "run--ppo-2", "uid": "job", "creationTimestamp": stamp(NOW),
        "labels": {LABEL_STAGE: "ppo", "rlhf.dev/attempt": "2"},
        "annotations": {"rlhf.dev/digest": "d", "rlhf.dev/asked-at": f"{NOW - 5:.0f}"},
    },
    "spec": {},
}  # fmt: skip


def seen(job: Document, *pods: Document, now: float = NOW + 10) -> Attempt:
    [attempt] = attempts_of([merged(JOB, job)], made_of(pods), {}, now)["ppo"]
    return attempt


def made_of(pods: Iterable[Document]) -> list[Document]:
    """The pods with what names them and their Job."""
    owners = [{"uid": "job", "controller": True}]
    return [merged({"metadata": {"uid": f"pod-{n}", "ownerReferences": owners}}, pod) for n, pod in enumerate(pods)]


def failed_job(reason: str = "BackoffLimitExceeded", kind: str = "Failed") -> Document:
    at = stamp(NOW + 5)
    return {"status": {"conditions": [{"type": kind, "status": "True", "reason": reason, "lastTransitionTime": at}]}}


def ended_pod(code: int, message: str = "", reason: str = "Error", **status: Any) -> Document:
    state = {"terminated": {"exitCode": code, "message": message, "reason": reason}}
    statuses = [{"name": "sidecar", "state": {}}, {"name": "stage", "state": state}]
    return {"status": {"phase": "Failed" if code else "Succeeded", "containerStatuses": statuses, **status}}


def held_pod(reason: str, **waiting: str) -> Document:
    return {
        "status": {
            "phase": "Pending",
            "containerStatuses": [{"name": "stage", "state": {"waiting": {"reason": reason, **waiting}}}],
        }
    }


def placed_pod(ago: float, **status: Any) -> Document:
    """A pod that was given to a node so many seconds ago and has not started."""
    placed = {"type": "PodScheduled", "status": "True", "lastTransitionTime": stamp(NOW + 10 - ago)}
    return {"metadata": {"name": "p"}, "status": {"phase": "Pending", "conditions": [placed], **status}}


def waiting(reason: str, name: str = "stage", **more: str) -> list[Document]:
    return [{"name": name, "state": {"waiting": {"reason": reason, **more}}}]


STOPPED = {"metadata": {"annotations": {ANNOTATION_STOPPED: stamp(NOW + 3)}}}


def cases() -> Iterator[Any]:
    broke = StageResult(stage="ppo", failure=StageFailure(failure="user", message="no")).to_bytes().decode()
    stop = StageResult(stage="ppo", failure=StageFailure(failure="infrastructure", message="stopped")).to_bytes()
    disrupted = [{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "drain"}]
    yield "a result", failed_job(), [ended_pod(2, broke)], "user", "no"
    yield "told to stop", failed_job(), [ended_pod(EXIT_INTERRUPTED, stop.decode())], "interrupted", ""
    yield "SIGTERM", failed_job(), [ended_pod(143, "Terminated")], "interrupted", ""
    yield "memory", failed_job(), [ended_pod(137, "", "OOMKilled")], "outOfMemory", "placement.podTemplate can raise"
    yield "killed", failed_job(), [ended_pod(137, "some words")], "infrastructure", "killed (SIGKILL)"
    yield "log", failed_job(), [ended_pod(139, "Fatal: segfault\n")], "bug", "code 139 and left no result; its last"
    yield "silence", failed_job(), [ended_pod(1)], "bug", "exited with code 1 and left no result"
    evicted = {"status": {"phase": "Failed", "reason": "Evicted", "message": "low on ephemeral-storage"}}
    yield "evicted", failed_job(), [evicted], "infrastructure", "evicted: low on ephemeral-storage"
    told = ended_pod(EXIT_INTERRUPTED, stop.decode())
    told["status"] |= {"reason": "Evicted", "message": "exceeds its limit"}
    yield "evicted and told to stop", failed_job(), [told], "infrastructure", "evicted: exceeds its limit"
    yield "killed by eviction", failed_job(), [ended_pod(137, conditions=disrupted)], "infrastructure", "drain"
    yield "deleted", failed_job(), [], "infrastructure", "the pod was deleted"
    lost = {"status": {"phase": "Failed", "reason": "NodeLost", "message": "node n is unresponsive"}}
    yield "node lost", failed_job(), [lost], "infrastructure", "NodeLost"
    unknown = ended_pod(137, "", "ContainerStatusUnknown")
    yield "container unknown", failed_job(), [unknown], "infrastructure", "deleted, or its node"
    yield "deadline of a person", failed_job("DeadlineExceeded"), [], "infrastructure", "DeadlineExceeded"
    yield "stopped", merged(failed_job("DeadlineExceeded"), STOPPED), [], "interrupted", ""
    yield "stopped while queued", merged({"spec": {"suspend": True}}, STOPPED), [], "interrupted", ""
    due = stamp(NOW - 120)
    away = {"metadata": {"deletionTimestamp": due}, "status": {"phase": "Running"}}
    yield "node gone", failed_job(kind="FailureTarget"), [away], "infrastructure", "deleted, or its node"


@pytest.mark.parametrize(("job", "pods", "failure", "message"), [pytest.param(*c[1:], id=c[0]) for c in cases()])
def test_how_an_attempt_ended(job: Document, pods: list[Document], failure: str, message: str) -> None:
    attempt = seen(job, *pods)
    assert attempt.finished is not None
    if failure == "interrupted":
        assert attempt.interrupted
    else:
        assert attempt.failure is not None
        assert attempt.failure.failure == failure
        assert message in attempt.failure.message


@pytest.mark.parametrize(
    ("job", "pods", "reason"),
    [
        ({}, [], None),
        ({}, [{"status": {"phase": "Running"}}], None),
        ({}, [held_pod("ContainerCreating")], None),
        ({}, [held_pod("ImagePullBackOff", message="no such image")], "ImagePullBackOff"),
        ({}, [held_pod("CreateContainerConfigError", message='secret "x" not found')], "CreateContainerConfigError"),
        ({}, [placed_pod(100, containerStatuses=waiting("ContainerCreating"))], None),
        ({}, [placed_pod(130, containerStatuses=waiting("ContainerCreating"))], "ContainerCreating"),
        ({}, [placed_pod(130)], "ContainerCreating"),
        ({}, [placed_pod(130, containerStatuses=waiting("PodInitializing"))], "PodInitializing"),
        ({}, [placed_pod(130, phase="Running", containerStatuses=waiting("ContainerCreating", "other"))], None),
        (
            {},
            [
                placed_pod(
                    1,
                    initContainerStatuses=waiting("ImagePullBackOff", "fetch"),
                    containerStatuses=waiting("PodInitializing"),
                )
            ],
            "ImagePullBackOff",
        ),
        ({"spec": {"suspend": True}}, [], "Queued"),
        ({"status": {"startTime": stamp(NOW - 10)}}, [], "NoPod"),
        ({"status": {"startTime": stamp(NOW)}}, [], None),
        ({"status": {"startTime": stamp(NOW - 10)}}, [{"status": {"phase": "Pending"}}], None),
        ({"status": {"startTime": stamp(NOW - 10), "active": 1}}, [], None),
        (failed_job(), [{"status": {"phase": "Running"}}], None),
        (failed_job(kind="FailureTarget"), [], None),
        (merged({"spec": {"suspend": True}}, STOPPED), [{"status": {"phase": "Running"}}], "Queued"),
    ],
    ids=str,
)
def test_what_has_not_ended_and_why_it_waits(job: Document, pods: list[Document], reason: str | None) -> None:
    attempt = seen(job, *pods)
    assert attempt.finished is None
    assert (attempt.held.reason if attempt.held else None) == reason


def noted(job: Document, *pods: Document) -> Document:
    """The Job with what is kept of how these pods ended, if anything is."""
    [(_, outcome)] = outcomes_to_keep([merged(JOB, job)], made_of(pods), NOW + 10) or [(None, None)]
    return merged(job, {"metadata": {"annotations": {ANNOTATION_OUTCOME: outcome}}}) if outcome else job


@pytest.mark.parametrize(("job", "pods"), [pytest.param(*c[1:3], id=c[0]) for c in cases() if c[2]])
def test_an_attempt_ended_the_same_when_its_pod_is_gone(job: Document, pods: list[Document]) -> None:
    before, after = seen(job, *pods), seen(merged(noted(job, *pods), failed_job()))
    assert (before.failure, before.interrupted) == (after.failure, after.interrupted)


def test_a_queue_that_takes_its_pod_back_ends_no_attempt() -> None:
    drained = ended_pod(EXIT_INTERRUPTED)
    assert noted({"spec": {"suspend": True}}, drained) == {"spec": {"suspend": True}}
    # The Job as it was before the queue's word of it came.
    job = merged(noted({}, drained), failed_job())
    later = {"metadata": {"creationTimestamp": stamp(NOW + 1)}}
    [first, second] = made_of([drained, merged(ended_pod(137, "", "OOMKilled"), later)])
    [attempt] = attempts_of([merged(JOB, job)], [first, second], {}, NOW + 10)["ppo"]
    assert attempt.failure is not None
    assert attempt.failure.failure == "outOfMemory"


def test_what_is_kept_of_an_end_outlives_what_its_node_says_later() -> None:
    away = {"metadata": {"deletionTimestamp": stamp(NOW - 120)}, "status": {"phase": "Running"}}
    job = noted(failed_job(kind="FailureTarget"), away)
    back = seen(job, ended_pod(EXIT_INTERRUPTED))
    assert back.failure is not None
    assert back.failure.failure == "infrastructure"


def test_a_note_of_another_version_is_no_note() -> None:
    job = merged(failed_job(), {"metadata": {"annotations": {ANNOTATION_OUTCOME: '{"unheard": 1}'}}})
    assert seen(job).failure == seen(failed_job()).failure


def test_a_pod_that_does_not_start_says_where_to_look() -> None:
    held = [seen({}, placed_pod(ago)).held for ago in (130, 4000)]
    assert held[0] == held[1] is not None  # a message that changed with the time would be written each time
    assert "kubectl describe pod p" in held[0].message
    sidecar = {"name": "proxy", "state": {"running": {}}, "started": True}
    fetching = {"name": "fetch", "state": {"running": {}}, "started": False}
    init = placed_pod(130, initContainerStatuses=[sidecar, fetching], containerStatuses=waiting("PodInitializing"))
    told = seen({}, init).held
    assert told is not None
    assert "init container fetch has not ended" in told.message


def test_a_success_whose_pod_is_gone_is_left_to_the_store() -> None:
    attempt = seen(failed_job("", "Complete"))
    assert (attempt.finished, attempt.exit_code, attempt.interrupted, attempt.failure) == (NOW + 5, 0, False, None)


def test_an_attempt_began_after_it_was_asked_for_whatever_the_clocks_say() -> None:
    ahead = {"metadata": {"annotations": {"rlhf.dev/asked-at": f"{NOW + 30:.0f}"}}}
    assert (seen({}).started, seen(ahead).started) == (NOW, NOW + 30)


def test_every_stage_of_the_table_is_known_to_this_test() -> None:
    assert set(STAGES_OF_RUN) < {stage.name for stage in STAGES}
