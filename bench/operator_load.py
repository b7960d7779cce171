"""What the operator costs with many runs at once, on a real API server with its controllers and KWOK's nodes.

    python bench/operator_load.py [--runs 1000] [--more 200] [--folder /dev/shm]

Every run has a chain of its own, so five Jobs each. Pods run on nodes that are not there and end as soon as their tiny
artifact is in a file:// store. Then the operator is restarted, and killed in the middle of `--more` further runs.
Builds nothing: first `hack/cluster/tools.sh control-plane kwok`.
"""

import argparse
import json
import os
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "cluster"))

from bare_plane import OperatorProcess, api_of, bare_plane, until
from stage_player import StagePlayer

from rlhf_api.errors import RLHFError
from rlhf_api.names import API_VERSION, GPU_RESOURCE, GROUP, KIND, LABEL_ATTEMPT, LABEL_RUN, PLURAL, VERSION
from rlhf_operator.kubernetes_api import KubernetesApi

NAMESPACE: Final = "load"
NODES: Final = 20
CAPACITY: Final = {"cpu": "1k", "memory": "10Ti", "pods": "1k", "ephemeral-storage": "100Ti", GPU_RESOURCE: "100"}
STAGES: Final = 5
RUNS: Final = f"/apis/{GROUP}/{VERSION}/namespaces/{NAMESPACE}/{PLURAL}"
JOBS: Final = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
EVENTS: Final = f"/api/v1/namespaces/{NAMESPACE}/events"
HOURS: Final = 4 * 3600.0


def main() -> None:
    """Print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, help="created at once")
    parser.add_argument("--more", type=int, default=200, help="created later, with the operator killed in the middle")
    parser.add_argument("--folder", type=Path, default=None, help="where everything lies; default: the temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="operator-load-") as name:
        folder = Path(name)
        (folder / "plane").mkdir()
        with bare_plane(folder / "plane", kwok=True) as plane:
            api = api_of(plane.kubeconfig, 16)
            prepare(api)
            operator = OperatorProcess(plane.kubeconfig, folder / "store", folder / "operator.log")
            operator.start()
            try:
                with StagePlayer(plane.kubeconfig, "Running", threads=4), FirstJobs(api) as first_jobs:
                    measure(api, operator, first_jobs, options.runs, options.more)
            except AssertionError:
                print(operator.last_lines())
                raise
            finally:
                operator.kill()


def measure(api: KubernetesApi, operator: OperatorProcess, first_jobs: "FirstJobs", runs: int, more: int) -> None:
    """All runs at once, a restart when they are done, a kill in the middle of some more."""
    until(lambda: gauge(operator, "rlhf_operator_leads") == 1, 60, operator.last_lines)
    before = requests_of(api)
    began = time.monotonic()
    created = create_runs(api, 0, runs)
    print(f"{runs} runs created in {time.monotonic() - began:.1f} s", flush=True)
    watch_progress(operator, runs, began)
    waited = sorted(first_jobs.seen[name] - at for name, at in created.items())
    print(f"all Succeeded after {time.monotonic() - began:.1f} s")
    print(f"create to first Job: p50 {statistics.median(waited):.1f} s, p99 {waited[int(len(waited) * 0.99)]:.1f} s")
    print(f"writes by run: {writes_by_run(api, before, runs)}")
    print(
        f"operator: peak resident {peak_mib(operator):.0f} MiB, {cpu_seconds(operator) / runs:.3f} CPU seconds by run"
    )
    page = operator.metrics()
    looks, spent = (value_of(page, f"rlhf_operator_reconcile_seconds_{what}") for what in ("count", "sum"))
    print(f"looks by run: {looks / runs:.1f}, of {1000 * spent / looks:.0f} ms", flush=True)
    check(api, runs)

    restarted = time.monotonic()
    assert operator.process is not None
    operator.process.terminate()
    operator.process.wait(60)
    before = requests_of(api)
    operator.start()
    until(lambda: gauge(operator, "rlhf_operator_reconcile_seconds_count") >= runs, 600, operator.last_lines)
    until(lambda: gauge(operator, "rlhf_operator_queue_depth") == 0, 60, operator.last_lines)
    idle, written = time.monotonic() - restarted, difference(before, requests_of(api))
    assert not written, f"a restarted operator that has nothing to do wrote {written}"
    print(f"restarted with all done: idle after {idle:.1f} s, no write, {peak_mib(operator):.0f} MiB", flush=True)

    if more:
        killed_in_the_middle(api, operator, runs, more)


def killed_in_the_middle(api: KubernetesApi, operator: OperatorProcess, runs: int, more: int) -> None:
    """SIGKILL once half of the further runs are done."""
    began = time.monotonic()
    create_runs(api, runs, more)
    watch_progress(operator, runs + more // 2, began)
    operator.kill()
    killed = time.monotonic()
    operator.start()
    until(lambda: gauge(operator, "rlhf_operator_leads") == 1, 120, operator.last_lines)
    led = time.monotonic()
    watch_progress(operator, runs + more, began)
    print(
        f"killed in the middle of {more} more, after {killed - began:.1f} s: started again and leads after "
        f"{led - killed:.1f} s, all Succeeded after {time.monotonic() - killed:.1f} s"
    )
    check(api, runs + more)


def prepare(api: KubernetesApi) -> None:
    """The namespace and KWOK's nodes."""
    api.request("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
    for number in range(NODES):
        metadata = {"name": f"node-{number}", "annotations": {"kwok.x-k8s.io/node": "fake"}}
        status = {"allocatable": CAPACITY, "capacity": CAPACITY}
        api.request("POST", "/api/v1/nodes", {"metadata": metadata, "status": status})


def create_runs(api: KubernetesApi, first: int, count: int) -> dict[str, float]:
    """Name of each new run -> when it was there."""

    def create(number: int) -> tuple[str, float]:
        name = f"run-{number}"
        spec = {
            "model": {"source": f"hf://owner/model-{number}"},
            "data": {"prompts": {"source": "hf://datasets/owner/prompts"}},
            "reward": {"function": "module:callable"},
        }
        api.request("POST", RUNS, {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}, "spec": spec})
        return name, time.monotonic()

    with ThreadPoolExecutor(8) as pool:
        return dict(pool.map(create, range(first, first + count)))


