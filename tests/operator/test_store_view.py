"""What the operator knows of stores: proved before a pod starts, told once, and kept within bounds."""

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_world import World

from rlhf_api.run import RLHFRun
from rlhf_operator.operator_settings import OperatorSettings
from rlhf_operator.reconcile import Reconciler
from rlhf_operator.stages import chain
from rlhf_operator.store_view import PROBE_SECONDS, StoreView
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
