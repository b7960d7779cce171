"""The operator is killed, the API server is killed, hangs or hangs up, operators compete: a run ends as undisturbed.

On a real API server with its controllers. No pod runs: `StagePlayer` ends each as its stage would.
"""

import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from bare_plane import BarePlane, OperatorProcess, api_of, drop_lease, until
from between import Between
from kubectl import SOON
from stage_player import NOBODY, StagePlayer

from rlhf_api.names import API_VERSION, GROUP, KIND, LABEL_ATTEMPT, LABEL_STAGE, PLURAL, VERSION
from rlhf_operator.kubernetes_api import ApiError, KubernetesApi
from rlhf_operator.leadership import LEASE_SECONDS, RENEW_WITHIN

pytestmark = pytest.mark.timeout(900)

RUN = "run"
STAGES = ["evaluate", "import-model", "import-prompts", "ppo", "reward"]
SOME = 8  # writes around which the operator is killed, unless all are asked for
AT_ONCE = 3

Document = dict[str, Any]
When = Literal["before", "after"]


@dataclass
class World:
    """One namespace with one run, its store, and the operators for it."""

    plane: BarePlane
    api: KubernetesApi
    player: StagePlayer
    folder: Path
    namespace: str

    @contextmanager
    def operator(self, name: str = "operator") -> Iterator[tuple[OperatorProcess, Between]]:
        """An operator, not yet started, and what stands between it and the API server."""
        kubeconfig = self.folder / f"{name}.kubeconfig"
        with Between(self.plane.kubeconfig, kubeconfig) as between:
            process = OperatorProcess(kubeconfig, self.folder / "store", self.folder / f"{name}.log", [self.namespace])
            between.kill = process.kill
            try:
                yield process, between
            finally:
                process.kill()

    def apply(self) -> None:
        spec = {
            "model": {"source": "hf://owner/model"},
            "data": {"prompts": {"source": "hf://datasets/owner/prompts"}},
            "reward": {"function": "module:callable"},
            "placement": {"podTemplate": NOBODY},
        }
        document = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": RUN}, "spec": spec}
        self.api.request("POST", self._path(PLURAL, f"/apis/{GROUP}/{VERSION}"), document)

    def status(self) -> Document:
        found = self.api.request("GET", self._path(f"{PLURAL}/{RUN}", f"/apis/{GROUP}/{VERSION}"))
        status: Document = found.get("status", {})
        return status

    def succeeded(self) -> bool:
        try:
            status = self.status()
        except ApiError:  # an API server that is away, or back for a moment
            return False
        assert status.get("phase") != "Failed", status
        return status.get("phase") == "Succeeded"

    def attempts(self) -> list[tuple[str, str]]:
        """Stage and number of every Job there is, in order."""
        jobs = self.api.request("GET", self._path("jobs", "/apis/batch/v1"))["items"]
        labels = [job["metadata"]["labels"] for job in jobs]
        return sorted((each[LABEL_STAGE], each[LABEL_ATTEMPT]) for each in labels)

    def waits(self, stage: str) -> bool:
        return self.player.waits(self.namespace, stage)

    def events(self) -> Counter[tuple[str, str]]:
        """Reason and message of each event on the run, and how often there is one like it."""
        found = self.api.request("GET", self._path("events", "/api/v1"))["items"]
        mine = [event for event in found if event["involvedObject"]["kind"] == KIND]
        return Counter((event["reason"], event["message"]) for event in mine)

    def told_its_end(self) -> bool:
        """Whether there is the event that is the operator's last write."""
        return any(reason == "RunSucceeded" for reason, _ in self.events())

    def end(self) -> "End":
        stages = self.status()["stages"]
        names = ("name", "state", "attempt", "artifact", "failure")
        return End([tuple(stage.get(name) for name in names) for stage in stages], self.attempts(), self.events())

    def _path(self, rest: str, prefix: str) -> str:
        return f"{prefix}/namespaces/{self.namespace}/{rest}"


@dataclass
class End:
    """What a run came to."""

    stages: list[tuple[Any, ...]]
    attempts: list[tuple[str, str]]
    events: Counter[tuple[str, str]]


@pytest.fixture(scope="module")
def player(own_plane: BarePlane) -> Iterator[StagePlayer]:
    with StagePlayer(own_plane.kubeconfig) as player:
        yield player


@pytest.fixture(scope="module")
def worlds(
    own_plane: BarePlane, player: StagePlayer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], World]:
    api = api_of(own_plane.kubeconfig, 2 * AT_ONCE)

    def make(name: str) -> World:
        folder = tmp_path_factory.mktemp(name)
        (folder / "store").mkdir()
        api.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        return World(own_plane, api, player, folder, name)

    return make


@pytest.fixture
def world(worlds: Callable[[str], World], player: StagePlayer) -> Iterator[World]:
    yield worlds(f"test-{uuid.uuid4().hex[:8]}")
    player.held.clear()


@pytest.fixture(scope="module")
def undisturbed(worlds: Callable[[str], World]) -> tuple[End, list[str]]:
    """What a run comes to that nothing disturbs, and the writes that it took."""
    world = worlds("undisturbed")
    with world.operator() as (operator, between):
        world.apply()
        operator.start()
        until(world.succeeded, SOON, operator.last_lines)
        until(world.told_its_end, SOON, "the last event is missing")
        return world.end(), list(between.writes)


