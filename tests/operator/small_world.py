"""One run's cluster in memory and its real file store, for tests of the reconcile.

The cluster stands in for time and money only: it keeps versions, refuses stale writes and names that are taken, and can
die before or after any call. tests/cluster runs the operator on a real one.
"""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_api.errors import FailureClass
from rlhf_api.names import (
    ANNOTATION_OUTCOME,
    ANNOTATION_STOPPED,
    ENV_STAGE_CONFIG,
    EXIT_CODES,
    LABEL_RUN,
    LABEL_STAGE,
)
from rlhf_api.run import ObjectStore, RunStatus
from rlhf_api.stage import Progress, StageConfig, StageFailure, StageResult
from rlhf_operator.conditions import stamp
from rlhf_operator.kubernetes_api import AlreadyExists, Conflict
from rlhf_operator.operator_settings import OperatorSettings
from rlhf_operator.reconcile import Reconciler
from rlhf_operator.run_events import RunEvent
from rlhf_operator.store_view import StoreView
from rlhf_store.artifacts import open_artifacts

Document = dict[str, Any]
NOW = 1_800_000_000.0
STAGES_OF_RUN = ["import-model", "import-prompts", "reward", "ppo", "evaluate"]


class Crash(BaseException):
    """The operator was killed."""


class SmallCluster:
    """The API server, the Job controller and one patient node, in memory."""

    def __init__(self) -> None:
        self.now = NOW
        self.runs_: dict[str, Document] = {}
        self.jobs_: dict[str, Document] = {}
        self.pods_: dict[str, Document] = {}
        self.events: list[RunEvent] = []
        self.writes = 0
        self.crash_at: int | None = None
        self.crash_after = False
        self.refuse: Callable[[Document], None] = lambda job: None
        self.pages: dict[str, Progress] = {}
        self._versions = itertools.count(1)
        self._uids = itertools.count(1)

    # ---- what the operator calls ----

    def run(self, namespace: str, name: str) -> Document | None:
        return self._read(lambda: self.runs_.get(name))

    def jobs(self, namespace: str, run: str) -> list[Document]:
        return self._read(lambda: [job for job in self.jobs_.values() if job["metadata"]["labels"][LABEL_RUN] == run])

    def pods(self, namespace: str, run: str) -> list[Document]:
        return self._read(lambda: [pod for pod in self.pods_.values() if pod["metadata"]["labels"][LABEL_RUN] == run])

    def job(self, namespace: str, name: str) -> Document | None:
        return self._read(lambda: self.jobs_.get(name))

    def create_job(self, job: Document) -> None:
        def create() -> None:
            name = job["metadata"]["name"]
            if name in self.jobs_:
                raise AlreadyExists(name)
            self.refuse(job)
            made = copy.deepcopy(job)
            made["metadata"] |= {"uid": f"job-{next(self._uids)}", "creationTimestamp": stamp(self.now)}
            self.jobs_[name] = self._touched(made)

        self._write(create)

    def stop_job(self, job: Document, now: float) -> None:
        def stop() -> None:
            if found := self.jobs_.get(job["metadata"]["name"]):
                found["metadata"].setdefault("annotations", {})[ANNOTATION_STOPPED] = stamp(now)
                found["spec"]["activeDeadlineSeconds"] = 1
                self._touched(found)

        self._write(stop)

    def keep_outcome(self, job: Document, outcome: str) -> None:
        def keep() -> None:
            if found := self.jobs_.get(job["metadata"]["name"]):
                found["metadata"].setdefault("annotations", {})[ANNOTATION_OUTCOME] = outcome
                self._touched(found)

        self._write(keep)

    def write_status(self, run: Document, patch: Document) -> None:
        def write() -> None:
            found = self.runs_[run["metadata"]["name"]]
            if found["metadata"]["resourceVersion"] != run["metadata"]["resourceVersion"]:
                raise Conflict("the object has been modified")
            found["status"] = merged(found.get("status", {}), patch)
            self._touched(found)

        self._write(write)

    def runs(self) -> list[Document]:
        return self._read(lambda: list(self.runs_.values()))

    def set_finalizers(self, run: Document, finalizers: list[str]) -> None:
        def write() -> None:
            name = run["metadata"]["name"]
            found = self.runs_[name]
            if found["metadata"]["resourceVersion"] != run["metadata"]["resourceVersion"]:
                raise Conflict("the object has been modified")
            found["metadata"]["finalizers"] = finalizers
            self._touched(found)
            if found["metadata"].get("deletionTimestamp") and not finalizers:
                self._gone(name)

        self._write(write)

    def delete_run(self, run: Document) -> None:
        def delete() -> None:
            found = self.runs_.get(run["metadata"]["name"])
            if found and found["metadata"].get("finalizers"):
                found["metadata"]["deletionTimestamp"] = stamp(self.now)
                self._touched(found)
            elif found:
                self._gone(found["metadata"]["name"])

        self._write(delete)

    def record(self, run: Document, event: RunEvent) -> None:
        self._write(lambda: self.events.append(event))

    def progress(self, pod: Document, stage: str) -> Progress | None:
        return self.pages.get(stage)

    # ---- what people, the Job controller and the kubelet do ----

    def apply(self, document: Document) -> None:
        """kubectl apply."""
        name = document["metadata"]["name"]
        old = self.runs_.get(name)
        made = copy.deepcopy(document)
        if old is None:
            made["metadata"] |= {"uid": f"run-{next(self._uids)}", "generation": 1, "namespace": "default"}
        else:
            generation = old["metadata"]["generation"] + (old["spec"] != made["spec"])
            made["metadata"] = old["metadata"] | {"generation": generation}
            made["status"] = old.get("status", {})
        self.runs_[name] = self._touched(made)

    def touch(self, name: str) -> None:
        """kubectl label."""
        self._touched(self.runs_[name])

    def start_pods(self) -> None:
        """Each Job that has not ended gets its pod."""
        for job in list(self.jobs_.values()):
            name = f"{job['metadata']['name']}-abcde"
            if ended(job) or name in self.pods_ or "activeDeadlineSeconds" in job["spec"]:
                continue
            template = copy.deepcopy(job["spec"]["template"])
            owner = {"kind": "Job", "uid": job["metadata"]["uid"], "controller": True}
            metadata = template["metadata"] | {
                "name": name, "uid": f"pod-{next(self._uids)}", "ownerReferences": [owner],
                "creationTimestamp": stamp(self.now),
            }  # fmt: skip
            state = {"name": "stage", "state": {"running": {}}}
            self.pods_[name] = self._touched(
                {
                    "metadata": metadata,
                    "spec": template["spec"],
                    "status": {"phase": "Running", "containerStatuses": [state]},
                }
            )

    def end_stopped(self) -> None:
        """Jobs past their deadline lose their pods, then fail."""
        for job in self.jobs_.values():
            if "activeDeadlineSeconds" in job["spec"] and not ended(job):
                self.pods_.pop(f"{job['metadata']['name']}-abcde", None)
                self.end_job(job, "Failed", "DeadlineExceeded")

    def end_pod(self, job: Document, code: int, message: str, reason: str = "") -> None:
        """The stage's container ends, and the Job with it."""
        pod = self.pods_[f"{job['metadata']['name']}-abcde"]
        terminated = {"exitCode": code, "message": message, "reason": reason or ("Error" if code else "Completed")}
        pod["status"] = {
            "phase": "Failed" if code else "Succeeded",
            "containerStatuses": [{"name": "stage", "state": {"terminated": terminated}}],
        }
        self._touched(pod)
        self.end_job(job, "Failed" if code else "Complete", "BackoffLimitExceeded" if code else "")

    def end_job(self, job: Document, kind: str, reason: str) -> None:
        condition = {"type": kind, "status": "True", "reason": reason, "lastTransitionTime": stamp(self.now)}
        job.setdefault("status", {})["conditions"] = [condition]
        self._touched(job)

    def active(self) -> list[Document]:
        return [job for job in self.jobs_.values() if not ended(job)]

    def _gone(self, run: str) -> None:
        """A run is gone, and what it owned with it."""
        uid = self.runs_.pop(run)["metadata"]["uid"]
        self.jobs_ = {n: j for n, j in self.jobs_.items() if j["metadata"]["ownerReferences"][0]["uid"] != uid}

    def _touched(self, document: Document) -> Document:
        document["metadata"]["resourceVersion"] = str(next(self._versions))
        return document

    def _read[T](self, get: Callable[[], T]) -> T:
        return copy.deepcopy(get())

    def _write(self, change: Callable[[], None]) -> None:
        """A write, and perhaps the operator's last: to die before a read is to die after the write before it."""
        self.writes += 1
        dies = self.writes == self.crash_at
        if dies and not self.crash_after:
            raise Crash
        change()
        if dies:
            raise Crash


