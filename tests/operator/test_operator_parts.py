"""The parts around the reconcile: the queue, the Lease, what was seen, the metrics of a pod, the events."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest, start_http_server

from rlhf_api import names
from rlhf_api.run import Condition, RunStatus, StageStatus
from rlhf_operator import pod_metrics
from rlhf_operator.kubernetes_api import AlreadyExists, ApiError, Conflict, NotFound
from rlhf_operator.leadership import LEASE_SECONDS, RENEW_WITHIN, Leadership
from rlhf_operator.operator_metrics import OperatorMetrics
from rlhf_operator.pod_metrics import parsed, progress_from
from rlhf_operator.run_events import events_between
from rlhf_operator.seen import Seen
from rlhf_operator.work_queue import MAX_RETRY_SECONDS, WorkQueue

A, B = ("default", "a"), ("default", "b")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# ---- the queue ------------------------------------------------------------------------------------------------------


def test_a_run_is_queued_once_and_with_one_worker_at_a_time() -> None:
    async def story() -> None:
        queue = WorkQueue(Clock())
        for key in (A, A, B, A):
            queue.add(key)
        assert queue.depth == 2
        assert [await queue.take(), await queue.take()] == [A, B]
        queue.add(A)
        queue.add(A)
        assert queue.depth == 0  # a worker has it
        queue.done(A, None)
        assert queue.depth == 1
        assert await queue.take() == A
        queue.done(A, None)
        assert queue.depth == 0

    asyncio.run(story())


def test_a_run_comes_back_at_its_time_or_when_something_is_heard() -> None:
    async def story() -> None:
        clock = Clock()
        queue = WorkQueue(clock)
        timer = asyncio.create_task(queue.run_timer())
        queue.add_at(A, clock.now + 30)
        queue.add_at(B, clock.now + 30)
        queue.add(B)
        assert await queue.take() == B
        queue.done(B, None)
        await asyncio.sleep(0)
        assert queue.depth == 0
        clock.now += 31
        queue.add_at(("default", "c"), clock.now + 100)  # wakes the timer
        assert await asyncio.wait_for(queue.take(), 5) == A
        assert queue.depth == 0  # what B had to wait for has come before
        timer.cancel()

    asyncio.run(story())


def test_a_failure_is_tried_again_later_each_time_and_events_do_not_undo_that() -> None:
    async def story() -> None:
        queue = WorkQueue(Clock())
        waits = []
        for _ in range(9):
            queue.add(A)
            assert await queue.take() == A
            queue.add(A)
            waits.append(queue.failed(A))
            assert queue.depth == 0
        assert waits[0] <= 1
        assert waits[2] > waits[0]
        assert MAX_RETRY_SECONDS / 2 <= waits[-1] <= MAX_RETRY_SECONDS
        queue.add(A)
        await queue.take()
        queue.done(A, None)
        queue.add(A)
        await queue.take()
        assert queue.failed(A) <= 1  # a success forgives

    asyncio.run(story())


def test_the_slowest_worker_is_known() -> None:
    async def story() -> None:
        clock = Clock()
        queue = WorkQueue(clock)
        queue.add(A)
        queue.add(B)
        await queue.take()
        clock.now += 5
        await queue.take()
        assert queue.oldest == 1000.0
        queue.done(A, None)
        assert queue.oldest == 1005.0
        queue.done(B, None)
        assert queue.oldest is None

    asyncio.run(story())


# ---- the Lease ------------------------------------------------------------------------------------------------------


class OneLease:
    """The API server, as far as one Lease goes."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = 0
        self.away = False

    def request(self, method: str, path: str, body: dict[str, Any] | None = None, **_: Any) -> dict[str, Any]:
        if self.away:
            raise ApiError("no answer")
        match method:
            case "GET":
                if self.lease is None:
                    raise NotFound(path)
                return self.lease
            case "POST" if self.lease is not None:
                raise AlreadyExists(path)
            case "PUT" if body and body["metadata"]["resourceVersion"] != str(self.version):
                raise Conflict(path)
        assert body is not None
        self.version += 1
        self.lease = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.version)}}
        return self.lease


def test_one_operator_leads_and_another_follows_only_when_it_is_silent() -> None:
    clock, api = Clock(), OneLease()
    first, second = (Leadership(api, "ns", "pod", clock) for _ in range(2))
    assert first.tick()
    assert first.identity != second.identity
    for _ in range(10):
        clock.now += 5
        assert first.tick()
        assert not second.tick()
        assert (first.leads, second.leads) == (True, False)
    clock.now += LEASE_SECONDS - 1
    assert not second.tick()
    clock.now += 2
    assert second.tick()
    assert api.lease is not None
    assert api.lease["spec"]["leaseTransitions"] == 1
    assert not first.tick()
    with pytest.raises(ApiError, match="does not hold the Lease"):
        first.check()