def watch_progress(operator: OperatorProcess, wanted: int, began: float) -> None:
    """Wait until so many runs have succeeded, as the operator's metrics say; a line every half minute."""
    line_at = time.monotonic() + 30

    def done() -> bool:
        nonlocal line_at
        page = operator.metrics()
        assert operator.runs, "the operator has ended"
        assert not value_of(page, 'rlhf_operator_runs{phase="Failed"}')
        succeeded = value_of(page, 'rlhf_operator_runs{phase="Succeeded"}')
        if time.monotonic() > line_at:
            line_at += 30
            now = f"  {time.monotonic() - began:.0f} s: {succeeded:.0f} Succeeded"
            print(f"{now}, {value_of(page, 'rlhf_operator_queue_depth'):.0f} in the queue", flush=True)
        time.sleep(0.5)
        return succeeded >= wanted

    until(done, HOURS, operator.last_lines)


def check(api: KubernetesApi, runs: int) -> None:
    """Every run succeeded, with one Job a stage and no second attempt."""
    phases = Counter(run["status"]["phase"] for run in all_of(api, RUNS))
    assert phases == {"Succeeded": runs}, phases
    jobs = all_of(api, JOBS)
    assert Counter(job["metadata"]["labels"][LABEL_ATTEMPT] for job in jobs) == {"1": STAGES * runs}
    assert set(Counter(job["metadata"]["labels"][LABEL_RUN] for job in jobs).values()) == {STAGES}


def writes_by_run(api: KubernetesApi, before: Counter[str], runs: int) -> str:
    """What only the operator writes, by the API server's own count, and the events on runs that there are."""
    found = difference(before, requests_of(api))
    events = len(all_of(api, EVENTS, fieldSelector=f"involvedObject.kind={KIND}"))
    per_run = {name: count / runs for name, count in found.items()} | {"events": events / runs}
    return f"{sum(per_run.values()):.2f} = " + ", ".join(f"{value:.2f} {name}" for name, value in per_run.items())


def requests_of(api: KubernetesApi) -> Counter[str]:
    """Requests that only the operator makes, by what they write, refused ones too."""
    found: Counter[str] = Counter()
    pattern = re.compile(r"^apiserver_request_total\{(.*)\} (\S+)$")
    for line in api.lines("/metrics", {}):
        if not (match := pattern.match(line)):
            continue
        labels = dict(re.findall(r'(\w+)="([^"]*)"', match[1]))
        what = (labels["verb"], labels["resource"], labels["subresource"])
        names = {
            ("PATCH", PLURAL, "status"): "statuses",
            ("POST", "jobs", ""): "Jobs",
            ("PATCH", "jobs", ""): "stops of Jobs",
        }
        if what in names:
            refused = " refused" if int(labels["code"]) >= 400 else ""
            found[names[what] + refused] += int(float(match[2]))
    return found


def difference(before: Counter[str], after: Counter[str]) -> dict[str, int]:
    """What has come since."""
    return {name: count - before[name] for name, count in sorted(after.items()) if count > before[name]}


def all_of(api: KubernetesApi, path: str, **query: str) -> list[dict[str, Any]]:
    """Every object of a list, page by page."""
    found: list[dict[str, Any]] = []
    while True:
        page = api.request("GET", path, query={"limit": "500", **query})
        found += page["items"]
        if not (more := page["metadata"].get("continue")):
            return found
        query["continue"] = more


class FirstJobs:
    """When each run's first Job was seen, by a watch."""

    def __init__(self, api: KubernetesApi) -> None:
        self.seen: dict[str, float] = {}
        self._api = api
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "FirstJobs":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        query = {"watch": "true", "timeoutSeconds": "5", "resourceVersion": "0"}
        while not self._stop.is_set():
            try:
                for line in self._api.lines(JOBS, query):
                    metadata = json.loads(line)["object"]["metadata"]
                    query["resourceVersion"] = metadata.get("resourceVersion", "0")
                    if name := metadata.get("labels", {}).get(LABEL_RUN):
                        self.seen.setdefault(name, time.monotonic())
            except RLHFError:
                query["resourceVersion"] = "0"


def gauge(operator: OperatorProcess, name: str) -> float:
    """One value of the operator's metrics; 0 while it does not serve."""
    return value_of(operator.metrics(), name)


def value_of(page: str, name: str) -> float:
    """One value of a page of metrics; 0 if it is not there."""
    return next((float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(f"{name} ")), 0.0)


def peak_mib(operator: OperatorProcess) -> float:
    """Most memory that the operator has had resident."""
    assert operator.process is not None
    status = Path(f"/proc/{operator.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def cpu_seconds(operator: OperatorProcess) -> float:
    """User and system time of the operator."""
    assert operator.process is not None
    fields = Path(f"/proc/{operator.process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
