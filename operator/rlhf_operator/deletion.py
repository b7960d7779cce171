"""What goes with a run that is deleted, where spec.artifacts.onDelete asks for it: artifacts of it alone. No I/O."""

from collections.abc import Iterable
from typing import Any

from rlhf_api.names import FINALIZER
from rlhf_api.run import RLHFRun
from rlhf_api.stage import ArtifactRef
from rlhf_operator.pod_template import Document


def wants_cleaning(run: RLHFRun) -> bool:
    """Whether the run may go only after its artifacts."""
    return run.spec.artifacts.on_delete == "Delete"


def finalizers(document: Document) -> list[str]:
    """Who has to agree before the object is gone."""
    found: list[str] = document["metadata"].get("finalizers") or []
    return found


def without_ours(document: Document) -> list[str]:
    """Who still has to agree once the operator has."""
    return [each for each in finalizers(document) if each != FINALIZER]


def artifacts_of_none_but(document: Document, others: Iterable[Document]) -> list[ArtifactRef]:
    """The artifacts that the run's status names, without those that it took over, or that another run names.

    A run names what it is going to make as soon as it was looked at once, so one that is under way is safe. One that
    is being deleted itself needs nothing any more: of two that go together each removes what they shared. What runs of
    other clusters, or `rlhf run`, share with it in the same store is not known here.
    """
    uid = document["metadata"]["uid"]
    staying = [other for other in others if not other["metadata"].get("deletionTimestamp")]
    used = {name for other in staying if other["metadata"]["uid"] != uid for name in artifacts_named(other)}
    taken = set((document.get("status") or {}).get("taken", {}).values())
    found = dict.fromkeys(name for name in artifacts_named(document) if name not in used | taken)
    return [ArtifactRef.parse(name) for name in found]


def artifacts_named(document: Document) -> list[str]:
    """kind/digest of what a run made, means to make or took over, the last stage's first."""
    status: dict[str, Any] = document.get("status") or {}
    stages: list[dict[str, Any]] = status.get("stages") or []
    return [stage["artifact"] for stage in reversed(stages) if stage.get("artifact")] + [
        name for name in status.get("taken", {}).values() if name
    ]