def test_a_leader_that_cannot_renew_stops_before_another_may_follow() -> None:
    clock, api = Clock(), OneLease()
    leader = Leadership(api, "ns", "pod", clock)
    leader.tick()
    api.away = True
    clock.now += RENEW_WITHIN + 0.1
    with pytest.raises(ApiError):
        leader.tick()
    assert not leader.leads
    assert RENEW_WITHIN < LEASE_SECONDS


def test_an_operator_that_ends_hands_the_lease_on_at_once() -> None:
    clock, api = Clock(), OneLease()
    first, second = (Leadership(api, "ns", "pod", clock) for _ in range(2))
    first.tick()
    assert not second.tick()
    first.release()
    assert not first.leads
    assert second.tick()


def test_two_that_ask_at_once_do_not_both_lead() -> None:
    clock, api = Clock(), OneLease()
    first, second = (Leadership(api, "ns", "pod", clock) for _ in range(2))
    first.tick()
    first.release()
    old = dict(api.lease or {})
    assert second.tick()
    real = api.request
    api.request = lambda method, path, body=None, **_: old if method == "GET" else real(method, path, body)  # type: ignore[method-assign]
    assert not first.tick()


# ---- what was seen --------------------------------------------------------------------------------------------------


def pod(name: str, version: int, run: str = "a") -> dict[str, Any]:
    labels = {names.LABEL_RUN: run}
    return {"metadata": {"name": name, "namespace": "default", "resourceVersion": str(version), "labels": labels}}


def test_an_older_version_never_replaces_a_newer_one() -> None:
    seen = Seen()
    seen.put("pod", pod("p", 5))
    seen.put("pod", pod("p", 4))
    assert [each["metadata"]["resourceVersion"] for each in seen.of_run("pod", A)] == ["5"]


def test_a_list_heals_what_a_watch_missed_and_says_whose_it_was() -> None:
    seen = Seen()
    for document in (pod("gone", 5, "a"), pod("kept", 6, "b"), pod("newer", 20, "b")):
        seen.put("pod", document)
    assert seen.replace("pod", [pod("kept", 6, "b"), pod("found", 7, "c")], "10") == [A, ("default", "c")]
    assert seen.of_run("pod", A) == []
    assert [each["metadata"]["name"] for each in seen.of_run("pod", B)] == ["kept", "newer"]


def test_only_what_is_read_of_an_object_is_kept() -> None:
    """A thousand runs' Jobs and pods are 300 MB with what only the kubelet reads."""
    seen = Seen()
    for kind in ("run", "job", "pod"):
        document = pod("a", 1)
        document["metadata"]["managedFields"] = [{"manager": "x"}]
        document |= {"spec": {"suspend": False, "template": {"spec": {}}}, "status": {"phase": "Running"}}
        seen.put(kind, document)  # type: ignore[arg-type]
        assert "managedFields" in document["metadata"]  # it is the caller's
    [job], [its_pod], run = seen.of_run("job", A), seen.of_run("pod", A), seen.run(A)
    assert run is not None
    assert [each for each in (job, its_pod, run) if "managedFields" in each["metadata"]] == []
    assert job["spec"] == {"suspend": False}
    assert "spec" not in its_pod
    assert run["spec"]["template"] == {"spec": {}}
    assert [each["status"]["phase"] for each in (job, its_pod, run)] == ["Running"] * 3


def test_what_is_gone_is_dropped() -> None:
    seen = Seen()
    seen.put("run", pod("a", 1))
    seen.put("pod", pod("p", 2))
    seen.drop("pod", pod("p", 3))
    seen.drop("pod", pod("never", 3))
    assert (seen.of_run("pod", A), seen.runs()) == ([], [A])
    seen.drop("run", pod("a", 4))
    assert seen.run(A) is None


@pytest.mark.parametrize("phase", ["Failed", "Succeeded"])
def test_how_a_deleted_pod_ended_stays_known_until_the_next_listing(phase: str) -> None:
    seen = Seen()
    seen.put("pod", pod("p", 2) | {"status": {"phase": "Running"}})
    seen.drop("pod", pod("p", 3) | {"status": {"phase": phase}})
    assert [each["status"]["phase"] for each in seen.of_run("pod", A)] == [phase]
    assert seen.replace("pod", [], "4") == [A]
    assert seen.of_run("pod", A) == []


# ---- metrics and events ---------------------------------------------------------------------------------------------


def test_progress_is_read_from_a_page_of_metrics() -> None:
    registry = CollectorRegistry()
    for name, value in (
        (names.METRIC_STEP, 3), (names.METRIC_STEPS, 9), (names.METRIC_ETA, 12.5), (names.METRIC_STARTED, 1000),
    ):  # fmt: skip
        Gauge(name, "x", registry=registry).set(value)
    Gauge(names.METRIC_FIGURE, "x", ["name"], registry=registry).labels("reward").set(0.5)
    Gauge(names.METRIC_PHASE, "x", ["phase"], registry=registry).labels("training").set(1)
    found = parsed(generate_latest(registry).decode(), "ppo")
    assert found is not None
    assert (found.step, found.total, found.phase, found.metrics) == (3, 9, "training", {"reward": 0.5})
    assert (found.eta_seconds, found.started_at) == (12.5, 1000)


