"""Looks at one run and does what its plan says: observe, plan, publish, apply.

It may run twice, late, on old news, or die between any two calls: names are deterministic, every write is idempotent or
carries the version it is about, and nothing is decided from memory that the cluster and the store do not hold.
"""

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from pydantic import ValidationError

from rlhf_api.errors import StoreError, UserError
from rlhf_api.names import ANNOTATION_STOPPED, API_VERSION, FINALIZER, KIND, LABEL_STAGE
from rlhf_api.parse import parse_run
from rlhf_api.run import ObjectStore, RLHFRun, RunStatus
from rlhf_api.stage import Progress
from rlhf_operator.attempts import attempts_of, outcomes_to_keep
from rlhf_operator.conditions import Hold, dated, deletion_waits
from rlhf_operator.deletion import artifacts_of_none_but, finalizers, wants_cleaning, without_ours
from rlhf_operator.forks import forked
from rlhf_operator.jobs import stage_job
from rlhf_operator.kubernetes_api import AlreadyExists, Denied, Invalid
from rlhf_operator.operator_settings import OperatorSettings
from rlhf_operator.plan import Attempt, Delete, Observed, Plan, Start, Stop, asked_at, at_rest, plan, rejected
from rlhf_operator.pod_template import Document
from rlhf_operator.run_events import RunEvent, events_between
from rlhf_operator.seen import Key
from rlhf_operator.store_view import StoreView

RESYNC_SECONDS: Final = 30.0  # between looks at a run of which nothing is heard
PROGRESS_SECONDS: Final = 15.0  # between looks at a run that makes progress
SILENT_SECONDS: Final = 120.0  # that a pod which did not answer is left alone


class Cluster(Protocol):
    """The calls that a reconcile needs. Reads may lag; writes raise ApiError or Invalid."""

    def run(self, namespace: str, name: str) -> Document | None:
        """The run, or None if there is none."""

    def jobs(self, namespace: str, run: str) -> list[Document]:
        """The Jobs with the run's label."""

    def pods(self, namespace: str, run: str) -> list[Document]:
        """The pods with the run's label."""

    def job(self, namespace: str, name: str) -> Document | None:
        """The Job of that name, whoever made it, as it is now and not as it was last seen."""

    def create_job(self, job: Document) -> None:
        """Create a Job. Raises AlreadyExists, Invalid, Denied, or another ApiError."""

    def stop_job(self, job: Document, now: float) -> None:
        """Let the Job end its pod, gracefully, and start none again; it stays as a record. No error if it is gone."""

    def keep_outcome(self, job: Document, outcome: str) -> None:
        """Note on the Job how its pod ended. No error if it is gone."""

    def write_status(self, run: Document, patch: Document) -> None:
        """Merge `patch` into the run's status. Raises Conflict if the run is not as it is in `run` any more."""

    def runs(self) -> list[Document]:
        """Every run that the operator serves."""

    def set_finalizers(self, run: Document, finalizers: list[str]) -> None:
        """Who has to agree before the run is gone. Raises Conflict if it is not as in `run` any more; not if gone."""

    def delete_run(self, run: Document) -> None:
        """Delete the run, and with it its Jobs. No error if it is gone."""

    def record(self, run: Document, event: RunEvent) -> None:
        """Write an event on the run. Never fails: an event is no record."""

    def progress(self, pod: Document, stage: str) -> Progress | None:
        """What a running pod says of itself; None if it does not answer."""


@dataclass
class _Memory:
    """What is kept of a run between looks. Losing it costs a few calls and changes nothing."""

    uid: str
    generation: int | None = None
    refused: dict[str, str] = field(default_factory=dict)
    held: dict[str, Hold] = field(default_factory=dict)
    progress: dict[str, Progress] = field(default_factory=dict)
    ask_pod_at: dict[str, float] = field(default_factory=dict)


