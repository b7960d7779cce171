"""`rlhf run`: drive the chain, show it, and say in the end what came of it."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from rlhf_api.errors import FailureClass
from rlhf_api.names import EXIT_BUG, EXIT_CODES, EXIT_INTERRUPTED, EXIT_OK
from rlhf_api.run import RunStatus
from rlhf_operator.display import console, display
from rlhf_operator.load import load_run
from rlhf_operator.local import PIPELINE, LocalRunner
from rlhf_operator.place import chosen_store, home
from rlhf_operator.run_folder import RunFolder
from rlhf_operator.summary import save_report, summarize, summary_table
from rlhf_store.artifacts import open_artifacts


def run_file(
    file: Path, store_url: str | None, endpoint: str | None, json: bool, command: Sequence[str] = PIPELINE
) -> int:
    """Run the file's chain to its end; returns the exit code. With `json`, progress goes to standard error."""
    run = load_run(file)
    store = chosen_store(store_url, endpoint, run)
    runner = LocalRunner(run, store, home(), command)
    with display(console(stderr=json)) as show:
        status = runner.run(show)
    if json:
        print(status.model_dump_json(by_alias=True, exclude_none=True))
    match status.phase:
        case "Succeeded":
            _show_success(runner.folder, status, console(stderr=json))
            return EXIT_OK
        case "Suspended":
            print(_suspended(file, run.spec.suspend), file=sys.stderr)
            return EXIT_INTERRUPTED
    failed = next(condition for condition in status.conditions if condition.type == "Failed")
    print(f"rlhf: {failed.message}", file=sys.stderr)
    return exit_code(failed.reason)


def exit_code(reason: str) -> int:
    """The exit code for the reason of a Failed condition: a failure class, or a deadline, a limit as a gate is."""
    if reason == "DeadlineExceeded":
        return EXIT_CODES["gate"]
    names: dict[str, FailureClass] = {name.lower(): name for name in EXIT_CODES}  # type: ignore[misc]
    return EXIT_CODES.get(names.get(reason.lower(), "bug"), EXIT_BUG)


def _suspended(file: Path, asked: bool) -> str:
    if asked:
        return f"rlhf: spec.suspend is true: nothing runs; set it to false in {file} and run again"
    return f"rlhf: stopped; `rlhf run {file}` continues"


def _show_success(folder: RunFolder, status: RunStatus, screen: Console) -> None:
    artifacts = open_artifacts(folder.store())
    screen.print(summary_table(summarize(status, artifacts)))
    if report := save_report(status, artifacts, folder.path / "report.html"):
        screen.print(f"Report: {report}", highlight=False, soft_wrap=True)
