"""Did it work: one sentence from the evaluation's figures, and no more than they say."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Verdict:
    """The headline. tone: good, mixed or bad."""

    tone: Literal["good", "mixed", "bad"]
    headline: str
    detail: str


def verdict(report: Mapping[str, Any]) -> Verdict:
    """What an evaluation's report.json amounts to. A rise counts if its 95 % interval lies above 0."""
    reward = report["reward"]["rise"]
    scorers: Mapping[str, Any] = report["scorers"]
    rose = [name for name, figures in scorers.items() if figures["rise"]["low"] > 0]
    fell = [name for name, figures in scorers.items() if figures["rise"]["high"] < 0]
    unclear = [name for name in scorers if name not in rose + fell]
    if reward["low"] <= 0:
        what = "fell" if reward["high"] < 0 else "did not rise beyond chance"
        return Verdict(
            "bad",
            f"It did not work: the reward {what}.",
            "Train longer, raise ppo.learningRate, or lower ppo.klCoefficient; first look whether the reward model "
            "ranks held-out pairs well.",
        )
    if not scorers:
        return Verdict(
            "mixed",
            "The reward rose; nothing independent says whether that is real.",
            "A policy can learn to please its reward model without getting better. Add evaluate.scorers.",
        )
    if fell:
        return Verdict(
            "bad",
            f"The reward rose but {_listed(fell)} fell: the policy exploits the reward model.",
            "Stop earlier (ppo.maxKl), raise ppo.klCoefficient, or improve the reward model.",
        )
    if unclear:
        confirmed = f"{_listed(rose)} confirms it, {_listed(unclear)} does not" if rose else "no scorer confirms it"
        return Verdict(
            "mixed",
            f"The reward rose; {confirmed}.",
            "An interval that holds 0 cannot tell a rise from chance: raise evaluate.samples, or train longer.",
        )
    which = f"all {len(rose)} independent scorers" if len(rose) > 2 else _listed(rose)
    return Verdict(
        "good",
        f"It worked: the reward rose, and so did {which}.",
        "Scorers that training never saw confirm the rise: each 95 % interval lies above 0.",
    )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
