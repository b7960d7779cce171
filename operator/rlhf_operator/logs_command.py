"""`rlhf logs` on this machine: what a stage wrote, while it writes it and after."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Final

from rlhf_api.errors import UserError
from rlhf_operator.place import home
from rlhf_operator.run_folder import LOG_FILE, RunFolder
from rlhf_operator.stages import STAGES

POLL_SECONDS: Final = 0.3


def show_log(name: str | None, stage: str | None, follow: bool) -> None:
    """Print the log of a run's newest attempt; with `follow`, until that attempt ends. None: the run begun last.

    Raises UserError if there is no such run or no such log.
    """
    folder = home().run_folder(name or _newest())
    folder.need_status()
    every = [(attempt.started, one.name, attempt.number) for one in STAGES for attempt in folder.attempts(one.name)]
    if not (chosen := [each for each in every if stage in (None, each[1])]):
        raise UserError(nothing_of(folder.path.name, stage, [each[1] for each in every]))
    _, newest, number = max(chosen)
    print_head(folder.path.name, newest, number)
    for text in _texts(folder, newest, number, follow):
        print(text, end="", flush=True)


def print_head(run: str, stage: str, number: int | str) -> None:
    """Say on standard error whose log follows."""
    print(f"rlhf: {run}, {stage}, attempt {number}", file=sys.stderr, flush=True)


def nothing_of(run: str, stage: str | None, begun: Iterable[str]) -> str:
    """Why there is no log."""
    if stage is not None and stage not in [one.name for one in STAGES]:
        return f"--stage {stage}: there is no such stage; use one of {', '.join(one.name for one in STAGES)}"
    if not (others := ", ".join(dict.fromkeys(begun))):
        return f"run {run!r}: no stage has begun"
    return f"run {run!r}: {stage} has not begun; these have: {others}"


def _newest() -> str:
    names = home().run_names()
    if not names:
        raise UserError("no run began in this folder; start one with `rlhf run FILE`")
    return max(names, key=lambda name: (home().run_folder(name).path / "run.json").stat().st_mtime)


def _texts(folder: RunFolder, stage: str, number: int, follow: bool) -> Iterator[str]:
    path = folder.attempt_path(stage, number) / LOG_FILE
    with path.open(errors="replace") as log:
        while True:
            ended = any(each.number == number and each.finished for each in folder.attempts(stage))
            yield log.read()
            if ended or not follow or not folder.active:
                return
            time.sleep(POLL_SECONDS)
