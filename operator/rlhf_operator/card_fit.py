"""On which card a run fits, what it would have to do in smaller batches there, and how long it takes."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from rlhf_api.budget import GIB, ModelShape, budget, largest_sizes, sizes_that_fit, with_sizes
from rlhf_api.cards import CARDS, Card
from rlhf_api.estimate import estimate
from rlhf_api.run import RunSpec
from rlhf_operator.figures import roughly

CAVEAT = (
    "Times are estimates from each card's bandwidth and FLOP/s, for texts as long as the settings allow; "
    "of these cards one H200 was measured."
)


@dataclass(frozen=True)
class CardFit:
    """What the estimates say of a run on one card, with all of the card's memory as gpu.memory."""

    card: Card
    peak: float  # bytes, of the spec as it is
    available: float
    changes: dict[str, int | str] | None
    """What the spec must have else to fit; None if no batch is small enough."""
    largest_rollout: int | None
    seconds: dict[str, float]
    """Of each stage that would run, with the changes; empty where it does not fit."""

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def as_json(self) -> dict[str, Any]:
        """What `rlhf plan --json` says of the card."""
        return {
            "card": self.card.name,
            "memory": self.card.memory,
            "fits": self.changes == {},
            "peakBytes": self.peak,
            "availableBytes": self.available,
            "changes": self.changes,
            "largestRolloutBatchSize": self.largest_rollout,
            "seconds": self.seconds | {"total": self.total} if self.seconds else None,
        }


def card_fits(shape: ModelShape, spec: RunSpec, stages: Collection[str]) -> list[CardFit]:
    """Every card of the table, with the times of `stages`."""
    return [_fit(shape, spec, card, stages) for card in CARDS]


def _fit(shape: ModelShape, spec: RunSpec, card: Card, stages: Collection[str]) -> CardFit:
    changes: dict[str, int | str] = {}
    spec = spec.model_copy(update={"gpu": spec.gpu.model_copy(update={"memory": card.memory})})
    if not card.bfloat16 and spec.quantization.compute_dtype in ("auto", "bfloat16"):
        changes["quantization.computeDtype"] = "float16"
        spec = spec.model_copy(
            update={"quantization": spec.quantization.model_copy(update={"compute_dtype": "float16"})}
        )
    memory, sizes = budget(shape, spec), sizes_that_fit(shape, spec)
    seconds: dict[str, float] = {}
    if sizes is not None:
        for phase in estimate(shape, with_sizes(spec, sizes), card):
            if phase.stage in stages:
                seconds[phase.stage] = seconds.get(phase.stage, 0.0) + phase.seconds
    return CardFit(
        card,
        memory.peak.total,
        memory.available,
        None if sizes is None else {**changes, **sizes},
        largest_sizes(shape, spec)["ppo.rolloutBatchSize"],
        seconds,
    )


def summary(fits: list[CardFit]) -> list[str]:
    """The cards in a line or two: those that the spec fits as it is, those it fits with changes, and the others."""
    groups: Mapping[str, list[CardFit]] = {
        "Fits": [fit for fit in fits if fit.changes == {}],
        "Fits with changes": [fit for fit in fits if fit.changes],
        "Too small": [fit for fit in fits if fit.changes is None],
    }
    return [
        f"{words}: " + ", ".join(fit.card.name + (f" {roughly(fit.total)}" if fit.seconds else "") for fit in group)
        for words, group in groups.items()
        if group
    ]


def card_table(fits: list[CardFit]) -> Table:
    """One row a card."""
    stages = list(dict.fromkeys(stage for fit in fits for stage in fit.seconds))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("card", "gpu.memory", "fits"):
        table.add_column(heading, no_wrap=True)
    for heading in ("peak GiB", "largest rolloutBatchSize", *stages, *(["total"] if stages else [])):
        table.add_column(heading, justify="right")
    table.add_column("with")
    for fit in fits:
        verdict, style = ("yes", "green") if fit.changes == {} else ("with changes", "yellow")
        verdict, style = ("no", "red") if fit.changes is None else (verdict, style)
        times = [roughly(fit.seconds[stage]) for stage in stages] if fit.seconds else [""] * len(stages)
        table.add_row(
            fit.card.name,
            fit.card.memory,
            Text(verdict, style=style),
            f"{fit.peak / GIB:.1f} of {fit.available / GIB:.1f}",
            str(fit.largest_rollout or "none"),
            *times,
            *([roughly(fit.total) if fit.seconds else ""] if stages else []),
            Text(", ".join(f"{field} {value}" for field, value in (fit.changes or {}).items()), style="dim"),
        )
    return table
