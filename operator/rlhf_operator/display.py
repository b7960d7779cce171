"""What `rlhf run` shows while it runs: a live table on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlhf_api.run import Phase, RunStatus, StageState, StageStatus
from rlhf_api.stage import Progress
from rlhf_operator.figures import duration, key_metrics
from rlhf_operator.local import Show
from rlhf_operator.plan import Observed, seconds_left

MARKS: dict[StageState, tuple[str, str]] = {
    "Waiting": ("·", "dim"),
    "Pending": ("…", "yellow"),
    "Running": ("▶", "bold cyan"),
    "Succeeded": ("✓", "green"),
    "Reused": ("✓", "green"),
    "Skipped": ("–", "dim"),
    "Failed": ("✗", "bold red"),
    "Suspended": ("‖", "yellow"),
}
PHASES = get_args(Phase)
BAR_WIDTH = 20
PLAIN_WIDTH = 200  # of output that is not a terminal
LINE_SECONDS = 30.0  # between plain lines of a stage that makes progress


def console(stderr: bool = False) -> Console:
    """A console on standard output or error; not cut to 80 columns where that is a file or a pipe."""
    made = Console(stderr=stderr)
    return made if made.is_terminal else Console(stderr=stderr, width=PLAIN_WIDTH)


@contextmanager
def display(screen: Console) -> Iterator[Show]:
    """A function that shows a status; on a terminal it draws one table over and over."""
    if not screen.is_terminal:
        yield PlainLines(screen)
        return
    # No refresh thread: the runner draws, and starts processes, from one thread.
    with Live(console=screen, auto_refresh=False, vertical_overflow="visible") as live:
        # The empty line takes the ^C that a terminal echoes, which would shift the table.
        yield lambda status, observed: live.update(
            Group(stage_table(status, observed, time.time()), Text(waiting_for(status), style="yellow")), refresh=True
        )


def stage_table(status: RunStatus, observed: Observed, now: float) -> Table:
    """One row a stage: mark, name, bar, steps, time, metrics or message."""
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(width=1, no_wrap=True)
    table.add_column(min_width=max(len(stage.name) for stage in status.stages), no_wrap=True)
    table.add_column(width=BAR_WIDTH, no_wrap=True)
    table.add_column(min_width=7, justify="right", no_wrap=True)
    table.add_column(min_width=8, justify="right", no_wrap=True)
    table.add_column(ratio=1, overflow="ellipsis", no_wrap=True)
    for stage in status.stages:
        mark, style = MARKS[stage.state]
        progress = _progress(stage, observed)
        table.add_row(
            Text(mark, style=style),
            Text(stage.name, style=style if stage.state != "Succeeded" else ""),
            _bar(stage, progress),
            f"{progress.step}/{progress.total}" if progress and progress.total else "",
            _time(stage, observed, now),
            Text(_words(stage, progress, now), style="red" if stage.state == "Failed" else "dim"),
        )
    return table


def waiting_for(status: RunStatus) -> str:
    """What keeps the run from going on, such as a store that does not answer; empty if nothing does."""
    for condition in status.conditions:
        if condition.type == "Progressing" and condition.status == "True" and condition.reason not in PHASES:
            return f"{condition.reason}: {condition.message}"
    return ""


class PlainLines:
    """One line for each change of a stage's state, and now and then one for its progress."""

    def __init__(self, screen: Console) -> None:
        self._console = screen
        self._last: dict[str, tuple[StageState, int, float]] = {}
        self._waiting = ""

    def __call__(self, status: RunStatus, observed: Observed) -> None:
        now = time.time()
        for stage in status.stages:
            state, attempt, printed = self._last.get(stage.name, ("Waiting", 0, now))
            progress = _progress(stage, observed)
            changed = (state, attempt) != (stage.state, stage.attempt)
            if not changed and not (progress and now - printed >= LINE_SECONDS):
                continue
            self._last[stage.name] = (stage.state, stage.attempt, now)
            steps = f"{progress.step}/{progress.total}" if progress and progress.total else ""
            parts = [stage.name, stage.state.lower(), steps, _time(stage, observed, now), _words(stage, progress, now)]
            self._print("  ".join(part for part in parts if part))
        if (waiting := waiting_for(status)) != self._waiting:
            self._waiting = waiting
            self._print(waiting or "goes on")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _progress(stage: StageStatus, observed: Observed) -> Progress | None:
    attempts = observed.attempts.get(stage.name)
    return attempts[-1].progress if attempts and stage.state == "Running" else None


def _bar(stage: StageStatus, progress: Progress | None) -> ProgressBar | Text:
    if progress and progress.total:
        return ProgressBar(progress.total, min(progress.step, progress.total), width=BAR_WIDTH)
    words = {"Succeeded": "done", "Running": "starting" if progress is None else progress.phase}
    return Text(words.get(stage.state, stage.state.lower()), style="dim")


def _time(stage: StageStatus, observed: Observed, now: float) -> str:
    attempts = [a for a in observed.attempts.get(stage.name, ()) if a.started >= observed.asked_at]
    if stage.state not in ("Running", "Succeeded", "Failed", "Suspended"):
        return ""
    seconds = sum((attempt.finished or now) - attempt.started for attempt in attempts)
    return duration(seconds) if seconds >= 0.5 else ""


def _words(stage: StageStatus, progress: Progress | None, now: float) -> str:
    """Metrics, the phase and the time left; what went wrong; or why the stage is skipped."""
    if stage.message and stage.state != "Running":
        return stage.message
    lowered = f"({stage.lowered}: memory ran out)" if stage.lowered else ""
    if progress is None:
        return "  ".join(word for word in (key_metrics(stage.metrics), lowered) if word)
    words = [key_metrics(progress.metrics), progress.phase if progress.total else "", lowered]
    if (seconds := seconds_left(progress, now)) is not None:
        words.append(f"{duration(seconds)} left")
    return "  ".join(word for word in words if word)
