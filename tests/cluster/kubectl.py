"""kubectl, for tests that do not depend on the moments in which an API server or a node is about to come back."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

BIN = Path(__file__).parents[2] / ".cache" / "cluster" / "bin"

# What it says in such a moment.
AWAY = (
    "was refused",
    "connection refused",  # by the kubelet of a node that a test has stopped
    "TLS handshake timeout",
    "unexpected EOF",
    "connection reset",
    "etcdserver: leader changed",
    "failed to download openapi",
    'User "kubernetes-admin" cannot',  # one that is just back has read no roles yet
)
AWAY_SECONDS = 180
SOON = 300.0  # seconds for what takes a few: other work may share the machine

Kubectl = Callable[..., "subprocess.CompletedProcess[str]"]


def kubectl_of(kubeconfig: Path) -> Kubectl:
    """A function that runs kubectl with its arguments and `stdin`, and fails with what it said unless check=False."""
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig), "PATH": f"{BIN}:{os.environ['PATH']}"}

    def kubectl(*arguments: str | Path, stdin: Any = None, check: bool = True) -> "subprocess.CompletedProcess[str]":
        text = stdin if stdin is None or isinstance(stdin, str) else yaml.safe_dump(stdin)
        deadline = time.monotonic() + AWAY_SECONDS
        while True:
            done = subprocess.run(["kubectl", *arguments], input=text, env=environment, text=True, capture_output=True)
            away = done.returncode and any(words in done.stderr for words in AWAY)
            if not away or time.monotonic() > deadline:
                break
            time.sleep(1)
        if check and done.returncode:
            raise AssertionError(f"kubectl {' '.join(map(str, arguments))}: {done.stderr}")
        return done

    return kubectl