class Reconciler:
    """Reconciles runs, each from one thread at a time, different ones from several. `clock` gives Unix time."""

    def __init__(
        self, cluster: Cluster, settings: OperatorSettings, store: StoreView, clock: Callable[[], float]
    ) -> None:
        self._cluster, self._settings, self._store, self._clock = cluster, settings, store, clock
        self._lock = threading.Lock()
        self._memories: dict[Key, _Memory] = {}
        self.acted: Callable[[str], None] = lambda _: None
        """Told of each action: start, stop, kept, delete, cleaned, status, refused, held. For metrics."""

    def reconcile(self, namespace: str, name: str) -> float | None:
        """Look at a run once. Returns the Unix time to look again if nothing is heard before; None: never.

        Raises ApiError if the API server fails: look again soon.
        """
        document = self._cluster.run(namespace, name)
        if document is None:
            self._forget((namespace, name))
            return None  # its Jobs go with it: they are owned
        now = self._clock()
        uid = document["metadata"]["uid"]
        if document["metadata"].get("deletionTimestamp"):
            return self._clean_up(document, now) if FINALIZER in finalizers(document) else None
        before = _status_in(document)
        run = _run_in(document, before)
        if isinstance(run, RLHFRun) and wants_cleaning(run) != (FINALIZER in finalizers(document)):
            wanted = [*finalizers(document), FINALIZER] if wants_cleaning(run) else without_ours(document)
            self._cluster.set_finalizers(document, wanted)
            return now  # there is a newer version of it now
        generation, suspend, ttl_seconds = _asked_in(document)
        if (rest := at_rest(before, generation, suspend, ttl_seconds, now)) is not None:
            self._forget((namespace, name))
            self._publish(document, before, rest.status)
            if rest.actions == (Delete(),):
                self._cluster.delete_run(document)
                self.acted("delete")
            return rest.wake_at
        jobs = self._jobs_of(document)
        if not isinstance(run, RLHFRun):
            return self._reject(document, before, run, jobs, now)
        memory = self._memory((namespace, name), uid, run.metadata.generation)
        run, fork = self._forked(run)
        observed = self._observe(run, fork, list(jobs.values()), memory, now)
        decided = plan(run, observed, now)
        if any(isinstance(action, Start) for action in decided.actions):
            observed = self._with_store(run, observed, to_start=True)
            decided = plan(run, observed, now)
        # Published first: the time it was asked for must be known before an attempt is counted against it.
        place = self._settings.place_of(run.spec.object_store)
        self._publish(document, before, decided.status.model_copy(update={"store": place}))
        refused = self._apply(run, decided, observed, jobs, memory, now)
        if refused:
            return now
        return min([decided.wake_at or now + RESYNC_SECONDS, self._next_look(decided, now)])

    def _reject(
        self, document: Document, before: RunStatus | None, complaint: str, jobs: Mapping[str, Document], now: float
    ) -> float:
        """Stop what runs of a resource that is no run, and say so; returns when to look again."""
        namespace, name = document["metadata"]["namespace"], document["metadata"]["name"]
        generation, suspend, _ = _asked_in(document)
        attempts = attempts_of(jobs.values(), self._cluster.pods(namespace, name), {}, now)
        decided = rejected(name, generation, suspend, complaint, attempts, before, now)
        self._publish(document, before, decided.status)
        self._stop_attempts(decided, attempts, jobs, now)
        return now + RESYNC_SECONDS

    def _jobs_of(self, document: Document) -> dict[str, Document]:
        """The run's own Jobs by name; those of an earlier run of its name are not."""
        metadata = document["metadata"]
        found = self._cluster.jobs(metadata["namespace"], metadata["name"])
        return {job["metadata"]["name"]: job for job in found if _owner(job) == metadata["uid"]}

    def _clean_up(self, document: Document, now: float) -> float | None:
        """End what still runs, delete the artifacts of this run alone, and let it go; returns when to look again."""
        namespace, name = document["metadata"]["namespace"], document["metadata"]["name"]
        jobs = self._jobs_of(document)
        made = attempts_of(jobs.values(), self._cluster.pods(namespace, name), {}, now)
        if alive := [attempt for each in made.values() for attempt in each if attempt.finished is None]:
            for attempt in alive:
                self._stop(jobs[attempt.job or ""], now)
            return now + RESYNC_SECONDS
        store = (document.get("spec") or {}).get("objectStore") or {}
        try:
            asked = ObjectStore.model_validate(store)
        except ValidationError:  # it never was a run, and made nothing
            asked = None
        doomed = artifacts_of_none_but(document, self._cluster.runs())
        if asked is not None and doomed:
            try:
                self._store.remove(asked, doomed)
            except (StoreError, UserError) as error:
                self._publish_deletion_waits(document, str(error), now)
                return now + RESYNC_SECONDS
        self._cluster.set_finalizers(document, without_ours(document))
        self.acted("cleaned")
        self._forget((namespace, name))
        return None

    def _publish_deletion_waits(self, document: Document, problem: str, now: float) -> None:
        before, generation = _status_in(document), document["metadata"].get("generation")
        status = before or RunStatus()
        kept = [each for each in status.conditions if each.type != "StoreReady"]
        [waits] = dated([deletion_waits(problem)], before, generation, now)
        self._publish(document, before, status.model_copy(update={"conditions": [*kept, waits]}))

    def _stop(self, job: Document, now: float) -> None:
        if ANNOTATION_STOPPED not in job["metadata"].get("annotations", {}):
            self._cluster.stop_job(job, now)
            self.acted("stop")

    def _forked(self, run: RLHFRun) -> tuple[RLHFRun, Hold | None]:
        """The run with what it takes over from another one; or why it has to wait for that."""
        if run.spec.fork_from is None:
            return run, None
        document = self._cluster.run(run.metadata.namespace or "default", run.spec.fork_from.run)
        source = (_status_in(document) or RunStatus()) if document else None
        mine = self._settings.place_of(run.spec.object_store)
        if source is not None and source.store is not None and source.store.url != mine.url:
            where = f"spec.forkFrom.run: {run.spec.fork_from.run} keeps its artifacts in {source.store.url}"
            return run, Hold("ForkSourceElsewhere", f"{where}, this run in {mine.url}; give both one spec.objectStore")
        return forked(run, source)

    def _observe(self, run: RLHFRun, fork: Hold | None, jobs: list[Document], memory: _Memory, now: float) -> Observed:
        pods = self._cluster.pods(run.metadata.namespace or "default", run.metadata.name)
        mine = {job["metadata"]["uid"] for job in jobs}
        pods = [pod for pod in pods if _owner(pod) in mine]
        self._ask_pods(pods, memory, now)
        for job, outcome in outcomes_to_keep(jobs, pods, now):
            self._cluster.keep_outcome(job, outcome)
            self.acted("kept")
        attempts = attempts_of(jobs, pods, memory.progress, now)
        every = [attempt for made in attempts.values() for attempt in made]
        observed = Observed(
            attempts=attempts,
            asked_at=asked_at(run, run.status, every, now),
            status=run.status,
            refused=dict(memory.refused),
            held=dict(memory.held),
            fork=fork,
        )
        return self._with_store(run, observed)

    def _with_store(self, run: RLHFRun, observed: Observed, to_start: bool = False) -> Observed:
        """`observed` with what is known of the run's store, at most seconds old where a stage is about to start."""
        store = self._store.look(run, observed.attempts, observed.asked_at, to_start)
        return replace(
            observed,
            artifacts=store.artifacts,
            store_problem=store.problem,
            damage=store.damage,
            store_asked=store.asked,
            store_answer_seconds=store.answer_seconds,
        )

    def _ask_pods(self, pods: list[Document], memory: _Memory, now: float) -> None:
        alive = {pod["metadata"]["uid"]: pod for pod in pods if pod.get("status", {}).get("phase") == "Running"}
        for uid, pod in alive.items():
            if now < memory.ask_pod_at.get(uid, 0.0):
                continue
            found = self._cluster.progress(pod, pod["metadata"]["labels"].get(LABEL_STAGE, ""))
            # A pod that just started does not serve yet; one that never answers is asked less often.
            silent = found is None and uid in memory.ask_pod_at
            memory.ask_pod_at[uid] = now + (SILENT_SECONDS if silent else PROGRESS_SECONDS * 0.6)
            if found is not None:
                memory.progress[uid] = found

    def _publish(self, document: Document, before: RunStatus | None, status: RunStatus) -> None:
        """Write the status if it differs from the one in `document`, then the events that the change is worth."""
        wanted = status.model_dump(mode="json", by_alias=True, exclude_none=True)
        patch = merge_patch(document.get("status") or {}, wanted)
        if not patch:
            return
        self._cluster.write_status(document, patch)
        self.acted("status")
        for event in events_between(before, status):
            self._cluster.record(document, event)

    def _apply(
        self,
        run: RLHFRun,
        decided: Plan,
        observed: Observed,
        jobs: Mapping[str, Document],
        memory: _Memory,
        now: float,
    ) -> bool:
        """Do what was decided. Returns whether something turned out to be impossible, which the next plan must hear."""
        self._stop_attempts(decided, observed.attempts, jobs, now)
        news = False
        for action in decided.actions:
            if isinstance(action, Start):
                news |= self._start(run, action, observed, memory)
        return news

    def _stop_attempts(
        self, decided: Plan, attempts: Mapping[str, Sequence[Attempt]], jobs: Mapping[str, Document], now: float
    ) -> None:
        for action in decided.actions:
            if isinstance(action, Stop):
                attempt = next(a for a in attempts[action.stage] if a.number == action.number)
                self._stop(jobs[attempt.job or ""], now)

    def _start(self, run: RLHFRun, action: Start, observed: Observed, memory: _Memory) -> bool:
        stage, held = action.link.name, memory.held.get(action.link.name)
        try:
            job = stage_job(run, action.link, action.number, self._settings, observed.asked_at)
            self._cluster.create_job(job)
        except AlreadyExists:
            there = self._cluster.job(job["metadata"]["namespace"], job["metadata"]["name"])
            if there is None or _owner(there) == run.metadata.uid:
                return False  # made by the operator before this one, or not seen yet
            memory.held[stage] = _name_taken(there)
            self.acted("held")
            return held != memory.held[stage]
        except (UserError, Invalid) as error:
            memory.refused[stage] = str(error)
            self.acted("refused")
            return True
        except Denied as error:
            memory.held[stage] = Hold("Denied", str(error))
            self.acted("held")
            return held is None
        memory.held.pop(stage, None)
        self.acted("start")
        return False

    def _next_look(self, decided: Plan, now: float) -> float:
        running = any(stage.state == "Running" for stage in decided.status.stages)
        return now + (PROGRESS_SECONDS if running else RESYNC_SECONDS) * random.uniform(0.8, 1.2)

    def _memory(self, key: Key, uid: str, generation: int | None) -> _Memory:
        with self._lock:
            memory = self._memories.get(key)
            if memory is None or memory.uid != uid:
                memory = self._memories[key] = _Memory(uid)
        if memory.generation != generation:
            memory.generation, memory.refused, memory.held = generation, {}, {}
        return memory

    def _forget(self, key: Key) -> None:
        with self._lock:
            memory = self._memories.pop(key, None)
        if memory is not None:
            self._store.forget(memory.uid)


