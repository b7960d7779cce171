"""What the operator knows of object stores: whether they work, and which artifacts of a run's chain are committed."""

import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from rlhf_api.errors import RLHFError
from rlhf_api.run import ObjectStore, RLHFRun, RunStatus
from rlhf_api.stage import ArtifactRef, StoreConfig
from rlhf_operator.local import observe_store
from rlhf_operator.operator_settings import OperatorSettings
from rlhf_operator.plan import Attempt
from rlhf_operator.stages import chain
from rlhf_store.artifacts import Artifacts, open_artifacts

PROBE_SECONDS: Final = 300.0  # that a store which took a write is believed to take the next
PROBLEM_SECONDS: Final = 10.0  # that a store which failed one run is not asked for another
PATIENCE: Final = 5.0  # seconds for an answer: others wait behind it
PROBE: Final = "probe/"

Figures = Mapping[str, Mapping[str, float]]
"""kind/digest -> the figures of an artifact."""


@dataclass(frozen=True)
class StoreSeen:
    """The committed artifacts of one run's chain; why the store could not be asked; whether it is asked at all."""

    artifacts: Figures
    problem: str | None = None
    asked: bool = True


class StoreView:
    """Asks the stores, with the operator's own credentials, and no more often than something can have changed.

    Safe to use from several threads. `monotonic` gives seconds.
    """

    def __init__(self, settings: OperatorSettings, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._monotonic = settings, monotonic
        self._lock = threading.Lock()
        self._stores: dict[str, Artifacts] = {}
        self._proved: dict[str, float] = {}
        self._problems: dict[str, tuple[float, str]] = {}
        self._found: dict[str, tuple[object, Figures]] = {}

    def look(self, run: RLHFRun, attempts: Mapping[str, Sequence[Attempt]]) -> StoreSeen:
        """What is known of the run's artifacts now. A store that fails is a problem in the answer, never an error."""
        if not self._settings.can_ask(run.spec.object_store):
            return StoreSeen({**known_of(run.status), **_reported(attempts)}, asked=False)
        uid = run.metadata.uid or ""
        # Asked again when an attempt has ended, which may have committed something, or when the run has changed.
        token = (
            run.metadata.generation,
            run.status.taken if run.status else {},
            [(stage, a.number) for stage in attempts for a in attempts[stage] if a.finished],
        )
        with self._lock:
            before = self._found.get(uid)
        if before is not None and before[0] == token:
            return StoreSeen(before[1])
        store = self._settings.store_of(run.spec.object_store)
        known = dict(before[1]) if before else known_of(run.status)
        if (problem := self._problem(store)) is not None:
            return StoreSeen(known, problem)
        try:
            artifacts = self._opened(store)
            self._prove(store, artifacts)
            found = observe_store(chain(run, {}), artifacts)
        except RLHFError as error:
            with self._lock:
                self._problems[str(store)] = (self._monotonic(), str(error))
                self._proved.pop(str(store), None)
            return StoreSeen(known, str(error))
        with self._lock:
            self._found[uid] = (token, found)
        return StoreSeen(found)

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

    def _problem(self, store: StoreConfig) -> str | None:
        with self._lock:
            since, problem = self._problems.get(str(store), (0.0, ""))
            return problem if problem and self._monotonic() - since < PROBLEM_SECONDS else None

    def _opened(self, store: StoreConfig) -> Artifacts:
        with self._lock:
            if (found := self._stores.get(str(store))) is None:
                found = self._stores[str(store)] = open_artifacts(store, PATIENCE)
            return found

    def _prove(self, store: StoreConfig, artifacts: Artifacts) -> None:
        """Write and remove a small object, as a stage will: credentials, bucket, space, one winner of two writers."""
        with self._lock:
            if self._monotonic() - self._proved.get(str(store), -PROBE_SECONDS) < PROBE_SECONDS:
                return
        key = f"{PROBE}{uuid.uuid4().hex}"
        artifacts.objects.put(key, b"probe", if_none_match=True)
        artifacts.objects.delete([key])
        with self._lock:
            self._proved[str(store)] = self._monotonic()
            self._problems.pop(str(store), None)


def known_of(status: RunStatus | None) -> dict[str, Mapping[str, float]]:
    """The artifacts that a status says are committed."""
    stages = status.stages if status else []
    return {each.artifact: each.metrics for each in stages if each.artifact and each.state in ("Succeeded", "Reused")}


def _reported(attempts: Mapping[str, Sequence[Attempt]]) -> dict[str, Mapping[str, float]]:
    results = [attempt.result for made in attempts.values() for attempt in made if attempt.result]
    return {str(result.artifact): result.metrics for result in results if result.artifact}
