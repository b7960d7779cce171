"""Plays what runs on nodes where there are none, or KWOK's: each stage's pod commits a tiny artifact and ends well."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from bare_plane import api_of

from rlhf_api.errors import FailureClass, RLHFError
from rlhf_api.names import ENV_STAGE_CONFIG, EXIT_CODES, EXIT_OK, LABEL_RUN, LABEL_STAGE, STAGE_CONTAINER
from rlhf_api.stage import StageConfig, StageFailure, StageResult
from rlhf_operator.cluster import STAGES_SELECTOR
from rlhf_operator.kubernetes_api import NotFound
from rlhf_operator.summary import REPORT_PAGE
from rlhf_store.artifacts import open_artifacts

Document = dict[str, Any]
TURN_SECONDS: Final = 0.2
METRICS: Final = {"loss": 0.5}
PAGE: Final = b"<title>a report</title>"
NOBODY: Final = {"spec": {"schedulerName": "nobody"}}
"""A pod template: without nodes the scheduler would only say so again and again."""


class StagePlayer:
    """Ends the pods of stages that are in `phase`, in the background, for as long as the block lasts.

    `held`: names of stages whose pods it leaves as they are. `failing`: (run, stage) -> how its pods fail, as a class.
    `played`: (namespace, pod) of those that it has ended.
    """

    def __init__(self, kubeconfig: Path, phase: str = "Pending", threads: int = 2) -> None:
        self.held: set[str] = set()
        self.failing: dict[tuple[str, str], FailureClass] = {}
        self.played: list[tuple[str, str]] = []
        self._api = api_of(kubeconfig, threads + 2)
        phase_is = f"status.phase={phase}"
        self._query = {"labelSelector": STAGES_SELECTOR, "fieldSelector": phase_is, "resourceVersion": "0"}
        self._done: set[str] = set()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(threads)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._pool.shutdown()

    def waits(self, namespace: str, stage: str) -> bool:
        """Whether a pod of the stage is there and has not ended."""
        path, query = f"/api/v1/namespaces/{namespace}/pods", {"labelSelector": f"{LABEL_STAGE}={stage}"}
        pods = self._api.request("GET", path, query=query)["items"]
        return any(pod["status"].get("phase") in ("Pending", "Running") for pod in pods)

    def _run(self) -> None:
        while not self._stop.wait(TURN_SECONDS):
            try:
                pods = self._api.request("GET", "/api/v1/pods", query=self._query)["items"]
                due = [pod for pod in pods if pod["metadata"]["uid"] not in self._done and self._may_end(pod)]
                list(self._pool.map(self._play, due))
            except RLHFError:  # the API server is away: next turn
                continue

    def _may_end(self, pod: Document) -> bool:
        return pod["metadata"]["labels"][LABEL_STAGE] not in self.held

    def _play(self, pod: Document) -> None:
        metadata, spec = pod["metadata"], pod["spec"]["containers"][0]
        text = next(each["value"] for each in spec["env"] if each["name"] == ENV_STAGE_CONFIG)
        config = StageConfig.model_validate_json(text.replace("$$", "$"))
        if failure := self.failing.get((metadata["labels"][LABEL_RUN], config.stage)):
            code, result = EXIT_CODES[failure], _failed(config, failure)
        else:
            code, result = EXIT_OK, _committed(config)
        reason = "Error" if code else "Completed"
        terminated = {"exitCode": code, "reason": reason, "message": result.to_bytes().decode()}
        status = {
            "phase": "Failed" if code else "Succeeded",
            "containerStatuses": [
                {
                    "name": STAGE_CONTAINER,
                    "image": spec["image"],
                    "imageID": "",
                    "ready": False,
                    "restartCount": 0,
                    "state": {"terminated": terminated},
                }
            ],
        }
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/status"
        try:
            self._api.request("PATCH", path, {"status": status})
        except NotFound:  # deleted with its run
            return
        self._done.add(metadata["uid"])
        self.played.append((metadata["namespace"], metadata["name"]))


def _committed(config: StageConfig) -> StageResult:
    """Commits a tiny artifact, with the page of `rlhf report` where it is an evaluation."""
    writer = open_artifacts(config.store).writer(config.output, config.attempt)
    writer.add_bytes("report.json", json.dumps({"metrics": METRICS}).encode())
    if config.output.kind == "evaluation":
        writer.add_bytes(REPORT_PAGE, PAGE)
    writer.commit({"metrics": METRICS, "seconds": 1.5})
    return StageResult(stage=config.stage, artifact=config.output, metrics=METRICS)


def _failed(config: StageConfig, failure: FailureClass) -> StageResult:
    return StageResult(stage=config.stage, failure=StageFailure(failure=failure, message=f"what a {failure} says"))
