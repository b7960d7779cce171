"""The operator's tasks together: no run is passed over when the Lease, the API server or a watch is late.

The API server here is as much of one as these need; tests/cluster/test_crashes.py does the same to a real one.
"""

import asyncio
import copy
import itertools
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from rlhf_api.errors import RLHFError
from rlhf_operator import controller
from rlhf_operator.controller import STUCK_SECONDS, Controller
from rlhf_operator.kubernetes_api import NotFound, Unreachable
from rlhf_operator.leadership import RENEW_WITHIN
from rlhf_operator.operator_settings import OperatorSettings
from rlhf_operator.seen import Key
from rlhf_operator.work_queue import WorkQueue

Document = dict[str, Any]
SOON = 10.0


class SmallApi:
    """A Lease, RLHFRuns and the status that is written for them. `away`: it does not answer; `lists_fail`: to lists."""

    def __init__(self) -> None:
        self.away = self.lists_fail = False
        self.lease: Document | None = None
        self.runs: dict[str, Document] = {}
        self.looked_at: list[str] = []
        self.lists = 0
        self.listed = threading.Event()
        self.let_lists_end = threading.Event()
        self.let_lists_end.set()
        self.let_writes_end = threading.Event()
        self.let_writes_end.set()
        self.versions = itertools.count(1)

    def request(self, method: str, path: str, body: Document | None = None, **_: Any) -> Document:
        if self.away:
            raise Unreachable(path)
        if "/leases" in path:
            return self._lease_request(method, path, body)
        if method == "PATCH":
            name = path.split("/")[-2]
            self.looked_at.append(name)
            self.let_writes_end.wait(SOON)
            return self._touched(self.runs[name])
        if method == "POST":  # an event
            return {}
        return self._list(path)

    def add(self, name: str) -> Document:
        """A run that the operator rejects: one look at it is one status written."""
        metadata = {"name": name, "namespace": "default", "uid": name, "generation": 1}
        self.runs[name] = self._touched({"metadata": metadata, "spec": {}})
        return self.runs[name]

    def _list(self, path: str) -> Document:
        if self.lists_fail:
            raise Unreachable(path)
        items = list(self.runs.values()) if path.endswith("rlhfruns") else []
        answer = {"metadata": {"resourceVersion": str(next(self.versions))}, "items": copy.deepcopy(items)}
        if path.endswith("rlhfruns"):
            self.lists += 1
            self.listed.set()
            self.let_lists_end.wait(SOON)
        return answer

    def _lease_request(self, method: str, path: str, body: Document | None) -> Document:
        if method == "GET" and self.lease is None:
            raise NotFound(path)
        if body is not None:
            self.lease = self._touched(body)
        assert self.lease is not None
        return self.lease

    def _touched(self, document: Document) -> Document:
        return {**document, "metadata": {**document["metadata"], "resourceVersion": str(next(self.versions))}}


class Clock:
    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


@asynccontextmanager
async def running(api: SmallApi, clock: Clock, wall: Callable[[], float] | None = None) -> AsyncIterator[Controller]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = OperatorSettings(image="pipeline:1", metrics_port=port, workers=2)
    wall = wall or time.time
    operator = Controller(settings, api, wall, clock)  # type: ignore[arg-type]
    operator.start()
    try:
        await until(lambda: operator.leadership.leads and (api.lists > 0 or api.lists_fail))
        yield operator
    finally:
        api.let_lists_end.set()
        api.let_writes_end.set()
        await operator.stop()


async def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < deadline, "it never comes to that"
        await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "TICK_SECONDS", 0.2)
    # the port of the metrics stays with the process otherwise
    monkeypatch.setattr(controller, "start_http_server", lambda *_, **__: None)


def test_a_run_heard_of_while_the_lease_was_late_is_looked_at_once_it_is_renewed() -> None:
    async def story() -> None:
        api, clock = SmallApi(), Clock()
        async with running(api, clock) as operator:
            clock.ahead += RENEW_WITHIN + 1  # the tick after this succeeds: it always led, as far as ticks show
            assert not operator.leadership.leads
            operator.heard("run", "ADDED", api.add("late"))
            await until(lambda: "late" in api.looked_at)

    asyncio.run(story())


def test_a_run_heard_of_while_the_api_server_was_away_is_looked_at_once_it_is_back() -> None:
    async def story() -> None:
        api, clock = SmallApi(), Clock()
        async with running(api, clock) as operator:
            api.away = True
            clock.ahead += RENEW_WITHIN + 1
            operator.heard("run", "ADDED", api.add("away"))
            await asyncio.sleep(0.5)
            assert api.looked_at == []
            api.away = False
            await until(lambda: "away" in api.looked_at)

    asyncio.run(story())


def test_a_standby_keeps_what_it_hears_and_looks_at_nothing() -> None:
    async def story() -> None:
        api, clock = SmallApi(), Clock()
        async with running(api, clock) as operator:
            assert api.lease is not None
            mine, api.lease = api.lease, copy.deepcopy(api.lease)
            api.lease["spec"]["holderIdentity"] = "another"
            await until(lambda: not operator.leadership.leads)
            for name in ("one", "two", "three"):
                operator.heard("run", "ADDED", api.add(name))
            await asyncio.sleep(0.5)
            assert api.looked_at == []
            assert operator.queue.depth == 3
            assert operator.health()["leads"] is False
            api.lease = mine
            await until(lambda: sorted(api.looked_at) == ["one", "three", "two"])

    asyncio.run(story())