def merged(old: Document, patch: Document) -> Document:
    """RFC 7386, by its own pseudocode."""
    result = dict(old)
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        elif isinstance(value, dict):
            below = result.get(name)
            result[name] = merged(below if isinstance(below, dict) else {}, value)
        else:
            result[name] = value
    return result


def ended(job: Document) -> bool:
    return bool(job.get("status", {}).get("conditions"))


class World:
    """A cluster, a store, and an operator that can be replaced."""

    def __init__(self, folder: Path) -> None:
        self.deaths = 0
        self.cluster = SmallCluster()
        self.settings = OperatorSettings(image="pipeline:1", bucket=(folder / "store").as_uri())
        self.artifacts = open_artifacts(self.settings.store_of(ObjectStore()))
        self.restart()

    def restart(self) -> None:
        self.view = StoreView(self.settings, lambda: self.cluster.now)
        self.operator = Reconciler(self.cluster, self.settings, self.view, lambda: self.cluster.now)

    def document(self, **spec: Any) -> Document:
        short = {
            "model": {"source": "hf://owner/model"},
            "data": {"prompts": {"source": "hf://datasets/owner/prompts"}},
            "reward": {"function": "module:callable"},
        }
        return {
            "apiVersion": "rlhf.dev/v1alpha1",
            "kind": "RLHFRun",
            "metadata": {"name": "run"},
            "spec": {**short, **spec},
        }

    def apply(self, **spec: Any) -> None:
        self.cluster.apply(self.document(**spec))

    def look(self) -> float | None:
        """Reconcile once; an operator that dies is followed by another."""
        try:
            return self.operator.reconcile("default", "run")
        except Crash:
            self.deaths += 1
            self.restart()
            return self.cluster.now

    def settle(self) -> None:
        """Reconcile until nothing changes."""
        for _ in range(20):
            before = self.state_of_world(), self.deaths
            self.look()
            if (self.state_of_world(), self.deaths) == before:
                return
        raise AssertionError("it never comes to rest")

    def state_of_world(self) -> str:
        everything = [self.cluster.runs_, self.cluster.jobs_]
        return json.dumps(everything, sort_keys=True)

    def status(self) -> RunStatus:
        return RunStatus.model_validate(self.cluster.runs_["run"]["status"])

    def states(self) -> dict[str, str]:
        return {stage.name: stage.state for stage in self.status().stages if stage.state != "Skipped"}

    def conditions(self) -> dict[str, tuple[str, str, str]]:
        return {each.type: (each.status, each.reason, each.message) for each in self.status().conditions}

    def job(self, stage: str) -> Document:
        """The unfinished Job of a stage."""
        [found] = [job for job in self.cluster.active() if job["metadata"]["labels"][LABEL_STAGE] == stage]
        return found

    def config(self, job: Document) -> StageConfig:
        variables = job["spec"]["template"]["spec"]["containers"][0]["env"]
        text = next(each["value"] for each in variables if each["name"] == ENV_STAGE_CONFIG)
        return StageConfig.model_validate_json(text)

    def succeed(self, *stages: str) -> None:
        """The pods of these stages, or of all that run, commit their artifacts and end."""
        self.cluster.start_pods()
        for job in self.cluster.active():
            config = self.config(job)
            if stages and config.stage not in stages:
                continue
            writer = self.artifacts.writer(config.output, config.attempt)
            writer.add_bytes("report.json", b"{}")
            writer.commit({"metrics": {"loss": 0.5}})
            result = StageResult(stage=config.stage, artifact=config.output, metrics={"loss": 0.5})
            self.cluster.end_pod(job, 0, result.to_bytes().decode())

    def fail(self, stage: str, failure: FailureClass) -> None:
        self.cluster.start_pods()
        result = StageResult(stage=stage, failure=StageFailure(failure=failure, message=f"{stage} broke"))
        self.cluster.end_pod(self.job(stage), EXIT_CODES[failure], result.to_bytes().decode())

    def finish(self) -> None:
        """Everything that starts succeeds."""
        for _ in range(30):
            self.settle()
            if self.status().phase in ("Succeeded", "Failed"):
                return
            self.cluster.now += 10
            self.succeed()
        raise AssertionError(self.status())

    def reasons(self) -> list[str]:
        return [event.reason for event in self.cluster.events]
