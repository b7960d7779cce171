"""A Kubernetes API with controllers and scheduler but no nodes, and the operator as a process beside it."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml
from kubernetes import client, config

from rlhf_api.names import GROUP, OPERATOR_NAME, PLURAL, VERSION
from rlhf_operator.kubernetes_api import APPLY_PATCH, ApiError, KubernetesApi, NotFound

ROOT: Final = Path(__file__).parents[2]
SCRIPT: Final = ROOT / "hack" / "cluster" / "control-plane.sh"
CRD_FILE: Final = ROOT / "manifests" / "crd" / "rlhfruns.yaml"
CRD: Final = f"{PLURAL}.{GROUP}"
START_SECONDS: Final = 120.0

Document = dict[str, Any]
# PR_SET_PDEATHSIG, SIGKILL: a process ends with the thread that started it, and so with the tests.
DIE_WITH_PARENT: Final = (
    sys.executable, "-c", "import ctypes,os,sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"
)  # fmt: skip


@dataclass
class BarePlane:
    """One control plane that runs in `folder`."""

    folder: Path

    @property
    def kubeconfig(self) -> Path:
        """An administrator's."""
        return self.folder / "kubeconfig"

    def kill_api_server(self) -> None:
        """SIGKILL. It is started again, on the same data."""
        os.kill(self.api_server_pid, signal.SIGKILL)

    @property
    def api_server_pid(self) -> int:
        """Process id of the API server that runs, or was last started."""
        return int((self.folder / "kube-apiserver.pid").read_text() or 0)

    def answers(self) -> bool:
        """Whether the API server is there."""
        try:
            api_of(self.kubeconfig).request("GET", "/version")
        except ApiError:
            return False
        return True


@contextmanager
def bare_plane(folder: Path, kwok: bool = False) -> Iterator[BarePlane]:
    """Run a control plane that knows RLHFRun in an empty folder; it ends with the block, and with this process."""
    with new_plane(folder, kwok) as plane:
        install_crd(plane.kubeconfig)
        yield plane


@contextmanager
def new_plane(folder: Path, kwok: bool = False) -> Iterator[BarePlane]:
    """Run a control plane on which nobody has installed anything yet."""
    plane = BarePlane(folder)
    with (folder / "supervisor.log").open("w") as log:
        command: list[str | Path] = [*DIE_WITH_PARENT, SCRIPT, "run", folder, *(["--kwok"] if kwok else [])]
        supervisor = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (folder / "ready").exists():
            if supervisor.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no control plane: {(folder / 'supervisor.log').read_text()[-2000:]}")
            time.sleep(0.1)
        yield plane
    finally:
        supervisor.terminate()
        supervisor.wait(timeout=60)


def api_of(kubeconfig: Path, connections: int = 8) -> KubernetesApi:
    """Requests as the kubeconfig's user."""
    settings = client.Configuration()
    config.load_kube_config(str(kubeconfig), client_configuration=settings)
    return KubernetesApi(connections, settings)


def install_crd(kubeconfig: Path) -> None:
    """Make the API server know RLHFRun, as it now is in manifests."""
    api, path = api_of(kubeconfig), f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{CRD}"
    document = yaml.safe_load(CRD_FILE.read_text())
    api.request("PATCH", path, document, {"fieldManager": "tests", "force": "true"}, patch=APPLY_PATCH)

    def served() -> bool:
        try:
            api.request("GET", f"/apis/{GROUP}/{VERSION}/{PLURAL}")
        except ApiError:
            return False
        return True

    until(served, START_SECONDS, "the API server does not serve RLHFRuns")


def until[T](found: Callable[[], T], seconds: float, otherwise: str | Callable[[], object]) -> T:
    """What `found` returns as soon as that is true. Raises AssertionError with `otherwise` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        if time.monotonic() > deadline:
            said = otherwise if isinstance(otherwise, str) else otherwise()
            raise AssertionError(f"not within {seconds:g} s: {said}")
        time.sleep(0.2)
    return value


@dataclass
class OperatorProcess:
    """The operator as its image starts it, with a `file://` store, for the runs of some namespaces or of all."""

    kubeconfig: Path
    store: Path
    log: Path
    namespaces: Sequence[str] = ()
    """Empty: all."""
    lease_namespace: str = ""
    """Empty: the first of `namespaces`, or "default"."""
    settings: dict[str, str] = field(default_factory=dict)
    """More variables of its environment, without their prefix."""
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        """Start it, again if it has ended."""
        self.health_port, self.metrics_port = _free_ports(2)
        ours = {
            "IMAGE": "localhost/nothing:1",
            "STORE_BUCKET": self.store.as_uri(),
            "NAMESPACE": self.lease_namespace or [*self.namespaces, "default"][0],
            "WATCH_NAMESPACE": ",".join(self.namespaces),
            "METRICS_PORT": str(self.metrics_port),
            **self.settings,
        }
        environment = {f"RLHF_OPERATOR_{name}": value for name, value in ours.items()}
        where = [f"--namespace={name}" for name in self.namespaces] or ["--all-namespaces"]
        command = ["-m", "kopf", "run", "-m", "rlhf_operator.handlers", "--standalone", *where]
        command += [f"--liveness=http://127.0.0.1:{self.health_port}/healthz"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*DIE_WITH_PARENT, sys.executable, *command],
                env=os.environ | {"KUBECONFIG": str(self.kubeconfig)} | environment,
                stdout=log,
                stderr=log,
            )

    @property
    def runs(self) -> bool:
        """Whether the process is there."""
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL; no harm if it has ended."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def metrics(self) -> str:
        """The page of its metrics; empty while it does not serve."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""

    def last_lines(self) -> str:
        """The end of its log, for a failed test."""
        return self.log.read_text()[-3000:]


def drop_lease(api: KubernetesApi, namespace: str) -> None:
    """What 15 s of silence come to: the next operator leads at once."""
    try:
        api.request("DELETE", f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases/{OPERATOR_NAME}")
    except NotFound:
        return


def _free_ports(count: int) -> list[int]:
    """Below those that the kernel gives to connections, one of which might take it before the operator does."""
    found: set[int] = set()
    while len(found) < count:
        port = random.randrange(15000, 32000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.add(port)
    return list(found)