def test_leading_again_asks_for_a_list_even_while_one_is_under_way() -> None:
    """A watch that hangs says nothing of what the list just made is too old to hold."""

    async def story() -> None:
        api, clock = SmallApi(), Clock()
        async with running(api, clock) as operator:
            await until(operator._listed.is_set)
            api.listed.clear()
            api.let_lists_end.clear()
            clock.ahead += RENEW_WITHIN + 1
            term = operator.leadership.term
            await until(api.listed.is_set)
            api.add("unheard")
            clock.ahead += RENEW_WITHIN + 1
            await until(lambda: operator.leadership.term == term + 2)
            await asyncio.sleep(0.5)
            api.let_lists_end.set()
            await until(lambda: "unheard" in api.looked_at)
            await asyncio.sleep(0.5)
            assert api.lists <= 4

    asyncio.run(story())


# ---- the probe of liveness ------------------------------------------------------------------------------------------


async def later(operator: Controller, wall: Clock) -> None:
    """Two minutes pass in which the Lease is looked after."""
    wall.ahead += STUCK_SECONDS + 1
    since = operator._ticked
    await until(lambda: operator._ticked > since)


def test_an_operator_with_nothing_to_do_is_alive() -> None:
    async def story() -> None:
        api, wall = SmallApi(), Clock()
        async with running(api, Clock(), wall) as operator:
            operator.heard("run", "ADDED", api.add("one"))
            await until(lambda: operator.queue.oldest is None and "one" in api.looked_at)
            await later(operator, wall)
            operator.heard("run", "MODIFIED", api.add("one"))
            assert operator.health() == {"leads": True, "runs": 1, "queue": 1}

    asyncio.run(story())


def test_a_task_that_has_ended_is_fatal() -> None:
    async def story() -> None:
        async with running(SmallApi(), Clock()) as operator:
            operator._tasks[0].cancel()
            await until(operator._tasks[0].done)
            with pytest.raises(RLHFError, match="a task of the operator has ended"):
                operator.health()

    asyncio.run(story())


def test_a_lease_that_nobody_looks_after_is_fatal() -> None:
    async def story() -> None:
        wall = Clock()
        async with running(SmallApi(), Clock(), wall) as operator:
            operator.health()
            wall.ahead += STUCK_SECONDS + 1
            with pytest.raises(RLHFError, match="Lease has not been looked after"):
                operator.health()

    asyncio.run(story())


def test_a_look_that_does_not_end_is_fatal() -> None:
    async def story() -> None:
        api, wall = SmallApi(), Clock()
        async with running(api, Clock(), wall) as operator:
            api.let_writes_end.clear()
            operator.heard("run", "ADDED", api.add("stuck"))
            await until(lambda: "stuck" in api.looked_at)
            operator.health()
            await later(operator, wall)
            with pytest.raises(RLHFError, match=r"no look at a run has ended for 12\d s, 0 wait"):
                operator.health()

    asyncio.run(story())


def test_a_first_list_that_never_comes_is_fatal() -> None:
    async def story() -> None:
        api, wall = SmallApi(), Clock()
        api.lists_fail = True
        async with running(api, Clock(), wall) as operator:
            operator.heard("run", "ADDED", api.add("unseen"))
            operator.health()
            await later(operator, wall)
            with pytest.raises(RLHFError, match="could not be listed"):
                operator.health()

    asyncio.run(story())


def test_a_list_that_fails_after_the_first_is_not() -> None:
    async def story() -> None:
        api, wall = SmallApi(), Clock()
        async with running(api, Clock(), wall) as operator:
            await until(operator._listed.is_set)
            api.lists_fail = True
            operator._doubt.set()
            await later(operator, wall)
            operator.health()

    asyncio.run(story())


def test_runs_that_wait_while_no_worker_takes_them_are_fatal_where_this_operator_leads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def never(self: WorkQueue) -> Key:
        await asyncio.Event().wait()
        raise AssertionError

    async def story() -> None:
        api, wall = SmallApi(), Clock()
        async with running(api, Clock(), wall) as operator:
            await until(operator._listed.is_set)
            operator.heard("run", "ADDED", api.add("waits"))
            await until(lambda: operator._waited_since is not None)
            operator.health()
            await later(operator, wall)
            with pytest.raises(RLHFError, match=r"no look at a run has ended for 12\d s, 1 wait"):
                operator.health()
            assert api.lease is not None
            mine, api.lease = api.lease, copy.deepcopy(api.lease)
            api.lease["spec"]["holderIdentity"] = "another"
            await until(lambda: operator._waited_since is None)
            operator.health()
            api.lease = mine
            await until(lambda: operator._waited_since is not None)
            operator.health()  # it leads again, as of now

    monkeypatch.setattr(WorkQueue, "take", never)
    asyncio.run(story())