def merge_patch(old: Mapping[str, Any], new: Mapping[str, Any]) -> Document:
    """The JSON merge patch (RFC 7386) that makes `old` into `new`; empty if they are equal."""
    patch: Document = {name: None for name in old if name not in new}
    for name, value in new.items():
        below = old.get(name)
        if isinstance(value, dict) and isinstance(below, dict):
            if inner := merge_patch(below, value):
                patch[name] = inner
        elif value != below or name not in old:
            patch[name] = value
    return patch


def _owner(document: Document) -> str | None:
    controller = _controller(document)
    return controller["uid"] if controller else None


def _controller(document: Document) -> Document | None:
    owners: list[Document] = document["metadata"].get("ownerReferences", [])
    return next((owner for owner in owners if owner.get("controller")), None)


def _name_taken(job: Document) -> Hold:
    owner = _controller(job)
    whose = f"{owner['kind']} {owner['name']} (uid {owner['uid']})" if owner else "nobody"
    message = f"the Job {job['metadata']['name']} of {whose} has the name that this run's would have"
    return Hold("NameTaken", f"{message}; it waits until that one is gone")


def _status_in(document: Document) -> RunStatus | None:
    """The status, or None if there is none or another version wrote it: it is made anew."""
    try:
        return RunStatus.model_validate(document["status"]) if document.get("status") else None
    except ValidationError:
        return None


def _asked_in(document: Document) -> tuple[int | None, bool, int | None]:
    """Generation, spec.suspend and spec.ttlSecondsAfterFinished: what the API server alone vouches for."""
    spec = document.get("spec") or {}
    return document["metadata"].get("generation"), bool(spec.get("suspend")), spec.get("ttlSecondsAfterFinished")


def _run_in(document: Document, status: RunStatus | None) -> RLHFRun | str:
    """The run, or every complaint if it is none; what breaks a rule alone is left to the plan."""
    # The items of a list need not say what they are.
    plain = {"apiVersion": API_VERSION, "kind": KIND, "metadata": document["metadata"], "spec": document.get("spec")}
    try:
        run = RLHFRun.model_validate(plain, strict=True, by_alias=True, by_name=False)
    except ValidationError:
        try:
            run = parse_run(plain)
        except UserError as error:
            return str(error)
    return run.model_copy(update={"status": status})
