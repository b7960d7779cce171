"""A fork takes over another run's artifacts, whatever it says itself of the stages that made them."""

from typing import Any

import pytest
from small_world import World

from rlhf_api.errors import UserError
from rlhf_api.layout import artifact_prefix
from rlhf_api.run import Fork, RLHFRun, RunStatus, StageStatus
from rlhf_operator.conditions import Hold
from rlhf_operator.forks import forked, stages_up_to, taken_over
from rlhf_operator.stages import STAGES, chain

FORK = {"run": "run", "stage": "reward"}
PROMPTS = {"source": "hf://datasets/owner/others"}


@pytest.fixture
def world(tmp_path: Any) -> World:
    return World(tmp_path)


def fork_of(world: World, **spec: Any) -> None:
    document = world.document(forkFrom=FORK, model={"source": "hf://owner/another"}, **spec)
    world.cluster.apply(document | {"metadata": {"name": "fork"}})


def look(world: World) -> RunStatus:
    for _ in range(5):
        world.operator.reconcile("default", "fork")
    return RunStatus.model_validate(world.cluster.runs_["fork"]["status"])


def finish(world: World) -> RunStatus:
    for _ in range(30):
        if (status := look(world)).phase in ("Succeeded", "Failed"):
            return status
        world.cluster.now += 10
        world.succeed()
    raise AssertionError(status)


def stages_with_jobs(world: World, run: str) -> set[str]:
    labels = [job["metadata"]["labels"] for job in world.cluster.jobs_.values()]
    return {each["rlhf.dev/stage"] for each in labels if each["rlhf.dev/run"] == run}


def test_a_stage_is_taken_over_with_all_that_it_was_made_from() -> None:
    assert stages_up_to("import-model") == ["import-model"]
    assert stages_up_to("merge") == ["import-model", "import-sft", "sft", "merge"]
    assert stages_up_to("reward") == ["import-model", "import-sft", "import-preferences", "sft", "merge", "reward"]
    assert stages_up_to("ppo") == [row.name for row in STAGES if row.name not in ("import-evaluation", "evaluate")]


def test_a_fork_runs_only_what_it_does_not_take_over(world: World) -> None:
    world.apply()
    world.finish()
    source = world.status()
    fork_of(world, data={"prompts": PROMPTS})
    status = finish(world)
    assert status.phase == "Succeeded"
    assert stages_with_jobs(world, "fork") == {"import-prompts", "ppo", "evaluate"}
    made, original = ({stage.name: stage.artifact for stage in each.stages} for each in (status, source))
    assert {name: made[name] == original[name] for name in ("import-model", "reward", "ppo")} == {
        "import-model": True,
        "reward": True,
        "ppo": False,
    }
    [ppo] = [job for name, job in world.cluster.jobs_.items() if name.startswith("fork--ppo")]
    assert str(world.config(ppo).inputs["reward"]) == original["reward"]


def test_a_fork_waits_for_its_source_and_says_so(world: World) -> None:
    fork_of(world)
    assert [(each.reason, each.message) for each in look(world).conditions if each.type == "Progressing"] == [
        ("ForkSourceMissing", "spec.forkFrom.run: there is no run run; it waits for one")
    ]
    world.apply()
    world.settle()
    status = look(world)
    [progressing] = [each for each in status.conditions if each.type == "Progressing"]
    assert (status.phase, progressing.reason) == ("Pending", "ForkSourceNotReady")
    assert not stages_with_jobs(world, "fork")
    world.finish()
    assert finish(world).phase == "Succeeded"


def test_what_was_taken_over_stays_when_the_source_is_gone(world: World) -> None:
    world.apply()
    world.finish()
    fork_of(world)
    look(world)
    world.cluster.delete_run(world.cluster.runs_["run"])
    world.restart()
    assert finish(world).phase == "Succeeded"


def test_an_artifact_that_is_gone_is_named_and_never_made_anew(world: World) -> None:
    world.apply()
    world.finish()
    [model] = [stage.artifact for stage in world.status().stages if stage.name == "reward"]
    fork_of(world, data={"prompts": PROMPTS})
    folder = artifact_prefix(*str(model).split("/"))
    world.artifacts.objects.delete([each.key for each in world.artifacts.objects.walk(folder)])
    status = finish(world)
    assert status.phase == "Failed"
    [failed] = [each.message for each in status.conditions if each.type == "Failed"]
    assert f"{model}, taken over by spec.forkFrom, is not in the store" in failed
    assert "reward" not in stages_with_jobs(world, "fork")


def test_a_source_in_another_store_is_refused(world: World) -> None:
    world.apply()
    world.finish()
    fork_of(world, objectStore={"prefix": "elsewhere"})
    [progressing] = [each for each in look(world).conditions if each.type == "Progressing"]
    assert progressing.reason == "ForkSourceElsewhere"
    assert "give both one spec.objectStore" in progressing.message


def test_a_stage_that_the_source_skipped_is_skipped() -> None:
    source = RunStatus(
        stages=[
            StageStatus(name="import-model", state="Succeeded", artifact="model/" + "a" * 64),
            StageStatus(name="sft", state="Skipped", message="no data.sft"),
            StageStatus(name="reward", state="Succeeded", artifact="reward-model/" + "b" * 64),
        ]
    )
    taken = taken_over(Fork(run="run", stage="reward"), source)
    assert isinstance(taken, dict)
    assert taken["sft"] == ""
    spec = {
        "model": {"source": "hf://owner/model"},
        "data": {"sft": {"source": "hf://datasets/a/b"}, "prompts": PROMPTS},
        "forkFrom": FORK,
    }
    run = RLHFRun.model_validate({"metadata": {"name": "fork"}, "spec": spec})
    found, hold = forked(run, source)
    assert hold is None
    links = {link.name: link for link in chain(found, {})}
    assert links["sft"].skipped == "the run run has none"
    assert str(links["ppo"].inputs["model"]) == "model/" + "a" * 64
    assert isinstance(taken_over(Fork(run="run", stage="sft"), source), Hold)


def test_a_local_fork_takes_over_from_its_folder(bench: Any) -> None:
    assert bench.run().phase == "Succeeded"
    bench.forget()
    gone = (bench.folder / "gone").as_uri()
    document = bench.document(forkFrom={"run": "tiny", "stage": "reward"}, model={"source": gone})
    from rlhf_operator.local import LocalRunner

    run = RLHFRun.model_validate(document | {"metadata": {"name": "fork"}})
    runner = LocalRunner(run, bench.home.default_store(), bench.home, bench.command)
    assert runner.run(lambda *_: None).phase == "Succeeded"
    assert bench.began() == []  # equal settings from there on: everything is found
    missing = document | {"spec": document["spec"] | {"forkFrom": {"run": "nobody", "stage": "reward"}}}
    with pytest.raises(UserError, match="there is no run nobody"):
        bench.home.forked(RLHFRun.model_validate(missing))
