"""One stage's process on this machine, and what its end means if it left no result."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

from rlhf_api.errors import FailureClass
from rlhf_api.memory_kills import VMSTAT, memory_kills
from rlhf_api.names import EXIT_CODES, EXIT_INTERRUPTED, STAGE_CONFIG_FILE, STAGE_RESULT_FILE
from rlhf_api.stage import StageFailure, StageResult
from rlhf_operator import tether
from rlhf_operator.run_folder import LOG_FILE, signal_group

THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# On a CPU the large tensors of one step come and go with the next: glibc keeps their pages instead of faulting them in
# anew each time, which takes a fifth of a training step.
CPU_VARIABLES: Final = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**28),
}


class Process:
    """A stage's process: in a session of its own, so that Ctrl-C reaches it only through stop(), tied to this process.

    It holds `lock` until it and all it started have ended.
    """

    def __init__(
        self, command: Sequence[str], path: Path, work: Path, lock: IO[str], number: int, threads: int, gpu: bool
    ) -> None:
        self.number, self.log = number, path / LOG_FILE
        self._memory_kills = memory_kills(VMSTAT)
        arguments = ["--config", path / STAGE_CONFIG_FILE, "--work", work, "--result", path / STAGE_RESULT_FILE]
        defaults = dict.fromkeys(THREAD_VARIABLES, str(threads)) | ({} if gpu else CPU_VARIABLES)
        with lock, self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", tether.__file__, str(os.getpid()), *command, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=defaults | os.environ,
                pass_fds=(lock.fileno(),),
                start_new_session=True,
            )
            lock.write(str(self._process.pid))
        self._asked = self._killed = False

    def poll(self) -> int | None:
        """What Popen.poll gives."""
        return self._process.poll()

    def stop(self) -> None:
        """Ask once for a checkpoint and an end."""
        if not self._asked:
            self._asked = True
            self._process.terminate()

    def kill(self) -> None:
        """End it and all it started, now."""
        self._asked = self._killed = True
        signal_group(self._process.pid, signal.SIGKILL)

    def exit_code(self, code: int) -> int:
        """The exit code that counts: a process ended by a polite signal, or by kill(), was interrupted."""
        if code in (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP) or (code == -signal.SIGKILL and self._killed):
            return EXIT_INTERRUPTED
        return code

    def failed_result(self, stage: str, code: int) -> StageResult:
        """The result in place of one that the process did not live to write."""
        names: dict[int, FailureClass] = {value: name for name, value in EXIT_CODES.items()}  # type: ignore[misc]
        failure: FailureClass = names.get(code, "bug")
        message = f"exited with code {code} and left no result"
        if code == -signal.SIGKILL:
            if memory_kills(VMSTAT) > self._memory_kills:
                failure = "outOfMemory"
                message = "out of host memory: the kernel killed it (SIGKILL); use smaller batches"
            else:
                failure = "infrastructure"
                message = "was killed (SIGKILL) by someone other than the kernel's memory killer"
        elif code < 0:
            message = f"died of {signal.Signals(-code).name}"
        if last := self._last_line():
            message += f"; its last words: {last}"
        return StageResult(stage=stage, failure=StageFailure(failure=failure, message=f"{message} (log: {self.log})"))

    def _last_line(self) -> str:
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - 4096))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
        return next((line[:300] for line in reversed(lines) if line), "")
