"""A run that is deleted takes its own artifacts along where its spec says so, and nobody else's."""

from pathlib import Path
from typing import Any

import pytest
from small_world import World

from rlhf_api.errors import StoreError
from rlhf_api.names import ANNOTATION_STOPPED, FINALIZER
from rlhf_operator.store_view import PROBE_SECONDS
from rlhf_store.artifacts import Artifacts
from rlhf_store.file_objects import FileObjects

DELETE = {"onDelete": "Delete"}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def another(world: World, **spec: Any) -> None:
    """A second run beside `run`, to its end."""
    world.cluster.apply(world.document(**spec) | {"metadata": {"name": "other"}})
    for _ in range(20):
        world.operator.reconcile("default", "other")
        world.cluster.now += 10
        world.succeed()


def delete(world: World) -> None:
    world.cluster.delete_run(world.cluster.runs_["run"])


def stored(world: World) -> set[str]:
    return {str(manifest.ref) for manifest in world.artifacts.list()}


def test_artifacts_stay_by_default_and_no_finalizer_is_set(world: World) -> None:
    world.apply()
    world.finish()
    before = stored(world)
    assert "finalizers" not in world.cluster.runs_["run"]["metadata"]
    delete(world)
    assert world.look() is None
    assert stored(world) == before != set()


def test_what_no_other_run_names_is_deleted_with_the_run(world: World) -> None:
    world.apply(artifacts=DELETE)
    world.finish()
    another(world, ppo={"klCoefficient": 0.2})
    shared = {each["artifact"] for each in world.cluster.runs_["other"]["status"]["stages"] if "artifact" in each}
    own = {each.artifact for each in world.status().stages if each.artifact} - shared
    assert own
    assert own <= stored(world)
    delete(world)
    assert world.cluster.runs_["run"]["metadata"]["finalizers"] == [FINALIZER]
    world.look()
    assert "run" not in world.cluster.runs_
    assert stored(world) == shared
    assert not [key for name in own for key in world.artifacts.objects.walk(f"artifacts/{name}/")]


def test_stages_end_before_their_artifacts_go(world: World) -> None:
    world.apply(artifacts=DELETE)
    world.settle()
    world.cluster.start_pods()
    delete(world)
    world.look()
    assert "run" in world.cluster.runs_
    assert all(ANNOTATION_STOPPED in job["metadata"]["annotations"] for job in world.cluster.jobs_.values())
    world.cluster.end_stopped()
    world.look()
    assert "run" not in world.cluster.runs_


@pytest.mark.parametrize("after", [False, True])
def test_an_operator_that_dies_while_it_deletes_is_followed(world: World, after: bool) -> None:
    world.apply(artifacts=DELETE)
    world.finish()
    delete(world)
    world.cluster.crash_at, world.cluster.crash_after = world.cluster.writes + 1, after
    world.look()
    assert world.deaths == 1
    world.look()
    assert "run" not in world.cluster.runs_
    assert stored(world) == set()


def test_what_was_taken_over_from_another_run_is_that_runs(world: World) -> None:
    another(world)
    kept = stored(world)
    world.apply(artifacts=DELETE, forkFrom={"run": "other", "stage": "reward"}, ppo={"klCoefficient": 0.2})
    world.finish()
    world.cluster.delete_run(world.cluster.runs_["other"])
    assert stored(world) > kept
    delete(world)
    world.look()
    taken = {name for name in kept if name.partition("/")[0] in ("model", "reward-model")}
    assert taken <= stored(world)


def test_the_policy_may_change_while_the_run_lives(world: World) -> None:
    world.apply(artifacts=DELETE)
    world.finish()
    world.apply(artifacts={"onDelete": "Keep"})
    world.look()
    assert world.cluster.runs_["run"]["metadata"]["finalizers"] == []
    world.apply(artifacts=DELETE)
    world.look()
    assert world.cluster.runs_["run"]["metadata"]["finalizers"] == [FINALIZER]


@pytest.mark.parametrize("away_before", [False, True])
def test_a_store_that_is_away_keeps_the_run_until_it_answers_and_the_run_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch, away_before: bool
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise StoreError("the store is away")

    world.apply(artifacts=DELETE)
    if away_before:
        world.settle()
        world.cluster.start_pods()
        world.cluster.now += PROBE_SECONDS
        monkeypatch.setattr(FileObjects, "put", away)
        world.settle()
        assert world.conditions()["StoreReady"][:2] == ("False", "Unavailable")
    else:
        world.finish()
    delete(world)
    with monkeypatch.context() as patch:
        patch.setattr(Artifacts, "remove", away)
        again = world.look()
        assert again is not None
        assert again > world.cluster.now
        world.cluster.end_stopped()
        for _ in range(3):
            world.look()
        assert world.conditions()["StoreReady"][:2] == ("False", "DeletionWaits")
        assert (
            f"the store is away; the run stays until its artifacts are deleted; without its finalizer {FINALIZER}"
            in (world.conditions()["StoreReady"][2])
        )
        assert world.reasons().count("DeletionWaits") == 1
    world.look()
    assert "run" not in world.cluster.runs_


def test_runs_that_go_together_leave_nothing_that_they_shared(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.apply(artifacts=DELETE)
    world.finish()
    another(world, artifacts=DELETE, ppo={"klCoefficient": 0.2})
    for name in ("run", "other"):
        world.cluster.delete_run(world.cluster.runs_[name])
    both = world.cluster.runs()
    monkeypatch.setattr(world.cluster, "runs", lambda: both)  # neither hears yet that the other is gone
    for name in ("run", "other"):
        world.operator.reconcile("default", name)
    assert world.cluster.runs_ == {}
    assert stored(world) == set()


def test_a_run_that_is_gone_is_forgotten(world: World) -> None:
    world.apply()
    world.settle()
    assert world.operator._memories
    assert world.view._found
    world.cluster.delete_run(world.cluster.runs_["run"])
    world.look()
    assert world.operator._memories == {}
    assert world.view._found == {}
