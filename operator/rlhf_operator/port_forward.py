"""A port of this machine that leads to a Service of a cluster, for as long as it is needed."""

import queue
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rlhf_api.errors import StoreError, UserError
from rlhf_operator.cluster_options import ClusterOptions

ADDRESS: Final = "127.0.0.1"
READY: Final = f"Forwarding from {ADDRESS}:"
READY_SECONDS: Final = 30.0  # for the API server, and the node of a pod, to open the way
QUOTED_LINES: Final = 3


@contextmanager
def forwarded(options: ClusterOptions, service: str, port: int, ready_seconds: float = READY_SECONDS) -> Iterator[str]:
    """host:port of this machine that reaches `port` of a Service. `options` name its namespace.

    kubectl does it: it knows every way of signing in to a cluster and of tunnelling to it. Raises UserError if there is
    no kubectl, StoreError with its words if it cannot or is not ready in time; a StoreError of the block gets them too.
    """
    command = options.kubectl("port-forward", "--address", ADDRESS, f"service/{service}", f":{port}")
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError:
        raise UserError(
            f"Service {service}: is reached through kubectl, which is not in PATH; install it, or give --endpoint with "
            "an address of the store that this machine reaches"
        ) from None
    said: queue.Queue[str | None] = queue.Queue()
    # It writes a line for each connection, and would stop when nobody reads them.
    reader = threading.Thread(target=_read, args=(process, said), daemon=True)
    reader.start()
    try:
        yield f"{ADDRESS}:{_local_port(said, service, ready_seconds)}"
    except StoreError as error:
        words = [line for line in _taken(said) if not line.startswith(("Forwarding", "Handling"))]
        raise StoreError(f"{error}; {' '.join(words[-QUOTED_LINES:])}" if words else str(error)) from error
    finally:
        process.kill()
        process.wait()


def _read(process: "subprocess.Popen[str]", said: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            said.put(line.strip())
    said.put(None)


def _local_port(said: "queue.Queue[str | None]", service: str, seconds: float) -> int:
    heard: list[str] = []
    deadline = time.monotonic() + seconds
    try:
        while (line := said.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
            if line.startswith(READY):
                return int(line.removeprefix(READY).split()[0])
            heard.append(line)
    except queue.Empty:
        raise StoreError(
            f"Service {service}: kubectl port-forward was not ready within {seconds:g} s; see that its pod and the "
            "pod's node answer, or give --endpoint with an address of the store that this machine reaches"
        ) from None
    raise StoreError(
        f"Service {service}: cannot be reached: {' '.join(filter(None, heard)) or 'kubectl port-forward ended'}"
    )


def _taken(said: "queue.Queue[str | None]") -> list[str]:
    """The lines that nobody has taken yet."""
    lines = []
    while not said.empty():
        lines.append(said.get())
    return [line for line in lines if line]
