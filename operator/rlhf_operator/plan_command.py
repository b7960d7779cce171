"""`rlhf validate` and `rlhf plan`: what is wrong with a file, and what running it would do."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_api.budget import GIB, Budget, ModelShape, budget, largest_sizes, suggestions
from rlhf_api.errors import UserError
from rlhf_api.names import EXIT_USER
from rlhf_api.run import RunSpec
from rlhf_operator.card_fit import CAVEAT, card_fits, card_table, summary
from rlhf_operator.display import console
from rlhf_operator.fingerprints import fingerprints
from rlhf_operator.forks import stages_taken
from rlhf_operator.load import load_run
from rlhf_operator.local import observe_store
from rlhf_operator.model_config import shape_before_import
from rlhf_operator.place import chosen_store, home
from rlhf_operator.plan import Observed, plan
from rlhf_operator.stages import chain
from rlhf_store.artifacts import open_artifacts

VERDICTS = {"Reused": "reuse", "Succeeded": "reuse", "Skipped": "skip", "Waiting": "run"}
STYLES = {"reuse": "green", "skip": "dim", "run": "bold cyan"}


def validate_file(file: Path, as_json: bool) -> int:
    """Print that the file is right and return 0. Raises UserError, naming each field, if it is not.

    With `as_json` the problems are printed as well and the exit code for wrong input is returned.
    """
    try:
        run = load_run(file)
        fingerprints(run, home().fingerprint_cache)
    except UserError as error:
        if not as_json:
            raise
        print(json.dumps({"valid": False, "problems": str(error).splitlines()}))
        return EXIT_USER
    taken = stages_taken(run)
    stages = [link.name for link in chain(run, {}) if link.skipped is None and link.name not in taken]
    if as_json:
        print(json.dumps({"valid": True, "name": run.metadata.name, "stages": stages}))
    else:
        print(f"{file}: valid; {len(stages)} stages: {', '.join(stages)}")
    return 0


def plan_file(file: Path, store_url: str | None, endpoint: str | None, as_json: bool, cards: bool = False) -> None:
    """Print what `rlhf run` would do with each stage, the memory that it takes and how long. cards: a row a card."""
    run = home().forked(load_run(file))
    store = chosen_store(store_url, endpoint, run)
    known = fingerprints(run, home().fingerprint_cache)
    links = chain(run, known)
    observed = Observed(fingerprints=known, artifacts=observe_store(links, open_artifacts(store)))
    awake = run.model_copy(update={"spec": run.spec.model_copy(update={"suspend": False})})
    status = plan(awake, observed, time.time()).status
    rows = [
        {
            "stage": stage.name,
            "action": VERDICTS[stage.state],
            "reason": stage.message,
            "artifact": stage.artifact,
            "gpu": link.stage.gpu and run.spec.gpu.count > 0,
        }
        for stage, link in zip(status.stages, links, strict=True)
    ]
    imported = ModelShape.from_figures(observed.artifacts.get(str(links[0].output), {}))
    shape = imported or (shape_before_import(run.spec.model) if run.spec.gpu.count else "it needs no GPU")
    pending = [str(row["stage"]) for row in rows if row["action"] == "run"]
    if as_json:
        found = {"name": run.metadata.name, "store": store.url, "stages": rows}
        print(json.dumps(found | memory_json(shape, run.spec, pending)))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("stage", "action", "on", "artifact"):
        table.add_column(heading)
    for row in rows:
        action = str(row["action"])
        kind, _, digest = str(row["artifact"] or "").partition("/")
        about = f"{kind}/{digest[:12]}" if digest else str(row["reason"])
        where = "" if action != "run" else "GPU" if row["gpu"] else "CPU"
        table.add_row(str(row["stage"]), Text(action, style=STYLES[action]), where, Text(about, style="dim"))
    screen = console()
    screen.print(table)
    screen.print(f"Store: {store.url}", style="dim", highlight=False, soft_wrap=True)
    if run.spec.gpu.count == 0:
        return
    if isinstance(shape, str):
        screen.print(f"Memory and time: known once the model is imported ({shape}).", style="dim", soft_wrap=True)
        return
    print_memory(screen, shape, run.spec)
    print_cards(screen, shape, run.spec, pending, cards)


def memory_json(shape: ModelShape | str, spec: RunSpec, pending: Sequence[str]) -> dict[str, Any]:
    """The bytes of each phase, the largest batches that fit, what to change, and every card; null where unknown."""
    if isinstance(shape, str):
        return dict.fromkeys(("memory", "largest", "suggestions", "cards"))
    phases = budget(shape, spec).phases
    return {
        "memory": [{"stage": phase.stage, "phase": phase.name, "bytes": phase.terms} for phase in phases],
        "largest": largest_sizes(shape, spec),
        "suggestions": suggestions(shape, spec),
        "cards": [fit.as_json() for fit in card_fits(shape, spec, pending)] if spec.gpu.count else None,
    }


def print_memory(screen: Console, shape: ModelShape, spec: RunSpec) -> None:
    """Each phase, the peak, the largest batches that fit, and what to change where something does not."""
    memory = budget(shape, spec)
    screen.print(memory_table(memory))
    peak, limit = memory.peak.total / GIB, memory.available / GIB
    screen.print(f"Peak {peak:.1f} of {limit:.1f} GiB, in {memory.peak.stage} {memory.peak.name} (an estimate).")
    sizes = ", ".join(f"{knob} {size or 'none'}" for knob, size in largest_sizes(shape, spec).items())
    screen.print(f"Largest that fit {spec.gpu.memory}: {sizes}.", soft_wrap=True, highlight=False)
    for line in suggestions(shape, spec):
        screen.print(f"Does not fit: {line}", style="bold red", soft_wrap=True)


def print_cards(screen: Console, shape: ModelShape, spec: RunSpec, pending: Sequence[str], every: bool) -> None:
    """On which cards the run fits and how long what would run takes there; with `every` a row a card."""
    fits = card_fits(shape, spec, pending)
    if every:
        screen.print(card_table(fits))
    else:
        for line in summary(fits):
            screen.print(line, soft_wrap=True, highlight=False)
    more = "" if every else " --cards: each stage's, and the changes."
    ideal = f" On {spec.gpu.count} GPUs the ideal: divided by {spec.gpu.count}." if spec.gpu.count > 1 else ""
    screen.print(CAVEAT + ideal + more, style="dim", soft_wrap=True)


def memory_table(memory: Budget) -> Table:
    """GiB of each phase that uses the GPU: in all, and each term of a hundredth or more."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("phase")
    table.add_column("GPU GiB", justify="right")
    table.add_column("of it", overflow="fold")
    for phase in memory.phases:
        terms = [f"{name} {size / GIB:.2f}" for name, size in phase.terms.items() if size / GIB >= 0.01]
        table.add_row(f"{phase.stage} {phase.name}", f"{phase.total / GIB:.2f}", Text(", ".join(terms), style="dim"))
    return table
