"""`rlhf status` and `rlhf report`: what the run folders and the store say of runs, past and present."""

import json
import time
from pathlib import Path

from rich.table import Table
from rich.text import Text

from rlhf_api.errors import UserError
from rlhf_api.run import RunStatus
from rlhf_operator.display import console, stage_table
from rlhf_operator.open_run import OpenRun
from rlhf_operator.place import home
from rlhf_operator.plan import Observed
from rlhf_operator.run_folder import RunFolder
from rlhf_operator.stages import STAGES
from rlhf_operator.summary import save_report


def show_runs(as_json: bool) -> None:
    """One line a run."""
    names = home().run_names()
    rows = [(name, _phase(folder := home().run_folder(name), folder.need_status())) for name in names]
    if as_json:
        print(json.dumps([{"name": name, "phase": phase} for name, phase in rows]))
        return
    if not rows:
        print("no run began in this folder; start one with `rlhf run FILE`")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("run")
    table.add_column("phase")
    for name, phase in rows:
        table.add_row(name, phase)
    console().print(table)


def show_run(name: str, as_json: bool) -> None:
    """Every stage of one run. Raises UserError if it never began."""
    folder = home().run_folder(name)
    status = folder.need_status()
    phase = _phase(folder, status)
    if as_json:
        document = status.model_dump(mode="json", by_alias=True, exclude_none=True)
        print(json.dumps({"name": name, "active": folder.active, **document}))
        return
    attempts = {stage.name: folder.attempts(stage.name) for stage in STAGES}
    screen = console()
    screen.print(Text.assemble((name, "bold"), f"  {phase}"))
    screen.print(stage_table(status, Observed(attempts=attempts), time.time()))


def copy_report(run: OpenRun, out: Path) -> None:
    """Write the report page to `out` and print its path. Raises UserError if the run has none yet."""
    path = save_report(run.status, run.artifacts, out)
    if path is None:
        raise UserError(f"run {run.name!r} has no report yet: its phase is {run.status.phase}; {run.finish}")
    print(path)


def _phase(folder: RunFolder, status: RunStatus) -> str:
    """The phase; a run that nobody drives any more was interrupted, whatever its status last said."""
    if status.phase in ("Pending", "Running") and not folder.active:
        return "Interrupted"
    return status.phase
