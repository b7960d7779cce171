"""What the operator knows of object stores: whether they work, and which artifacts of a run's chain are committed."""

import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from rlhf_api.errors import RLHFError, StoreError
from rlhf_api.run import ObjectStore, RLHFRun, RunStatus
from rlhf_api.stage import ArtifactRef, StoreConfig
from rlhf_operator.local import observe_store
from rlhf_operator.operator_settings import OperatorSettings
from rlhf_operator.plan import Attempt, shortened
from rlhf_operator.stages import chain
from rlhf_store.artifacts import Artifacts, open_artifacts

PROBE_SECONDS: Final = 300.0  # that a store which took a write is believed to take the next
PROBLEM_SECONDS: Final = 10.0  # that a store which failed one run is not asked for another
PATIENCE: Final = 5.0  # seconds for an answer: others wait behind it
PROBE: Final = "probe/"
MAX_STORES: Final = 64  # whose clients are kept; one used again after that is opened and proved anew
MAX_RUNS: Final = 4096  # whose artifacts are kept; those of one that was deleted at work are never asked for again

Figures = Mapping[str, Mapping[str, float]]
"""kind/digest -> the figures of an artifact."""


@dataclass(frozen=True)
class StoreSeen:
    """The committed artifacts of one run's chain; why the store could not be asked; whether it is asked at all."""

    artifacts: Figures
    problem: str | None = None
    asked: bool = True
    answer_seconds: float | None = None
    """That it took the store to answer a small write, when it was first proved."""


@dataclass
class _Store:
    """What is known of one store."""

    artifacts: Artifacts | None = None
    proved: float | None = None
    answer_seconds: float | None = None
    failed: float | None = None
    problem: str = ""


class StoreView:
    """Asks the stores, with the operator's own credentials, and no more often than something can have changed.

    Safe to use from several threads. `monotonic` gives seconds.
    """

    def __init__(self, settings: OperatorSettings, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._monotonic = settings, monotonic
        self._lock = threading.Lock()
        self._stores: OrderedDict[str, _Store] = OrderedDict()
        self._found: OrderedDict[str, tuple[object, Figures]] = OrderedDict()

    def look(self, run: RLHFRun, attempts: Mapping[str, Sequence[Attempt]], asked_at: float) -> StoreSeen:
        """What is known of the run's artifacts now. A store that fails is a problem in the answer, never an error."""
        if not self._settings.can_ask(run.spec.object_store):
            return StoreSeen({**known_of(run.status), **_reported(attempts)}, asked=False)
        uid = run.metadata.uid or ""
        # Asked again when an attempt has ended, which may have committed something, or when the run has changed.
        token = (
            run.metadata.generation,
            run.status.taken if run.status else {},
            [(stage, a.number) for stage in attempts for a in attempts[stage] if a.finished],
            asked_at,
        )
        store = self._settings.store_of(run.spec.object_store)
        with self._lock:
            before = self._found.get(uid)
            of_store = self._of(store)
        if before is not None and before[0] == token:
            return StoreSeen(before[1], answer_seconds=of_store.answer_seconds)
        known = dict(before[1]) if before else known_of(run.status)
        if (problem := self._problem(of_store)) is not None:
            return StoreSeen(known, problem)
        try:
            artifacts = self._opened(store)
            self._prove(of_store, artifacts)
            found = observe_store(chain(shortened(run, {}, attempts, asked_at), {}), artifacts)
        except RLHFError as error:
            with self._lock:
                of_store.failed, of_store.problem = self._monotonic(), str(error)
                of_store.proved = of_store.answer_seconds = None
            return StoreSeen(known, str(error))
        with self._lock:
            self._found[uid] = (token, found)
            _keep_newest(self._found, uid, MAX_RUNS)
        return StoreSeen(found, answer_seconds=of_store.answer_seconds)

    def remove(self, asked: ObjectStore, refs: Sequence[ArtifactRef]) -> None:
        """Delete artifacts. Does nothing where only the stages have the credentials. Raises StoreError."""
        if self._settings.can_ask(asked):
            artifacts = self._opened(self._settings.store_of(asked))
            for ref in refs:
                artifacts.remove(ref)

    def forget(self, uid: str) -> None:
        """Drop what is kept for a run that is gone or at rest."""
        with self._lock:
            self._found.pop(uid, None)

    def _of(self, store: StoreConfig) -> _Store:
        """What is known of a store. To be called with the lock held."""
        found = self._stores.setdefault(str(store), _Store())
        _keep_newest(self._stores, str(store), MAX_STORES)
        return found

    def _problem(self, store: _Store) -> str | None:
        with self._lock:
            recent = store.failed is not None and self._monotonic() - store.failed < PROBLEM_SECONDS
            return store.problem if recent else None

    def _opened(self, store: StoreConfig) -> Artifacts:
        with self._lock:
            found = self._of(store)
            if found.artifacts is None:
                found.artifacts = open_artifacts(store, PATIENCE)
            return found.artifacts

    def _prove(self, store: _Store, artifacts: Artifacts) -> None:
        """Write and remove a small object, as a stage will: credentials, bucket, space, one winner of two writers."""
        with self._lock:
            if store.proved is not None and self._monotonic() - store.proved < PROBE_SECONDS:
                return
        objects, key = artifacts.objects, f"{PROBE}{uuid.uuid4().hex}"
        objects.put(key, b"probe", if_none_match=True)  # False if it is a repetition: the first answer was lost
        began = self._monotonic()
        taken_twice = objects.put(key, b"probe", if_none_match=True)
        answered = self._monotonic() - began
        objects.delete([key])
        if taken_twice:
            raise StoreError(
                f"store {objects.url}: it took a second write with If-None-Match: * of one key, so it cannot decide "
                "between two writers of one artifact; use a store that honours conditional writes (AWS S3, MinIO, "
                "Ceph, SeaweedFS, RustFS), or let no proxy in between drop that header"
            )
        with self._lock:
            store.proved, store.failed = self._monotonic(), None
            if store.answer_seconds is None:
                store.answer_seconds = answered


def _keep_newest[T](kept: OrderedDict[str, T], used: str, most: int) -> None:
    """Drop what was not used for longest where there is more than `most`."""
    kept.move_to_end(used)
    while len(kept) > most:
        kept.popitem(last=False)


def known_of(status: RunStatus | None) -> dict[str, Mapping[str, float]]:
    """The artifacts that a status says are committed."""
    stages = status.stages if status else []
    return {each.artifact: each.metrics for each in stages if each.artifact and each.state in ("Succeeded", "Reused")}


def _reported(attempts: Mapping[str, Sequence[Attempt]]) -> dict[str, Mapping[str, float]]:
    results = [attempt.result for made in attempts.values() for attempt in made if attempt.result]
    return {str(result.artifact): result.metrics for result in results if result.artifact}
