"""A run handed to a cluster: created, or found there under its name and changed as far as a run may change."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rlhf_api.crd import MUTABLE, MUTABLE_WHILE_SUSPENDED
from rlhf_api.errors import UserError
from rlhf_api.names import SINGULAR
from rlhf_api.parse import parse_run
from rlhf_operator.cluster_runs import ClusterRuns
from rlhf_operator.followed import status_of
from rlhf_operator.pod_template import Document
from rlhf_operator.reconcile import merge_patch
from rlhf_operator.resume_command import asked_again
from rlhf_operator.run_difference import differences

MAX_LINES: Final = 10  # of fields that differ


def submitted(runs: ClusterRuns, document: Any, file: Path) -> Document:
    """Creates the run, or finds it there, and says so on standard error. One that had failed is asked for again.

    Raises UserError if what is there under its name is another run.
    """
    name = document["metadata"]["name"]
    there = runs.find(name)
    if there is None and (run := runs.create(document)) is not None:
        _tell(runs, name, "created")
        return run
    there = there or runs.get(name)
    failed = (status := status_of(there)) is not None and status.phase == "Failed"
    found = _allowed_differences(runs, document, there, file)
    suspend, suspended = (bool(each["spec"].get("suspend")) for each in (document, there))
    words = [f"{', '.join(found)} changed"] if found else []
    patch = _patch(document, there, list(found))
    if failed and not suspend:
        words = ["asked for again, as it had failed", *words]
        there = asked_again(runs, there, patch)
    elif words or suspend != suspended:
        words = ([] if suspend == suspended else ["suspended" if suspend else "resumed"]) + words
        there = runs.patch(name, patch)
    _tell(runs, name, ", ".join(words) or "there already")
    return there


def _allowed_differences(
    runs: ClusterRuns, document: Any, there: Document, file: Path
) -> Mapping[str, tuple[str, str]]:
    """What the file asks for that differs from the run of its name. Raises UserError if that cannot be changed."""
    name, phase = there["metadata"]["name"], (there.get("status") or {}).get("phase")
    try:
        known = parse_run({field: there[field] for field in ("apiVersion", "kind", "metadata", "spec")})
    except UserError as error:
        raise UserError(f"run {name!r} is there already, in words of another version; use that one:\n{error}") from None
    found = differences(parse_run(document), known)
    if not (wrong := [field for field in found if not _may_change(field, there)]):
        return found
    lines = [f"  {field}: {found[field][1]} there, {found[field][0]} in {file.name}" for field in wrong]
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"  and {len(lines) - MAX_LINES} more"]
    if phase != "Succeeded" and all(_section(field) in MUTABLE_WHILE_SUSPENDED for field in wrong):
        remedy = f"Suspend it with `{runs.options.command('suspend', name)}`, then run this again."
    else:
        delete = shlex.join(runs.options.kubectl("delete", SINGULAR, name))
        remedy = (
            "Give the file another metadata.name: stages that both runs share are reused. "
            f"Or delete the run that is there with `{delete}`, then run this again."
        )
    head = f"run {name!r} is in namespace {runs.namespace} already, and is not the one of {file}:"
    raise UserError("\n".join([head, *lines, remedy]))


def _may_change(field: str, there: Document) -> bool:
    """Whether the API server, by the rules of the CRD, lets a field of this run change."""
    resting = there["spec"].get("suspend") or (there.get("status") or {}).get("phase") == "Failed"
    section = _section(field)
    return section is None or section in MUTABLE or bool(resting and section in MUTABLE_WHILE_SUSPENDED)


def _section(field: str) -> str | None:
    """The part of the spec that a field is in; None of a label."""
    first, second, *_ = field.split(".")
    return second if first == "spec" else None


def _patch(document: Any, there: Document, fields: Sequence[str]) -> Document:
    """A merge patch that makes the sections of these fields, the labels and spec.suspend as the document says."""
    sections = {_section(field) for field in fields}
    old = {name: value for name, value in there["spec"].items() if name in sections}
    new = {name: value for name, value in document["spec"].items() if name in sections}
    suspend = bool(document["spec"].get("suspend"))
    patch: Document = {"spec": {**merge_patch(old, new), "suspend": suspend}}
    if None in sections:
        patch["metadata"] = {"labels": document["metadata"]["labels"]}
    return patch


def _tell(runs: ClusterRuns, name: str, what: str) -> None:
    print(f"rlhf: {name} in namespace {runs.namespace}: {what}", file=sys.stderr)