def test_an_undisturbed_run_writes_little(undisturbed: tuple[End, list[str]]) -> None:
    end, writes = undisturbed
    assert end.attempts == [(stage, "1") for stage in STAGES]
    assert Counter(end.events.values()).keys() == {1}
    jobs = [write for write in writes if "/jobs" in write]
    assert len(jobs) == len(STAGES)
    assert len(writes) <= 6 * len(STAGES), writes


def test_killed_before_and_after_every_write_a_run_ends_the_same(
    worlds: Callable[[str], World], undisturbed: tuple[End, list[str]], request: pytest.FixtureRequest
) -> None:
    expected, writes = undisturbed
    numbers = list(range(1, len(writes) + 1))
    if not request.config.getoption("--every-write"):
        numbers = numbers[:: max(1, len(numbers) // SOME)]
    points: list[tuple[int, When]] = [(number, when) for number in numbers for when in ("before", "after")]

    def story(point: tuple[int, When]) -> None:
        number, when = point
        world = worlds(f"killed-{when}-{number}")
        with world.operator() as (operator, between):
            between.kill_at = point
            world.apply()
            operator.start()

            def spared() -> bool:
                """Two statuses may become one with the timing, so that there is no such write."""
                return number > len(between.writes) and world.told_its_end()

            until(lambda: not operator.runs or spared(), SOON, operator.last_lines)
            assert operator.runs or between.kill_at is None, (point, operator.last_lines())
            operator.kill()
            drop_lease(world.api, world.namespace)
            operator.start()
            until(world.succeeded, SOON, lambda: (point, operator.last_lines()))
        end = world.end()
        assert (end.stages, end.attempts) == (expected.stages, expected.attempts), (point, between.writes)
        # Each at most once; the few of one status may be lost with the operator.
        assert not {reason for reason, _ in end.events} & {"StageFailed", "Retrying", "RunFailed"}, point
        assert set(end.events.values()) <= {1}, (point, end.events)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(story, points))


def test_a_run_goes_on_when_the_api_server_is_killed(world: World) -> None:
    world.player.held |= {"reward"}
    with world.operator() as (operator, _):
        world.apply()
        operator.start()
        until(lambda: world.waits("reward"), SOON, operator.last_lines)
        pid = world.plane.api_server_pid
        world.plane.kill_api_server()
        until(lambda: world.plane.api_server_pid != pid, SOON, "the API server is not started again")
        world.player.held.clear()
        until(lambda: world.plane.answers() and world.succeeded(), SOON, operator.last_lines)
        assert operator.runs
    assert world.attempts() == [(stage, "1") for stage in STAGES]


@pytest.mark.parametrize("old_connections", [True, False], ids=["late", "lost"])
def test_a_run_goes_on_once_an_api_server_that_hung_answers(world: World, old_connections: bool) -> None:
    """In the second case what hung is never answered: an API server that another has taken the place of."""
    world.player.held |= {"reward"}
    with world.operator() as (operator, between):
        world.apply()
        operator.start()
        until(lambda: world.waits("reward"), SOON, operator.last_lines)
        between.hang()
        world.player.held.clear()
        time.sleep(2 * RENEW_WITHIN)
        assert world.attempts() == [(stage, "1") for stage in STAGES if stage not in ("ppo", "evaluate")]
        between.answer(old_connections)
        until(world.succeeded, SOON, operator.last_lines)
        assert operator.runs
    assert world.attempts() == [(stage, "1") for stage in STAGES]


def test_a_run_goes_on_when_connections_break_again_and_again(world: World) -> None:
    with world.operator() as (operator, between):
        world.apply()
        operator.start()

        def ended() -> bool:
            between.hang_up()
            time.sleep(0.5)
            return world.succeeded()

        until(ended, SOON, operator.last_lines)
        assert operator.runs
    assert world.attempts() == [(stage, "1") for stage in STAGES]


def test_of_two_operators_one_writes_and_the_other_follows_it(world: World) -> None:
    world.player.held |= {"reward"}
    with world.operator("first") as (first, of_first), world.operator("second") as (second, of_second):
        world.apply()
        first.start()
        until(lambda: of_first.writes, SOON, first.last_lines)
        second.start()
        until(lambda: world.waits("reward"), SOON, first.last_lines)
        until(lambda: "rlhf_operator_leads 0.0" in second.metrics(), SOON, second.last_lines)
        assert of_second.writes == []
        first.kill()
        killed = time.monotonic()
        world.player.held.clear()
        until(lambda: of_second.writes, LEASE_SECONDS + SOON, second.last_lines)
        print(f"followed after {time.monotonic() - killed:.1f} s")
        until(world.succeeded, SOON, second.last_lines)
    assert world.attempts() == [(stage, "1") for stage in STAGES]
    assert not {reason for reason, _ in world.events()} & {"StageFailed", "Retrying"}


def test_a_leader_that_is_cut_off_writes_nothing_once_another_leads(world: World) -> None:
    world.player.held |= {"reward"}
    with world.operator("first") as (first, of_first), world.operator("second") as (second, of_second):
        world.apply()
        first.start()
        until(lambda: world.waits("reward"), SOON, first.last_lines)
        second.start()
        until(lambda: "rlhf_operator_leads 0.0" in second.metrics(), SOON, second.last_lines)
        of_first.hang()
        world.player.held.clear()
        until(lambda: of_second.writes, LEASE_SECONDS + SOON, second.last_lines)
        written = len(of_first.writes)
        of_first.answer()
        until(world.succeeded, SOON, second.last_lines)
        until(lambda: "rlhf_operator_leads 0.0" in first.metrics(), SOON, first.last_lines)
        assert of_first.writes[written:] == []
    assert world.attempts() == [(stage, "1") for stage in STAGES]
