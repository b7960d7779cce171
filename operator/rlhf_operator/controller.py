"""The operator at work: what is heard becomes keys in a queue, workers reconcile them, one Lease says who may.

Every blocking call is made in a thread; the event loop only hands out work.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, Final

from prometheus_client import start_http_server

from rlhf_api.errors import RLHFError
from rlhf_operator.cluster import KubernetesCluster
from rlhf_operator.kubernetes_api import KubernetesApi
from rlhf_operator.leadership import TICK_SECONDS, Leadership
from rlhf_operator.operator_metrics import OperatorMetrics
from rlhf_operator.operator_settings import OperatorSettings
from rlhf_operator.pod_template import Document
from rlhf_operator.reconcile import Reconciler
from rlhf_operator.seen import Key, Kind, Seen, run_of
from rlhf_operator.store_view import StoreView
from rlhf_operator.work_queue import WorkQueue

STUCK_SECONDS: Final = 120.0
RELIST_SECONDS: Final = 300.0
RELIST_RETRY_SECONDS: Final = 5.0
KINDS: Final[tuple[Kind, ...]] = ("job", "pod", "run")

log = logging.getLogger("rlhf_operator")


class Controller:
    """One operator. Of one event loop; `heard`, `start` and `stop` are called in it."""

    def __init__(
        self,
        settings: OperatorSettings,
        api: KubernetesApi,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._clock = settings, clock
        self.seen = Seen()
        self.metrics = OperatorMetrics()
        self.queue = WorkQueue(clock)
        self.leadership = Leadership(api, settings.namespace, settings.identity, monotonic)
        self._cluster = KubernetesCluster(api, self.seen, settings.watch_namespaces, self.leadership.check)
        self._reconciler = Reconciler(self._cluster, settings, StoreView(settings), clock)
        self._reconciler.acted = lambda action: self.metrics.actions.labels(action).inc()
        self._threads = ThreadPoolExecutor(settings.workers + 2, thread_name_prefix="reconcile")
        self._tasks: list[asyncio.Task[None]] = []
        self._began = self._ticked = self._finished = clock()
        self._waited_since: float | None = None  # when runs began to wait for a worker of this operator
        self._listed = asyncio.Event()
        self._leads = asyncio.Event()  # may lag: who waits for it asks `leadership` again
        self._doubt = asyncio.Event()  # asks for a list of everything

    def start(self) -> None:
        """Begin to work; returns at once."""
        start_http_server(self._settings.metrics_port, registry=self.metrics.registry)
        jobs: list[Coroutine[Any, Any, None]] = [self.queue.run_timer(), self._lead(), self._relist()]
        jobs += [self._work() for _ in range(self._settings.workers)]
        self._tasks = [asyncio.create_task(job) for job in jobs]

    async def stop(self) -> None:
        """End what is under way and hand the Lease on. What was begun is finished by whoever leads next."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._threads.shutdown, True, cancel_futures=True)
        try:
            await asyncio.to_thread(self.leadership.release)
        except RLHFError as error:
            log.warning("the Lease was not released: %s", error)

    def heard(self, kind: Kind, change: str | None, document: Document) -> None:
        """Take in one event of a watch. Also while another operator leads: the run waits in the queue."""
        if change == "DELETED":
            self.seen.drop(kind, document)
        else:
            self.seen.put(kind, document)
        if key := run_of(kind, document):
            self.queue.add(key)

    def health(self) -> dict[str, Any]:
        """What the probe of liveness shows. Raises RLHFError if no progress is made: a restart may help."""
        now = self._clock()
        for task in self._tasks:
            if task.done():
                raise RLHFError(f"a task of the operator has ended: {task}")
        if now - self._ticked > STUCK_SECONDS:
            raise RLHFError(f"the Lease has not been looked after for {now - self._ticked:.0f} s")
        if not self._listed.is_set() and now - self._began > STUCK_SECONDS:
            raise RLHFError(f"runs, Jobs and pods could not be listed for {now - self._began:.0f} s; none is looked at")
        since = [each for each in (self.queue.oldest, self._waited_since) if each is not None]
        if since and now - max(min(since), self._finished) > STUCK_SECONDS:
            raise RLHFError(f"no look at a run has ended for {now - self._finished:.0f} s, {self.queue.depth} wait")
        return {"leads": self.leadership.leads, "runs": len(self.seen.runs()), "queue": self.queue.depth}

    async def _work(self) -> None:
        await self._listed.wait()  # with half of the Jobs seen, a status would be half true
        while True:
            key = await self._next()
            try:
                with self.metrics.reconcile_seconds.time():
                    again_at = await self._in_thread(partial(self._reconciler.reconcile, *key))
            except RLHFError as error:
                self.metrics.failures.inc()
                log.warning("%s/%s: %s; again in %.1f s", *key, error, self.queue.failed(key))
            except Exception:  # one run's trouble must not be every run's
                self.metrics.failures.inc()
                log.exception("%s/%s: this is a bug; again in %.1f s", *key, self.queue.failed(key))
            else:
                self.queue.done(key, again_at)
            self._finished = self._clock()

    async def _next(self) -> Key:
        """The next run, once this operator leads. No run is passed over: it may never be heard of again."""
        while True:
            key = await self.queue.take()
            if self.leadership.leads:
                return key
            self.queue.done(key, self._clock())
            self._leads.clear()
            await self._leads.wait()

    async def _lead(self) -> None:
        led, term = False, 0
        while True:
            try:
                await self._in_thread(self.leadership.tick)
            except RLHFError as error:
                log.warning("the Lease could not be renewed: %s", error)
            self._ticked = self._clock()
            if leads := self.leadership.leads:
                self._leads.set()
            if leads != led:
                log.info("%s %s", self.leadership.identity, "leads" if leads else "waits for the Lease")
            if self.leadership.term != term and self._listed.is_set():
                self._doubt.set()  # whatever kept it from renewing may have kept events from coming
            waits = leads and self._listed.is_set() and self.queue.depth > 0
            self._waited_since = (self._waited_since or self._clock()) if waits else None
            led, term = leads, self.leadership.term
            self.metrics.leads.set(leads)
            self.metrics.queue_depth.set(self.queue.depth)
            self.metrics.count_runs(filter(None, map(self.seen.run, self.seen.runs())))
            await asyncio.sleep(TICK_SECONDS)

    async def _relist(self) -> None:
        """Read everything now and then, so that an event which a watch missed matters for minutes only."""
        while True:
            self._doubt.clear()  # before the list: doubts that come up meanwhile ask for another one
            try:
                for kind in KINDS:
                    for key in await self._in_thread(partial(self._cluster.list_all, kind)):
                        self.queue.add(key)
            except RLHFError as error:
                log.warning("%s", error)
                await asyncio.sleep(RELIST_RETRY_SECONDS)
                continue
            self._listed.set()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._doubt.wait(), RELIST_SECONDS)

    async def _in_thread[T](self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)
