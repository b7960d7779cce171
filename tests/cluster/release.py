"""The chart installed on a cluster, and what tests do with it: apply runs, wait, look, and break things."""

import base64
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubectl import SOON
from minio import Minio
from objects import Objects

from rlhf_api.names import ENV_ACCESS_KEY, ENV_SECRET_KEY, PLURAL, PROGRESS_FILE, STAGE_WORK
from rlhf_api.stage import ArtifactRef, StoreConfig
from rlhf_store.artifacts import open_artifacts

ROOT = Path(__file__).parents[2]
BIN = ROOT / ".cache" / "cluster" / "bin"
CHART = ROOT / "charts" / "rlhf-operator"
RELEASE = "rlhf"
BUCKET = "rlhf"
PREFIX = "runs"  # of the chart
STORE_SECRET = f"{RELEASE}-rlhf-operator-object-store"
ROOT_SECRET = f"{RELEASE}-rlhf-operator-minio-root"
GPU_NODE = {"rlhf.dev/gpu-memory": "24Gi"}
STAGES = (
    "import-model", "import-sft", "import-preferences", "import-prompts", "import-evaluation",
    "sft", "merge", "reward", "ppo", "evaluate",
)  # fmt: skip
# In a stage's pod: returns once its program has made a step, and fails after a while without.
UNTIL_A_STEP = f"""
for _ in $(seq 200); do
    grep -q '"step": *[1-9]' {STAGE_WORK}/{PROGRESS_FILE} && exit
    sleep 0.1
done
exit 1
"""

