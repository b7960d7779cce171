"""`rlhf run FILE --cluster`: hand the run to an operator, show it, and end as a run on this machine does."""

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf_api.errors import RLHFError, UserError
from rlhf_api.names import EXIT_INTERRUPTED, EXIT_OK, SINGULAR
from rlhf_api.run import RunStatus
from rlhf_operator.cluster_options import ClusterOptions
from rlhf_operator.cluster_runs import ClusterRuns
from rlhf_operator.display import console, display
from rlhf_operator.followed import follow
from rlhf_operator.load import load_document, load_run
from rlhf_operator.open_run import opened
from rlhf_operator.run_command import exit_code
from rlhf_operator.submission import submitted
from rlhf_operator.summary import summarize, summary_table


def run_in_cluster(file: Path, where: ClusterOptions, follow_it: bool, as_json: bool) -> int:
    """Create the file's run and, unless told not to, follow it to its end; returns the exit code, as on this machine.

    A run that is there already is followed, or asked for again if it has failed. Ctrl-C ends the following, not the
    run. With `as_json`, progress goes to standard error. Raises UserError if another run has its name.
    """
    load_run(file)  # every complaint at once, before anything is sent
    document = load_document(file)
    where = _with_namespace(where, document, file)
    runs = ClusterRuns(where)
    run = submitted(runs, document, file)
    name, screen = run["metadata"]["name"], console(stderr=as_json)
    if not follow_it:
        if as_json:
            print(json.dumps({"name": name, "namespace": runs.namespace, "uid": run["metadata"]["uid"]}))
        else:
            print(_ways(file, name, where))
        return EXIT_OK
    try:
        with display(screen) as show:
            status = follow(runs, run, show, lambda line: _say(line, screen))
    except KeyboardInterrupt:
        print(f"rlhf: {name} goes on in namespace {runs.namespace}\n{_ways(file, name, where)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    if as_json:
        print(status.model_dump_json(by_alias=True, exclude_none=True))
    match status.phase:
        case "Succeeded":
            _show_success(name, where, screen)
            return EXIT_OK
        case "Suspended":
            print(f"rlhf: {name} is suspended; `{where.command('resume', name)}` resumes it", file=sys.stderr)
            return EXIT_INTERRUPTED
    failed = next(condition for condition in status.conditions if condition.type == "Failed")
    print(f"rlhf: {failed.message}", file=sys.stderr)
    print(_ways_on(file, name, where, status), file=sys.stderr)
    return exit_code(failed.reason)


def _with_namespace(where: ClusterOptions, document: Any, file: Path) -> ClusterOptions:
    """The options with the file's namespace. Raises UserError if they name another."""
    named = document["metadata"].get("namespace")
    if named and where.namespace and named != where.namespace:
        raise UserError(f"--namespace {where.namespace}: {file} is for namespace {named}; leave one of them out")
    return replace(where, namespace=named or where.namespace)


def _say(line: str, screen: Console) -> None:
    screen.print(f"rlhf: {line}", markup=False, highlight=False, soft_wrap=True, style="yellow")


def _ways(file: Path, name: str, where: ClusterOptions) -> str:
    """What a person may do with a run that goes on without them."""
    return _lines(
        {
            "follow": where.command("run", str(file)),
            "look": where.command("status", name),
            "suspend": where.command("suspend", name),
            "delete": shlex.join(where.kubectl("delete", SINGULAR, name)),
        }
    )


def _ways_on(file: Path, name: str, where: ClusterOptions, status: RunStatus) -> str:
    """What a person may do about a run that failed."""
    ways = {"again": where.command("run", str(file))}
    if status.stage and any(stage.name == status.stage and stage.attempt for stage in status.stages):
        ways = {"logs": where.command("logs", name, "--stage", status.stage), **ways}
    return _lines(ways)


def _lines(ways: Mapping[str, str]) -> str:
    return "\n".join(f"  {word:<8} {command}" for word, command in ways.items())


def _show_success(name: str, where: ClusterOptions, screen: Console) -> None:
    """The figures, where this machine may read the store: the run has succeeded either way."""
    try:
        with opened(name, where) as run:
            screen.print(summary_table(summarize(run.status, run.artifacts)))
    except RLHFError as error:
        print(f"rlhf: no summary: {error}", file=sys.stderr)
    screen.print(f"Report: {where.command('report', name)}", highlight=False, soft_wrap=True)
