"""What the operator knows of stores: proved before a pod starts, told once, and kept within bounds."""

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_world import World

from rlhf_api.errors import StoreError
from rlhf_api.layout import manifest_key
from rlhf_api.run import RLHFRun
from rlhf_operator.kubernetes_api import Denied
from rlhf_operator.operator_settings import OperatorSettings
from rlhf_operator.reconcile import Reconciler
from rlhf_operator.stages import chain
from rlhf_operator.store_view import PROBE_SECONDS, START_SECONDS, StoreView
from rlhf_store.artifacts import open_artifacts
from rlhf_store.file_objects import FileObjects


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def settings(folder: Path) -> OperatorSettings:
    return OperatorSettings(image="pipeline:1", bucket=(folder / "store").as_uri())


def run(name: str, prefix: str) -> RLHFRun:
    spec: dict[str, Any] = {
        "model": {"source": "hf://owner/model"},
        "data": {"prompts": {"source": "hf://datasets/owner/prompts"}},
        "reward": {"function": "module:callable"},
        "objectStore": {"prefix": prefix},
    }
    return RLHFRun.model_validate({"metadata": {"name": name, "uid": name, "generation": 1}, "spec": spec})


def test_a_store_that_takes_the_same_conditional_write_twice_is_refused_and_said(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = FileObjects.put
    monkeypatch.setattr(FileObjects, "put", lambda self, key, data, if_none_match=False: bool(put(self, key, data)))
    world.apply()
    world.settle()
    assert world.conditions()["StoreReady"][:2] == ("False", "Unavailable")
    assert "honours conditional writes" in world.conditions()["StoreReady"][2]
    assert world.cluster.jobs_ == {}
    assert not list(world.artifacts.objects.walk("probe/"))
    monkeypatch.undo()
    world.cluster.now += 20
    world.finish()
    assert world.status().phase == "Succeeded"


def test_how_fast_a_store_answers_is_said_once_until_it_fails(world: World, tmp_path: Path) -> None:
    ticks: Iterator[float] = itertools.count(0.0, 0.012)  # type: ignore[assignment]
    pace = [1.0]
    view = StoreView(world.settings, lambda: world.cluster.now + next(ticks) * pace[0])
    world.operator = Reconciler(world.cluster, world.settings, view, lambda: world.cluster.now)
    world.apply()
    world.settle()
    assert world.conditions()["StoreReady"] == ("True", "Answered", "answers in 12 ms")
    pace[0] = 7.0
    for _ in range(2):  # proved again, by this operator and by the next one, and slower
        world.cluster.now += PROBE_SECONDS + 1
        world.succeed()
        world.settle()
        assert world.conditions()["StoreReady"][2] == "answers in 12 ms"
        view = StoreView(world.settings, lambda: world.cluster.now + next(ticks) * pace[0])
        world.operator = Reconciler(world.cluster, world.settings, view, lambda: world.cluster.now)
    store, away = tmp_path / "store", tmp_path / "away"
    world.succeed()
    store.rename(away)
    store.write_text("no folder")
    world.settle()
    assert world.conditions()["StoreReady"][0] == "False"
    store.unlink()
    away.rename(store)
    world.cluster.now += 20
    world.settle()
    assert world.conditions()["StoreReady"] == ("True", "Answered", "answers in 84 ms")


def test_only_the_stores_used_last_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def counting(store: Any, patience: float) -> Any:
        opened.append(store.url.rsplit("/", 1)[-1])
        return open_artifacts(store, patience)

    monkeypatch.setattr("rlhf_operator.store_view.open_artifacts", counting)
    monkeypatch.setattr("rlhf_operator.store_view.MAX_STORES", 3)
    monkeypatch.setattr("rlhf_operator.store_view.MAX_RUNS", 1)
    view = StoreView(settings(tmp_path), lambda: 0.0)
    for number, prefix in enumerate(["a", "b", "c", "a", "d", "a", "c", "b"]):
        assert view.look(run(f"run-{number}", prefix), {}, 0.0).problem is None
    assert opened == ["a", "b", "c", "d", "b"]


def test_runs_of_many_stores_looked_at_at_once_each_see_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_operator.store_view.MAX_STORES", 2)
    monkeypatch.setattr("rlhf_operator.store_view.MAX_RUNS", 2)
    operator = settings(tmp_path)
    view = StoreView(operator, lambda: 0.0)
    prefixes = [f"p{number}" for number in range(6)]
    expected = {}
    for number, prefix in enumerate(prefixes):
        each = run(prefix, prefix)
        ref = chain(each, {})[0].output
        writer = open_artifacts(operator.store_of(each.spec.object_store)).writer(ref, "1")
        writer.add_bytes("report.json", b"{}")
        writer.commit({"metrics": {"number": float(number)}})
        expected[prefix] = {str(ref): {"number": float(number)}}
    wrong: list[Any] = []

    def look(turn: int) -> None:
        for step in range(24):
            prefix = prefixes[(turn + step * (turn + 1)) % len(prefixes)]
            seen = view.look(run(prefix, prefix), {}, 0.0)
            if seen.problem or seen.artifacts != expected[prefix]:
                wrong.append((prefix, seen))

    threads = [threading.Thread(target=look, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def break_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full: what is there can be read, nothing can be written."""

    def refuse(self: FileObjects, *_: Any, **__: Any) -> bool:
        raise StoreError(f"store {self.url}: the disk is full")

    monkeypatch.setattr(FileObjects, "put", refuse)


def test_a_retry_starts_only_on_a_store_that_works_by_then(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.apply()
    world.settle()
    for pause in (6, 12):
        world.fail("import-model", "infrastructure")
        world.settle()
        world.cluster.now += pause
        world.settle()
    before = list(world.cluster.jobs_)
    world.fail("import-model", "infrastructure")
    world.settle()
    assert world.conditions()["StoreReady"][0] == "True"
    with monkeypatch.context() as patch:
        break_store(patch)
        world.cluster.now += 60
        world.settle()
        assert world.conditions()["StoreReady"][:2] == ("False", "Unavailable")
        assert list(world.cluster.jobs_) == before
    world.cluster.now += 20
    world.settle()
    assert len(world.cluster.jobs_) == len(before) + 1


def test_a_quota_that_lifts_starts_nothing_on_a_store_that_broke_meanwhile(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(job: Any) -> None:
        raise Denied("exceeded quota")

    world.cluster.refuse = refuse
    world.apply()
    world.settle()
    break_store(monkeypatch)
    world.cluster.refuse = lambda job: None
    world.cluster.now += START_SECONDS
    world.settle()
    assert world.conditions()["StoreReady"][:2] == ("False", "Unavailable")
    assert world.cluster.jobs_ == {}


def test_a_store_that_breaks_during_a_long_stage_is_told_and_the_stage_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.apply()
    world.settle()
    world.cluster.start_pods()
    world.settle()
    with monkeypatch.context() as patch:
        break_store(patch)
        world.cluster.now += PROBE_SECONDS
        world.settle()
        assert world.conditions()["StoreReady"][:2] == ("False", "Unavailable")
        assert world.states()["import-model"] == "Running"
    world.cluster.now += 20
    world.settle()
    assert world.conditions()["StoreReady"][0] == "True"


def test_what_one_run_learns_of_a_store_every_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    view = StoreView(settings(tmp_path), lambda: clock[0])
    assert view.look(run("one", ""), {}, 0.0).problem is None
    break_store(monkeypatch)
    clock[0] = START_SECONDS
    assert view.look(run("one", ""), {}, 0.0).problem is None
    assert "full" in str(view.look(run("two", ""), {}, 0.0, to_start=True).problem)
    assert "full" in str(view.look(run("one", ""), {}, 0.0).problem)


def test_between_looks_that_learn_nothing_new_a_store_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, asked = [0.0], []
    view = StoreView(settings(tmp_path), lambda: clock[0])
    view.look(run("one", ""), {}, 0.0)

    def noting(self: FileObjects, key: str, *rest: Any, **options: Any) -> bool:
        asked.append(key)
        return put(self, key, *rest, **options)

    put = FileObjects.put
    monkeypatch.setattr(FileObjects, "put", noting)
    monkeypatch.setattr(FileObjects, "get", None)
    for clock[0] in (10.0, START_SECONDS - 0.1):
        view.look(run("one", ""), {}, 0.0, to_start=True)
    for clock[0] in (START_SECONDS, PROBE_SECONDS - 0.1):
        view.look(run("one", ""), {}, 0.0)
    assert asked == []
    clock[0] = PROBE_SECONDS
    view.look(run("one", ""), {}, 0.0)
    assert len(asked) == 2


def test_a_damaged_artifact_fails_its_run_and_no_other(world: World) -> None:
    world.apply()
    world.settle()
    world.succeed("import-model")
    [name] = [stage.artifact for stage in world.status().stages if stage.name == "import-model"]
    assert name is not None
    key = manifest_key(*name.split("/"))  # type: ignore[arg-type]
    world.artifacts.objects.delete([key])
    world.artifacts.objects.put(key, b"{}")
    world.cluster.apply(world.document(model={"source": "hf://owner/another"}) | {"metadata": {"name": "other"}})
    world.settle()
    world.operator.reconcile("default", "other")
    assert world.conditions()["Failed"][:2] == ("True", "User")
    assert "manifest.json was altered or truncated" in world.conditions()["Failed"][2]
    assert world.conditions()["StoreReady"][0] == "True"
    assert len(world.cluster.jobs("default", "other")) == 1
    world.artifacts.objects.delete([key])
    world.cluster.end_stopped()
    world.apply(suspend=True)
    world.settle()
    world.apply()
    world.finish()
    assert world.status().phase == "Succeeded"