Document = dict[str, Any]
Kubectl = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass
class Release:
    """One release of the chart in a namespace of its own, which its runs share."""

    namespace: str
    kubeconfig: Path
    kubectl_: Kubectl
    images: Mapping[str, str]
    """operator, pipeline, minio -> repository:tag."""

    def kubectl(self, *arguments: str | Path, **options: Any) -> "subprocess.CompletedProcess[str]":
        """kubectl in the release's namespace."""
        return self.kubectl_("--namespace", self.namespace, *arguments, **options)

    @cached_property
    def objects(self) -> Objects:
        """What is in the release's namespace."""
        return Objects(self.kubeconfig, self.namespace)

    def helm(self, *arguments: str | Path, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """helm in the release's namespace; fails with what it said."""
        program = shutil.which("helm", path=f"{BIN}:{os.environ['PATH']}")
        assert program, "there is no helm: build it with hack/cluster/tools.sh helm"
        done = subprocess.run(
            [program, "--namespace", self.namespace, *arguments],
            text=True, capture_output=True, env={**os.environ, "KUBECONFIG": str(self.kubeconfig)},
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stderr + done.stdout
        return done

    def install(self, *values: str, timeout: str = "300s") -> None:
        """Install or upgrade the release with the images under test and a small store; returns when all is ready."""
        split = {name: image.rpartition(":")[::2] for name, image in self.images.items()}
        pull = "Never" if all(image.startswith("localhost/") for image in self.images.values()) else "IfNotPresent"
        sets = []
        for key, name in (("image", "operator"), ("pipelineImage", "pipeline"), ("minio.image", "minio")):
            repository, tag = split[name]
            sets += [f"{key}.repository={repository}", f"{key}.tag={tag}", f"{key}.pullPolicy={pull}"]
        sets += ["crds.install=false", "minio.persistence.size=4Gi", "stage.ephemeralStorage=1Gi"]
        sets += ["stage.resources.limits.memory=4Gi", "stage.terminationGracePeriodSeconds=30"]
        # One thread a stage: where several share two cores, more of them wait for one another as they spin.
        sets += ["stage.resources.limits.cpu=1", "stage.resources.requests.cpu=10m"]
        arguments = [f"--set-string={each}" if ".tag=" in each else f"--set={each}" for each in (*sets, *values)]
        self.helm("upgrade", "--install", RELEASE, CHART, "--wait", f"--timeout={timeout}", *arguments)

    def apply(self, name: str, spec: Document, **labels: str) -> None:
        """Apply a run."""
        metadata = {"name": name, "labels": labels}
        document = {"apiVersion": "rlhf.dev/v1alpha1", "kind": "RLHFRun", "metadata": metadata, "spec": spec}
        self.kubectl("apply", "--server-side", "-f", "-", stdin=document)

    def patch(self, name: str, spec: Document) -> None:
        """Merge `spec` into a run's spec."""
        self.kubectl("patch", "rlhfrun", name, "--type=merge", "-p", json.dumps({"spec": spec}))

    def status(self, name: str) -> Document:
        """The status of a run; empty before there is one."""
        status: Document = self.objects.get(PLURAL, name).get("status") or {}
        return status

    def stages(self, name: str) -> dict[str, Document]:
        """Stage -> its status."""
        return {stage["name"]: stage for stage in self.status(name).get("stages", [])}

    def states(self, name: str) -> dict[str, str]:
        """Stage -> its state."""
        return {stage: found["state"] for stage, found in self.stages(name).items()}

    def condition(self, name: str, kind: str) -> Document:
        """A condition of a run, empty if it has none of this type."""
        found: list[Document] = self.status(name).get("conditions", [])
        return next((each for each in found if each["type"] == kind), {})

    def jobs(self, name: str) -> dict[str, list[int]]:
        """Stage -> numbers of the attempts for which there is a Job, sorted."""
        found: dict[str, list[int]] = {}
        for job in self.objects.list("jobs", f"rlhf.dev/run={name}"):
            labels = job["metadata"]["labels"]
            found.setdefault(labels["rlhf.dev/stage"], []).append(int(labels["rlhf.dev/attempt"]))
        return {stage: sorted(numbers) for stage, numbers in found.items()}

    def pods(self, name: str, stage: str | None = None) -> list[Document]:
        """The pods of a run, or of one of its stages."""
        selector = f"rlhf.dev/run={name}" + (f",rlhf.dev/stage={stage}" if stage else "")
        return self.objects.list("pods", selector)

    def running_pod(self, name: str, stage: str, timeout: float = SOON) -> str:
        """Name of the pod of a stage that runs, waited for."""

        def found() -> str | None:
            for pod in self.pods(name, stage):
                if pod["status"].get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]:
                    return str(pod["metadata"]["name"])
            assert self.status(name).get("phase") not in ("Succeeded", "Failed"), self.words(name)
            return None

        return self.until(found, timeout, lambda: f"no pod of {stage} runs\n{self.words(name)}")

    def training_pod(self, name: str, stage: str, timeout: float = SOON) -> str:
        """Name of the pod of a stage that has made a step, as the pod says: status hears of it later."""
        pod = self.running_pod(name, stage, timeout)

        def stepped() -> bool:
            # Asked once and answered at once: to ask again and again takes a core.
            said = self.kubectl("exec", pod, "--", "sh", "-c", UNTIL_A_STEP, check=False)
            state = self.stages(name)[stage]["state"]
            assert state in ("Running", "Pending", "Waiting"), f"{stage} ended before a step was seen: {state}"
            return said.returncode == 0

        self.until(stepped, timeout, lambda: f"{stage} made no step\n{self.words(name)}")
        return pod

    def wait(self, name: str, condition: str = "Succeeded", timeout: float = 600) -> Document:
        """Wait for a condition of a run, and return its status. Fails as soon as the run has ended otherwise."""

        def reached() -> bool:
            status = self.status(name)
            phase = status.get("phase")
            if (condition, "True") in {(each["type"], each["status"]) for each in status.get("conditions", [])}:
                return True
            assert phase not in {"Succeeded", "Failed"} - {condition}, self.words(name)
            return False

        self.until(reached, timeout, lambda: f"{name} is not {condition}\n{self.words(name)}")
        return self.status(name)

    def until(
        self, check: Callable[[], Any], timeout: float, words: Callable[[], str] = lambda: "", every: float = 1.0
    ) -> Any:
        """What `check` gives as soon as that is true. Fails with `words` after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not (found := check()):
            assert time.monotonic() < deadline, f"after {timeout:.0f} s: {words()}"
            time.sleep(every)
        return found

    def words(self, name: str) -> str:
        """What the cluster says of a run: status, events, the ends of logs."""
        parts = [yaml.safe_dump(self.status(name))]
        parts += [self.kubectl("get", "events", "--sort-by=.lastTimestamp", check=False).stdout[-6000:]]
        for pod in self.pods(name):
            log = self.kubectl("logs", pod["metadata"]["name"], "--tail=25", check=False)
            parts.append(f"{pod['metadata']['name']} {pod['status'].get('phase')}:\n{log.stdout}{log.stderr}")
        operator = self.kubectl("logs", f"deployment/{self.operator}", "--tail=40", check=False)
        return "\n".join([*parts, f"operator:\n{operator.stdout}"])

    @property
    def operator(self) -> str:
        """Name of the operator's Deployment."""
        return f"{RELEASE}-rlhf-operator"

    def operator_pod(self) -> str:
        """Name of the operator's pod, waited for until it is ready."""
        self.kubectl("rollout", "status", f"deployment/{self.operator}", f"--timeout={SOON:.0f}s")
        pods = self.objects.list("pods", "app.kubernetes.io/component=operator")
        [pod] = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
        return str(pod["metadata"]["name"])

    def on_node(self, node: str, *command: str, check: bool = True) -> str:
        """What a command prints that runs as root on a node; kind's clusters only."""
        environment = {**os.environ, "KUBECONFIG": str(self.kubeconfig)}
        script = ROOT / "hack" / "cluster" / "on-node.sh"
        done = subprocess.run([script, node, *command], env=environment, text=True, capture_output=True)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    @cached_property
    def on_kind(self) -> bool:
        """Whether the nodes are kind's, on which anything can be done, and whose GPUs are numbers alone."""
        return all(node["spec"].get("providerID", "").startswith("kind://") for node in self.objects.list("nodes"))

    def node_condition(self, node: str, kind: str = "Ready") -> str:
        """True, False or Unknown, as the node's conditions say."""
        found = self.objects.get("nodes", node)["status"]["conditions"]
        return str(next(each["status"] for each in found if each["type"] == kind))

    def kill_container(self, pod: Document) -> bool:
        """SIGKILL for the process of a pod of one container; false if none runs. Kind's clusters only."""
        [status] = pod["status"].get("containerStatuses") or [{}]
        if "running" not in status.get("state", {}):
            return False
        container = status["containerID"].removeprefix("containerd://")
        kill = ("ctr", "--namespace", "k8s.io", "tasks", "kill", "--signal", "SIGKILL", container)
        self.on_node(pod["spec"]["nodeName"], *kill)
        return True

    def kill_operator(self) -> bool:
        """SIGKILL for the operator, whose Deployment makes another; false if none runs just now.

        Where nodes are not kind's its pod is deleted by force, of which the operator hears by a SIGTERM.
        """
        killed = False
        for pod in self.objects.list("pods", "app.kubernetes.io/component=operator", "status.phase=Running"):
            killed |= not self.on_kind or self.kill_container(pod)
        if killed:  # in the same pod it would be started again later each time
            self.kubectl("delete", "pod", "-l", "app.kubernetes.io/component=operator", "--grace-period=0", "--force")
        return killed

    @contextmanager
    def forwarded(self, target: str, port: int) -> Iterator[str]:
        """host:port on this machine that leads to a port of a pod or Service while the block runs."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            local = free.getsockname()[1]
        program = shutil.which("kubectl", path=f"{BIN}:{os.environ['PATH']}")
        assert program
        command = [
            program, "--kubeconfig", self.kubeconfig, "-n", self.namespace, "port-forward", target, f"{local}:{port}",
        ]  # fmt: skip
        said = [""]

        def begun() -> "subprocess.Popen[str] | None":
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            assert process.stdout
            said[0] = process.stdout.readline()
            if "Forwarding" in said[0]:
                return process
            process.wait()
            process.stdout.close()
            return None

        # The pod's node, too, may be about to come back.
        process = self.until(begun, SOON, lambda: said[0])
        try:
            yield f"127.0.0.1:{local}"
        finally:
            process.terminate()
            process.wait()
            assert process.stdout
            process.stdout.close()

    @property
    def store_name(self) -> str:
        """Name of the bundled object store's StatefulSet and Service."""
        [found] = self.objects.list("statefulsets", "app.kubernetes.io/component=object-store")
        return str(found["metadata"]["name"])

    def contents(self, name: str) -> dict[str, str]:
        """Stage -> content digest of its artifact, of the stages that a run's status names one of."""
        prefix = self.objects.get(PLURAL, name)["spec"].get("objectStore", {}).get("prefix") or PREFIX
        with self.store_environment() as endpoint:
            artifacts = open_artifacts(StoreConfig(url=f"s3://{BUCKET}/{prefix}", endpoint=endpoint))
            found = {
                stage: artifacts.find(ArtifactRef.parse(status["artifact"]))
                for stage, status in self.stages(name).items()
                if "artifact" in status
            }
        assert "evaluate" in found
        assert None not in found.values(), found
        return {stage: manifest.content for stage, manifest in found.items() if manifest}

    @contextmanager
    def store_environment(self) -> Iterator[str]:
        """The store's endpoint while the block runs, with its credentials in the environment."""
        with self.forwarded(f"service/{self.store_name}", 9000) as address, pytest.MonkeyPatch.context() as patch:
            for name, value in zip((ENV_ACCESS_KEY, ENV_SECRET_KEY), self.credentials(), strict=True):
                patch.setenv(name, value)
            yield f"http://{address}"

    def forget(self, name: str, *stages: str) -> None:
        """Delete what stages of a run made from the store: another run of its spec makes them again, and no others."""
        spec = self.objects.get(PLURAL, name)["spec"]
        made = self.stages(name)
        with self.store() as store:
            for stage in stages:
                folder = f"{spec.get('objectStore', {}).get('prefix') or PREFIX}/artifacts/{made[stage]['artifact']}/"
                found = [each.object_name or "" for each in store.list_objects(BUCKET, folder, recursive=True)]
                assert found, folder
                for key in found:
                    store.remove_object(BUCKET, key)

    def credentials(self) -> tuple[str, str]:
        """Access key and secret key that stages have for the release's object store."""
        return self.keys(STORE_SECRET, "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")

    def keys(self, secret: str, *names: str) -> tuple[str, str]:
        """Two values of a Secret."""
        data = self.objects.get("secrets", secret)["data"]
        access, key = (base64.b64decode(data[name]).decode() for name in names)
        return access, key

    @contextmanager
    def store(self) -> Iterator[Minio]:
        """The release's object store, as its root."""
        user, password = self.keys(ROOT_SECRET, "MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD")
        with self.forwarded(f"service/{self.store_name}", 9000) as address:
            yield Minio(address, user, password, secure=False)


def tiny_spec(**sections: Any) -> Document:
    """A chain of few and short steps on the model and the texts that the fixture `release` put into the store.

    `sections` go over it: a mapping changes fields of a section, anything else replaces it.
    """
    source = {"source": f"s3://{BUCKET}/sources/reviews.csv", "heldOut": 0.2}
    steps = {"batchSize": 4, "microBatchSize": 2, "sequenceLength": 24, "learningRate": 0.01, "checkpointSteps": 2}
    document: Document = {
        "model": {"source": f"s3://{BUCKET}/sources/model"},
        "data": {
            "sft": source | {"rows": "0%:40%"},
            "preferences": source | {"rows": "40%:70%", "textColumn": "text", "labelColumn": "label", "chosenLabel": 1},
            "prompts": source | {"rows": "0%:40%", "promptColumn": "text", "overflow": "truncate"},
            "evaluation": source | {"rows": "70%:100%"},
        },
        "quantization": {"type": "none"},
        "lora": {"rank": 4, "layers": "top:1"},
        "sft": steps | {"steps": 8},
        "reward": steps | {"steps": 8, "minAccuracy": 0},
        "ppo": {
            "episodes": 32, "batchSize": 4, "microBatchSize": 2, "epochs": 2, "promptTokens": 6, "responseTokens": 8,
            "learningRate": 0.01, "checkpointSteps": 2,
        },
        "evaluate": {"samples": 8, "batchSize": 4, "scorers": [{"name": "bag-of-words", "fitted": True}]},
        "gpu": {"count": 0},
        "placement": {"nodeSelector": GPU_NODE},
    }  # fmt: skip
    for name, changes in sections.items():
        document[name] = document.get(name, {}) | changes if isinstance(changes, dict) else changes
    return document


def fresh_spec(prefix: str, **sections: Any) -> Document:
    """The tiny chain with a store prefix of its own: nothing is there to reuse, whatever else the release has run."""
    return tiny_spec(objectStore={"bucket": BUCKET, "prefix": f"{PREFIX}/{prefix}"}, **sections)


def given_reward(spec: Document, *, sft: bool = True) -> Document:
    """The same chain with a function for a reward, and without SFT if asked: less to train."""
    unused = {"preferences"} if sft else {"preferences", "sft"}
    data = {name: table for name, table in spec["data"].items() if name not in unused}
    sections = {name: section for name, section in spec.items() if sft or name != "sft"}
    return sections | {"data": data, "reward": {"function": "rlhf_pipeline.scorers:vader"}}


def reviews() -> str:
    """200 short labelled texts, as CSV."""
    good = ("warm", "funny", "moving", "sharp", "tender")
    bad = ("dull", "flat", "boring", "awful", "lifeless")
    things = ("film", "story", "cast", "script", "picture", "plot", "movie", "scene", "ending", "dialogue")
    rows = [
        f"the {thing} is {word} {turn},{label}"
        for label, words in ((1, good), (0, bad))
        for word in words
        for thing in things
        for turn in ("and nothing else", "as they say")
    ]
    return "\n".join(["text,label", *rows]) + "\n"
