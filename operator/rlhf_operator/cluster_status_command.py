"""`rlhf status --cluster`: the runs of a namespace, or the stages of one and what holds it up."""

import json
import time
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from rlhf_operator.cluster_options import ClusterOptions
from rlhf_operator.cluster_runs import ClusterRuns
from rlhf_operator.conditions import unix_time
from rlhf_operator.display import console, stage_table, waiting_for
from rlhf_operator.figures import duration, number
from rlhf_operator.followed import observed_of, status_of
from rlhf_operator.pod_template import Document

UNSEEN = "no operator has looked at it yet"


def show_cluster_runs(where: ClusterOptions, everywhere: bool, as_json: bool) -> None:
    """One line a run."""
    runs = ClusterRuns(where)
    found = runs.runs(everywhere)
    if as_json:
        print(json.dumps([_row(run) for run in found]))
        return
    if not found:
        place = "the cluster" if everywhere else f"namespace {runs.namespace}"
        print(f"no runs in {place}; start one with `{where.command('run', 'FILE')}`")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    columns = (["namespace"] if everywhere else []) + ["name", "phase", "stage", "progress", "reward"]
    for column in columns:
        table.add_column("run" if column == "name" else column)
    table.add_column("age", justify="right")
    for run in found:
        row = _row(run)
        age = duration(time.time() - unix_time(run["metadata"]["creationTimestamp"]))
        table.add_row(*(_cell(row.get(column)) for column in columns), age)
    console().print(table)


def show_cluster_run(name: str, where: ClusterOptions, as_json: bool) -> None:
    """Every stage of one run. Raises UserError if there is no such run."""
    runs = ClusterRuns(where)
    run = runs.get(name)
    if as_json:
        print(json.dumps({"name": name, "namespace": runs.namespace, **run.get("status", {})}))
        return
    status = status_of(run)
    screen = console()
    screen.print(Text.assemble((name, "bold"), f"  {status.phase if status else UNSEEN}"))
    if status is None:
        return
    if status.stages:
        screen.print(stage_table(status, observed_of(status, runs.jobs(run), time.time()), time.time()))
    troubles = [
        waiting_for(status),
        *(each.message for each in status.conditions if _is_failure(each.type, each.status)),
    ]
    _print_lines([trouble for trouble in troubles if trouble], "yellow")
    if status.store:
        _print_lines([f"Store: {status.store.url} at {status.store.endpoint or 'AWS'}"], "dim")


def _print_lines(lines: Sequence[str], style: str) -> None:
    for line in lines:
        console().print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def _is_failure(kind: str, holds: str) -> bool:
    return (kind, holds) == ("Failed", "True")


def _row(run: Document) -> Document:
    status = run.get("status") or {}
    shown = {field: status.get(field) for field in ("phase", "stage", "progress", "reward")}
    return {"namespace": run["metadata"]["namespace"], "name": run["metadata"]["name"], **shown}


def _cell(value: object) -> str:
    return "" if value is None else number(value) if isinstance(value, float) else str(value)
