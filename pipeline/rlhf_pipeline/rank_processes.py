"""A stage on several GPUs: one process for each, started, watched and ended together.

Each is `python -m rlhf_pipeline --rank N` with a result file of its own. The first rank's result is the stage's; when
one fails, the others are ended, and what counts is what failed first, not what it did to the others.
"""

import ctypes
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Final

from rlhf_api.errors import FailureClass
from rlhf_api.memory_kills import memory_kills
from rlhf_api.names import EXIT_CODES, EXIT_INTERRUPTED, EXIT_OK
from rlhf_api.stage import StageConfig, StageFailure, StageResult

COMMAND: Final = (sys.executable, "-m", "rlhf_pipeline")
FOLDER: Final = "ranks"  # in the working folder
POLL_SECONDS: Final = 0.05
GRACE_SECONDS: Final = 2.0  # that the others have, once one has failed, to say that they did of the same
STOP_SECONDS: Final = 300.0  # that they have once one has stopped as it was asked: the first still saves
POLITE: Final = (signal.SIGTERM, signal.SIGINT)
TOLD_BY_ALL: Final[tuple[FailureClass, ...]] = ("user", "gate", "outOfMemory")  # what one rank's end is no cause of
PR_SET_PDEATHSIG: Final = 1


def rank_folder(work: Path, rank: int) -> Path:
    """What a rank writes that nobody reads: its output, its progress."""
    return work / FOLDER / str(rank)


def trace_of(result: Path) -> Path:
    """Where a rank writes the trace of a bug. The stage's log shows that of one rank alone."""
    return result.with_suffix(".trace")


def tie_to_parent(parent: int) -> None:
    """Let the kernel kill this process when `parent`, which started it, dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(EXIT_INTERRUPTED)  # it died before the kernel knew


class RankProcesses:
    """The ranks of one stage."""

    def __init__(self, stage: StageConfig, size: int, config_from: str, work: Path, command: Sequence[str]) -> None:
        self.stage, self.work = stage.stage, work
        self._folder = work / FOLDER
        shutil.rmtree(self._folder, ignore_errors=True)  # of a process that died here
        self._folder.mkdir(parents=True)
        self._signals: list[int] = []  # that came, and have not been handed on
        self._stopped = False
        self._memory_kills = memory_kills()
        arguments = ["--config", config_from, "--work", str(work), "--parent", str(os.getpid())]
        environment = _environment(size, os.environ)
        for number in POLITE:
            signal.signal(number, self._on_signal)
        self._processes = [
            subprocess.Popen(
                [*command, *arguments, "--rank", str(rank), "--result", str(self._result(rank))],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=None if rank == 0 else subprocess.DEVNULL,
                # A group of their own: Ctrl-C must not reach them twice.
                process_group=0,
            )
            for rank in range(size)
        ]

    def outcome(self) -> tuple[StageResult, int]:
        """Wait for the ranks to end; what became of the stage, and the exit code. None is left."""
        try:
            codes = self._watch()
        finally:
            for process in self._processes:
                process.kill()
                process.wait()
        if codes[0] == EXIT_OK:
            found = self._read(0) or StageResult(stage=self.stage)
            shutil.rmtree(self._folder, ignore_errors=True)
            return found, EXIT_OK
        rank, result, code = self._cause(codes)
        assert result.failure
        print(f"{_text(trace_of(self._result(rank)))}{self.stage}: {result.failure.message}", file=sys.stderr)
        return result, code

    def _watch(self) -> list[int | None]:
        """Until the first rank is done or any has failed: how each that has ended by itself did."""
        deadline: float | None = None
        while True:
            self._hand_on()
            codes = [process.poll() for process in self._processes]
            if None not in codes or (deadline is not None and time.monotonic() > deadline):
                return codes
            if codes[0] == EXIT_OK or any(codes):
                failed = any(code not in (None, EXIT_OK, EXIT_INTERRUPTED) for code in codes)
                wait = GRACE_SECONDS if failed or codes[0] is not None else STOP_SECONDS
                deadline = min(deadline or math.inf, time.monotonic() + wait)
            time.sleep(POLL_SECONDS)

    def _hand_on(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            self._stopped = True
            for process in self._processes:
                process.send_signal(number)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)

    def _cause(self, codes: Sequence[int | None]) -> tuple[int, StageResult, int]:
        """The rank that failed first, its result and exit code."""
        failures = {
            rank: result.failure for rank in range(len(codes)) if (result := self._read(rank)) and result.failure
        }
        # A rank that lost another says so in a result, or dies of SIGABRT, by NCCL: any other silent end came first.
        silent = {rank: code for rank, code in enumerate(codes) if code and rank not in failures}
        asked = {rank for rank, code in silent.items() if self._stopped and -code in POLITE}
        dead = [rank for rank, code in silent.items() if rank not in asked and code != -signal.SIGABRT]
        if failures and not dead:
            rank = min(failures, key=lambda rank: self._result(rank).stat().st_mtime_ns)
            failure = failures[rank]
            stopped = codes[0] == codes[rank] == EXIT_INTERRUPTED
            first = failures.get(0)
            alike = first is not None and first.failure == failure.failure and failure.failure in TOLD_BY_ALL
            if first is not None and (stopped or alike):
                rank, failure = 0, first
            code = EXIT_INTERRUPTED if codes[rank] == EXIT_INTERRUPTED else EXIT_CODES[failure.failure]
            message = f"rank {rank}: {failure.message}" if rank else failure.message
        elif dead or not asked:
            rank = next(iter(dead or silent), 0)
            kind, message = self._silent_end(rank, codes[rank] or 0)
            failure, code = StageFailure(failure=kind, message=message), EXIT_CODES[kind]
        else:
            rank, code, message = min(asked), EXIT_INTERRUPTED, "asked to stop before it began; run again to continue"
            failure = StageFailure(failure="infrastructure", message=message)
        checkpoint = next((each.checkpoint for each in failures.values() if each.checkpoint), None)
        told = failure.model_copy(update={"message": message, "checkpoint": checkpoint})
        return rank, StageResult(stage=self.stage, failure=told), code

    def _silent_end(self, rank: int, code: int) -> tuple[FailureClass, str]:
        if code >= 0:
            return "bug", f"rank {rank} exited with code {code} and left no result"
        if code != -signal.SIGKILL:
            return "bug", f"rank {rank} died of {signal.Signals(-code).name}"
        if memory_kills() > self._memory_kills:
            return "outOfMemory", f"out of host memory: the kernel killed rank {rank} (SIGKILL); use smaller batches"
        return "infrastructure", f"rank {rank} was killed (SIGKILL) by someone other than the kernel's memory killer"

    def _result(self, rank: int) -> Path:
        return self._folder / f"{rank}.json"

    def _read(self, rank: int) -> StageResult | None:
        text = _text(self._result(rank))
        return StageResult.model_validate_json(text) if text else None


def _environment(size: int, environment: Mapping[str, str]) -> dict[str, str]:
    threads = int(environment.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    found = {
        # All are in one pod: no other network, and none of its policies, has a part in it.
        **({"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
        **environment,
        "OMP_NUM_THREADS": str(max(1, threads // size)),
    }
    return found | {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
