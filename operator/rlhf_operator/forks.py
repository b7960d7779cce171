"""What a run takes over from the one that spec.forkFrom names: an artifact, and all that it was made from. No I/O."""

from typing import Final

from rlhf_api.run import Fork, RLHFRun, RunStatus
from rlhf_operator.conditions import Hold
from rlhf_operator.stages import STAGES

DONE: Final = ("Succeeded", "Reused")


def stages_taken(run: RLHFRun) -> list[str]:
    """The stages that the run takes over, or will; none without spec.forkFrom."""
    return stages_up_to(run.spec.fork_from.stage) if run.spec.fork_from else []


def stages_up_to(stage: str) -> list[str]:
    """A stage and those whose output it is made from, in the order of the table."""
    wanted, kinds = {stage}, set[str]()
    for row in reversed(STAGES):
        if row.name in wanted or row.output in kinds:
            wanted.add(row.name)
            kinds |= set(row.inputs.values())
    # Where sft is skipped, the model stands for the merged model.
    return [row.name for row in STAGES if row.name in wanted or row.output == "model"]


def taken_over(fork: Fork, source: RunStatus | None) -> dict[str, str] | Hold:
    """Stage -> kind/digest of the source's artifact, empty for a stage that the source skipped.

    A Hold where there is nothing to take yet: the source may still be made, or still be at work.
    """
    if source is None:
        return Hold("ForkSourceMissing", f"spec.forkFrom.run: there is no run {fork.run}; it waits for one")
    found = {stage.name: stage for stage in source.stages}
    asked = found.get(fork.stage)
    if asked is None or asked.state not in DONE:
        state = f"is {asked.state}" + (f" ({asked.message})" if asked.message else "") if asked else "is not known yet"
        return Hold("ForkSourceNotReady", f"spec.forkFrom.stage: {fork.stage} of {fork.run} {state}; it waits for it")
    taken = {}
    for name in stages_up_to(fork.stage):
        stage = found.get(name)
        # "Skipped" alone may also mean that whatever reads its artifact was there already.
        taken[name] = (stage.artifact if stage else None) or ""
    return taken


def forked(run: RLHFRun, source: RunStatus | None) -> tuple[RLHFRun, Hold | None]:
    """`run` with what it takes over in its status, once and for all; or as it was, and why it has to wait.

    A run without spec.forkFrom, and one that has taken over already, comes back as it is.
    """
    fork = run.spec.fork_from
    if fork is None or (run.status is not None and run.status.taken):
        return run, None
    taken = taken_over(fork, source)
    if isinstance(taken, Hold):
        return run, taken
    status = (run.status or RunStatus()).model_copy(update={"taken": taken})
    return run.model_copy(update={"status": status}), None
