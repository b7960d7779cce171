"""A port of this machine that leads to a Service of a cluster, for as long as it is needed."""

import subprocess
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rlhf_api.errors import StoreError, UserError
from rlhf_operator.cluster_options import ClusterOptions

ADDRESS: Final = "127.0.0.1"
READY: Final = f"Forwarding from {ADDRESS}:"


@contextmanager
def forwarded(options: ClusterOptions, service: str, port: int) -> Iterator[str]:
    """host:port of this machine that reaches `port` of a Service. `options` name its namespace.

    kubectl does it: it knows every way of signing in to a cluster and of tunnelling to it. Raises UserError if there is
    no kubectl, StoreError with its words if it cannot.
    """
    command = options.kubectl("port-forward", "--address", ADDRESS, f"service/{service}", f":{port}")
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError:
        raise UserError(
            f"Service {service}: is reached through kubectl, which is not in PATH; install it, or give --endpoint with "
            "an address of the store that this machine reaches"
        ) from None
    try:
        yield f"{ADDRESS}:{_local_port(process, service)}"
    finally:
        process.terminate()
        process.wait()


def _local_port(process: "subprocess.Popen[str]", service: str) -> int:
    assert process.stdout is not None
    said: deque[str] = deque(maxlen=3)
    for line in process.stdout:
        if line.startswith(READY):
            # It writes a line for each connection, and would stop when nobody reads them.
            threading.Thread(target=deque, args=(process.stdout, 0), daemon=True).start()
            return int(line.removeprefix(READY).split()[0])
        said.append(line.strip())
    raise StoreError(f"Service {service}: cannot be reached: {' '.join(said) or 'kubectl port-forward ended'}")
