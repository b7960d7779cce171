"""A person's shell: `rlhf` and `kubectl` as processes, in a folder of their own, on the cluster of one kubeconfig."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from bare_plane import ROOT

BIN = ROOT / ".cache" / "cluster" / "bin"
SECONDS = 120.0  # for one command

Done = subprocess.CompletedProcess[str]


@dataclass
class Shell:
    """Commands find kubectl, the console scripts of this project and none of the variables of an S3 client."""

    folder: Path
    kubeconfig: Path
    environment: dict[str, str] = field(default_factory=dict, kw_only=True)
    """More variables."""

    def begin(self, *command: str | Path, out: IO[str] | None = None) -> "subprocess.Popen[str]":
        """Start a command, which writes to `out` if that is given."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        path = f"{Path(sys.executable).parent}:{BIN}:{os.environ['PATH']}"
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment | {"PATH": path, "KUBECONFIG": str(self.kubeconfig)} | self.environment,
            stdin=subprocess.DEVNULL,
            stdout=out or subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(self, *command: str | Path) -> Done:
        """What a command does."""
        return ended(self.begin(*command))

    def rlhf(self, *words: str | Path) -> Done:
        """What `rlhf WORDS --cluster` does."""
        return self.call("rlhf", *words, "--cluster")


def ended(process: "subprocess.Popen[str]", seconds: float = SECONDS) -> Done:
    """What a command has done once it has ended. Fails, and ends it, if that takes longer."""
    with process:
        try:
            out, err = process.communicate(timeout=seconds)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
