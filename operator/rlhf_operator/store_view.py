"""What the operator knows of object stores: whether they work, and which artifacts of a run's chain are committed."""

import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from rlhf_api.errors import IntegrityError, StoreError, UserError
from rlhf_api.run import ObjectStore, RLHFRun, RunStatus
from rlhf_api.stage import ArtifactRef, StoreConfig
from rlhf_operator.local import observe_store
from rlhf_operator.operator_settings import OperatorSettings
from rlhf_operator.plan import Attempt, shortened
from rlhf_operator.stages import chain
from rlhf_store.artifacts import Artifacts, open_artifacts

PROBE_SECONDS: Final = 300.0  # that a store which took a write is believed to take the next
START_SECONDS: Final = 15.0  # the same, and that what it holds is believed, where a stage is about to start
PROBLEM_SECONDS: Final = 10.0  # that a store which failed one run is not asked for another
PATIENCE: Final = 5.0  # seconds for an answer: others wait behind it
PROBE: Final = "probe/"
MAX_STORES: Final = 64  # whose clients are kept; one used again after that is opened and proved anew
MAX_RUNS: Final = 4096  # of which something is kept; that of one which was deleted at work is never asked for again

Figures = Mapping[str, Mapping[str, float]]
"""kind/digest -> the figures of an artifact."""


@dataclass(frozen=True)
class StoreSeen:
    """The committed artifacts of one run's chain; why the store could not be asked; whether it is asked at all."""

    artifacts: Figures
    problem: str | None = None
    damage: str | None = None
    """What is wrong with one of the run's artifacts; the store is none the worse for it."""
    asked: bool = True
    answer_seconds: float | None = None
    """That it took the store to answer a small write, when it was first proved."""


@dataclass
class _Health:
    """What is known of whether one store works."""

    proved: float | None = None
    answer_seconds: float | None = None
    failed: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class _Found:
    """The artifacts of a run, when they were looked for, and what would have to be the same for that to hold."""

    token: object
    at: float
    artifacts: Figures


class StoreView:
    """Asks the stores, with the operator's own credentials, and no more often than something can have changed.

    Safe to use from several threads. `monotonic` gives seconds.
    """

    def __init__(self, settings: OperatorSettings, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._monotonic = settings, monotonic
        self._lock = threading.Lock()
        self._opened: OrderedDict[str, Artifacts] = OrderedDict()
        self._health: OrderedDict[str, _Health] = OrderedDict()
        self._found: OrderedDict[str, _Found] = OrderedDict()

    def look(
        self, run: RLHFRun, attempts: Mapping[str, Sequence[Attempt]], asked_at: float, to_start: bool = False
    ) -> StoreSeen:
        """What is known of the run's artifacts now. A store that fails is a problem in the answer, never an error.

        `to_start`: a stage is about to start, for which what was true minutes ago does not do.
        """
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
            found = self._found.get(uid)
            health = self._health_of(store)
        known = dict(found.artifacts) if found else known_of(run.status)
        if (problem := self._problem(health)) is not None:
            return StoreSeen(known, problem)
        try:
            self._prove(health, store, START_SECONDS if to_start else PROBE_SECONDS)
            if found is None or found.token != token or (to_start and self._is_old(found)):
                artifacts = self._artifacts(store)
                now, links = self._monotonic(), chain(shortened(run, {}, attempts, asked_at, run.status), {})
                found = _Found(token, now, observe_store(links, artifacts))
        except IntegrityError as error:
            return StoreSeen(known, damage=str(error))
        except UserError as error:
            return StoreSeen(known, str(error))
        except StoreError as error:
            with self._lock:
                health.failed, health.problem = self._monotonic(), str(error)
                health.proved = health.answer_seconds = None
            return StoreSeen(known, str(error))
        with self._lock:
            self._found[uid] = found
            _keep_newest(self._found, uid, MAX_RUNS)
        return StoreSeen(found.artifacts, answer_seconds=health.answer_seconds)

    def remove(self, asked: ObjectStore, refs: Sequence[ArtifactRef]) -> None:
        """Delete artifacts. Does nothing where only the stages have the credentials. Raises StoreError."""
        if self._settings.can_ask(asked):
            artifacts = self._artifacts(self._settings.store_of(asked))
            for ref in refs:
                artifacts.remove(ref)

    def forget(self, uid: str) -> None:
        """Drop what is kept for a run that is gone or at rest."""
        with self._lock:
            self._found.pop(uid, None)

    def _health_of(self, store: StoreConfig) -> _Health:
        """What is known of a store. To be called with the lock held."""
        found = self._health.setdefault(str(store), _Health())
        _keep_newest(self._health, str(store), MAX_RUNS)
        return found

    def _problem(self, health: _Health) -> str | None:
        with self._lock:
            recent = health.failed is not None and self._monotonic() - health.failed < PROBLEM_SECONDS
            return health.problem if recent else None

    def _is_old(self, found: _Found) -> bool:
        return self._monotonic() - found.at >= START_SECONDS

    def _artifacts(self, store: StoreConfig) -> Artifacts:
        with self._lock:
            found = self._opened.get(str(store)) or open_artifacts(store, PATIENCE)
            self._opened[str(store)] = found
            _keep_newest(self._opened, str(store), MAX_STORES)
            return found

    def _prove(self, health: _Health, store: StoreConfig, seconds: float) -> None:
        """Write and remove a small object, as a stage will: credentials, bucket, space, one winner of two writers.

        A proof of less than `seconds` ago does.
        """
        with self._lock:
            if health.proved is not None and self._monotonic() - health.proved < seconds:
                return
        artifacts = self._artifacts(store)
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
            health.proved, health.failed = self._monotonic(), None
            if health.answer_seconds is None:
                health.answer_seconds = answered


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
