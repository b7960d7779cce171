"""Whether a run fits in its GPU's memory, by the estimate of `rlhf_api.budget`: asked before a GPU is."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Final

from rlhf_api.budget import GIB, ModelShape, budget, suggestions
from rlhf_api.run import Condition, RunSpec

TOLERANCE: Final = 1.05  # the estimate is within 2.3 % of every peak measured; other models may differ a little more


@dataclass(frozen=True)
class MemoryCheck:
    """The condition FitsInMemory, the budget's phases for status, and why the run must not go on, if so."""

    condition: Condition
    lines: list[dict[str, Any]] = field(default_factory=list)
    refusal: str | None = None


def check_memory(spec: RunSpec, shape: ModelShape | None, pending: Collection[str]) -> MemoryCheck:
    """What the estimate says of `spec`. `pending`: the stages that have yet to use a GPU; only they are refused."""
    if spec.gpu.count == 0:
        return MemoryCheck(_condition("True", "NoGPU", "gpu.count is 0: host memory is not estimated"))
    if shape is None:
        return MemoryCheck(_condition("Unknown", "ModelNotImported", "known once the model is imported"))
    found = budget(shape, spec)
    lines = [
        {
            "stage": phase.stage,
            "phase": phase.name,
            "gibibytes": round(phase.total / GIB, 2),
            "fits": phase.total <= found.available,
            "terms": {name: round(size / GIB, 2) for name, size in phase.terms.items() if size >= GIB / 200},
        }
        for phase in found.phases
    ]
    peak = found.peak
    most = f"{peak.total / GIB:.1f} GiB of {found.available / GIB:.1f}, in {peak.stage} {peak.name}"
    if found.fits:
        return MemoryCheck(_condition("True", "Estimated", f"at most {most}"), lines)
    advice = "\n".join(suggestions(shape, spec))
    too_large = any(
        phase.total > found.available * TOLERANCE and (phase.stage in pending or (phase.stage == "any" and pending))
        for phase in found.phases
    )
    return MemoryCheck(_condition("False", "TooLarge", advice), lines, advice if too_large else None)


def _condition(status: Any, reason: str, message: str) -> Condition:
    return Condition(type="FitsInMemory", status=status, reason=reason, message=message)
