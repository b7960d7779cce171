"""A MinIO that a test starts, stops and starts again, and a small disk to fill up under it."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Self

import pytest
from minio import Minio

SCRIPT = Path(__file__).parents[2] / "hack" / "minio.sh"
USER, PASSWORD = "rlhf-tests", "rlhf-tests-secret"
# PR_SET_PDEATHSIG, SIGKILL: the server dies with the tests, however they die.
DIE_WITH_PARENT = "import ctypes,os,sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"
AS_ROOT = [] if os.geteuid() == 0 or not shutil.which("sudo") else ["sudo", "--non-interactive"]
START_SECONDS = 180.0  # a disk busy with others' writes holds it up


class MinioServer:
    """A server that runs in a `with` block, which takes its data away at the end. The first use ever builds it.

    `folder` gets its log, and its data unless `data` is elsewhere. `host`: the address of this machine to listen at.
    """

    def __init__(self, folder: Path, data: Path | None = None, host: str = "127.0.0.1") -> None:
        self.data = data or folder / "data"
        self.address = f"{host}:{free_port(host)}"
        self.url = f"http://{self.address}"
        self._log = folder / "minio.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.data, ignore_errors=True)

    def start(self) -> None:
        """Start it on what it kept, and wait until it answers. Raises RuntimeError with its words if it does not."""
        binary = subprocess.run([SCRIPT], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        environment = {**os.environ, "MINIO_ROOT_USER": USER, "MINIO_ROOT_PASSWORD": PASSWORD, "MINIO_BROWSER": "off"}
        server = [binary, "server", "--address", self.address, str(self.data)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", DIE_WITH_PARENT, *server], env=environment, stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/minio/health/live", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.05)
        raise RuntimeError(f"MinIO did not start: {self._log.read_text()[-2000:]}")

    def stop(self) -> None:
        """End it as a power cut does."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def client(self) -> Minio:
        """A client that may do everything."""
        return Minio(self.address, USER, PASSWORD, secure=False)


class SmallDisk:
    """A file system of `size` bytes, mounted at `path` in a `with` block. Skips the test where it may not mount."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self._size = path, size
        self._ballast = path / "ballast"

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True)
        mount = [*AS_ROOT, "mount", "-t", "tmpfs", "-o", f"size={self._size}", "tmpfs", self.path]
        mounted = subprocess.run(mount, capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"needs root, to mount a small disk: {mounted.stderr.strip()}")
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run([*AS_ROOT, "umount", "--lazy", self.path], check=True)

    def fill(self, leave: int = 0) -> None:
        """Take all but `leave` bytes of what is free."""
        with self._ballast.open("ab") as file:
            os.posix_fallocate(file.fileno(), file.tell(), shutil.disk_usage(self.path).free - leave)

    def empty(self) -> None:
        """Give back what fill() took."""
        self._ballast.unlink()


def free_port(host: str = "127.0.0.1") -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind((host, 0))
        port: int = free.getsockname()[1]
        return port
