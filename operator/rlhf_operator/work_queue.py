"""Keys of runs to look at: each at most once in the queue and at one worker at a time, now or at a time to come."""

import asyncio
import heapq
import random
import time
from collections.abc import Callable
from typing import Final

from rlhf_operator.seen import Key

FIRST_RETRY_SECONDS: Final = 1.0  # doubled with each failure in a row
MAX_RETRY_SECONDS: Final = 60.0


class WorkQueue:
    """Of one event loop, and not safe to use from other threads. `clock` gives Unix time."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._ready: asyncio.Queue[Key] = asyncio.Queue()
        self._waiting: set[Key] = set()  # in _ready
        self._busy: dict[Key, float] = {}  # since when a worker has it
        self._again: set[Key] = set()  # heard of while a worker had it
        self._later: dict[Key, float] = {}
        self._heap: list[tuple[float, Key]] = []
        self._failures: dict[Key, int] = {}
        self._moved = asyncio.Event()

    def add(self, key: Key) -> None:
        """Look at this run as soon as a worker is free."""
        self._later.pop(key, None)
        if key in self._busy:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._ready.put_nowait(key)

    def add_at(self, key: Key, when: float) -> None:
        """Look at this run at a Unix time, or before if something is heard of it."""
        if when <= self._clock():
            self.add(key)
            return
        self._later[key] = when
        heapq.heappush(self._heap, (when, key))
        self._moved.set()

    async def take(self) -> Key:
        """The next run; whoever takes it calls `done`."""
        key = await self._ready.get()
        self._waiting.discard(key)
        self._busy[key] = self._clock()
        return key

    def done(self, key: Key, again_at: float | None) -> None:
        """The look at a run has ended well; `again_at` is when to look again, if ever."""
        self._failures.pop(key, None)
        self._free(key, again_at)

    def failed(self, key: Key) -> float:
        """The look at a run failed: it is tried again, later each time. Returns the seconds until then."""
        count = self._failures[key] = self._failures.get(key, 0) + 1
        most = min(FIRST_RETRY_SECONDS * 2.0 ** min(count - 1, 10), MAX_RETRY_SECONDS)
        delay = most * random.uniform(0.5, 1.0)
        self._again.discard(key)  # or a stream of events would undo the wait
        self._free(key, self._clock() + delay)
        return delay

    async def run_timer(self) -> None:
        """Move the runs whose time has come. Runs until it is cancelled."""
        while True:
            now = self._clock()
            while self._heap and self._heap[0][0] <= now:
                when, key = heapq.heappop(self._heap)
                if self._later.get(key) == when:
                    self.add(key)
            self._moved.clear()
            pause = min(self._heap[0][0] - now, 60.0) if self._heap else 60.0
            try:
                await asyncio.wait_for(self._moved.wait(), pause)
            except TimeoutError:
                continue

    @property
    def depth(self) -> int:
        """Runs that wait for a worker."""
        return len(self._waiting)

    @property
    def oldest(self) -> float | None:
        """Unix time since which the slowest worker has had its run; None if all are free."""
        return min(self._busy.values(), default=None)

    def _free(self, key: Key, again_at: float | None) -> None:
        del self._busy[key]
        if key in self._again:
            self._again.discard(key)
            self.add(key)
        elif again_at is not None:
            self.add_at(key, again_at)