@pytest.mark.parametrize(
    "page", ["", "<html>", "rlhf_stage_step NaN\nrlhf_stage_steps 3\n", "rlhf_stage_step{ 1", "rlhf_stage_step 1\n"]
)
def test_a_page_of_something_else_is_no_progress(page: str) -> None:
    assert parsed(page, "ppo") is None


@contextmanager
def serving(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """The port of something that takes one connection and deals with it as `answer` does."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with server.accept()[0] as connection, suppress(OSError):
                connection.recv(1 << 16)
                answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


def test_progress_is_read_over_http() -> None:
    registry = CollectorRegistry()
    for name in (names.METRIC_STEP, names.METRIC_STEPS):
        Gauge(name, "x", registry=registry).set(3)
    server, thread = start_http_server(0, "127.0.0.1", registry)
    try:
        found = progress_from("127.0.0.1", "ppo", server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert found is not None
    assert (found.step, found.total) == (3, 3)


@pytest.mark.parametrize("head", [b"", b"HTTP/1.0 200 OK\r\n\r\n"], ids=["head", "body"])
def test_a_pod_that_drips_holds_nobody_for_long(head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_metrics, "SECONDS", 0.5)

    def drip(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(b"#")
            time.sleep(0.05)

    began = time.monotonic()
    with serving(drip) as port:
        assert progress_from("127.0.0.1", "ppo", port) is None
        assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.0 404 Not Found\r\n\r\nrlhf_stage_step 1\nrlhf_stage_steps 3\n",
        b"rlhf_stage_step 1\nrlhf_stage_steps 3\n",
        b"HTTP/1.0 200 OK\r\n\r\n" + b"# much\n" * (1 << 18),
    ],
    ids=["nothing", "refusal", "no HTTP", "too much"],
)
def test_an_answer_of_another_kind_is_no_progress(answer: bytes) -> None:
    with serving(lambda connection: connection.sendall(answer)) as port:
        assert progress_from("127.0.0.1", "ppo", port) is None


def test_nobody_there_is_no_progress() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert progress_from("127.0.0.1", "ppo", port) is None


def test_runs_are_counted_by_phase() -> None:
    metrics = OperatorMetrics()
    metrics.count_runs([{"status": {"phase": "Failed"}}, {}, {"status": {"phase": "Failed"}}])
    page = generate_latest(metrics.registry).decode()
    assert 'rlhf_operator_runs{phase="Failed"} 2.0' in page
    assert 'rlhf_operator_runs{phase="Pending"} 1.0' in page
    metrics.count_runs([])
    assert 'rlhf_operator_runs{phase="Failed"} 0.0' in generate_latest(metrics.registry).decode()


def status(**stage: Any) -> RunStatus:
    return RunStatus(stages=[StageStatus(name="ppo", **stage)])


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (None, status(), []),
        (status(), status(state="Running", attempt=1, job="j"), ["StageStarted: ppo: attempt 1, Job j"]),
        (status(state="Running", attempt=1), status(state="Running", attempt=1, progress="3/9"), []),
        (
            status(state="Running", attempt=1),
            status(state="Waiting", attempt=1, failure="infrastructure", message="away"),
            ["StageFailed: ppo: infrastructure: away"],
        ),
        (
            status(state="Waiting", attempt=1, failure="infrastructure", message="away"),
            status(state="Running", attempt=2),
            ["Retrying: ppo: attempt 2, after: away"],
        ),
        (
            status(state="Waiting", attempt=1, failure="outOfMemory", message="out of memory"),
            status(state="Running", attempt=2, lowered="microBatchSize 4 instead of 8"),
            ["Retrying: ppo: attempt 2 with microBatchSize 4 instead of 8, after: out of memory"],
        ),
        (
            status(state="Running", attempt=1),
            status(state="Succeeded", attempt=1, metrics={"reward": 1.23456}),
            ["StageSucceeded: ppo: reward 1.235"],
        ),
        (status(), status(state="Reused", artifact="policy/1"), ["StageReused: ppo: policy/1 was there already"]),
    ],
)
def test_a_change_of_status_is_told_once(before: RunStatus | None, after: RunStatus, told: list[str]) -> None:
    assert [f"{event.reason}: {event.message}" for event in events_between(before, after)] == told
    assert events_between(after, after) == []


def test_conditions_are_told_when_they_change() -> None:
    failed = Condition(type="Failed", status="True", reason="User", message="no")
    events = events_between(RunStatus(), RunStatus(conditions=[failed]))
    assert [(event.kind, event.reason, event.message) for event in events] == [("Warning", "RunFailed", "User: no")]
