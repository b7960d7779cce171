"""Which curves the report draws for each training stage, and what a practitioner should look for in each."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from rlhf_pipeline.report.charts import line
from rlhf_pipeline.report.records import Record

MAX_POINTS = 400  # a longer curve is averaged: more could not be told apart on a screen


@dataclass(frozen=True)
class Curve:
    """A metric worth a chart."""

    metric: str
    title: str
    unit: str
    look_for: str
    zero: bool = False  # let the axis begin at 0


@dataclass(frozen=True)
class Figure:
    """A chart with its words."""

    title: str
    look_for: str
    svg: Markup


PPO: Final = (
    Curve("reward", "Reward", "reward", "Score minus the KL penalty: what PPO maximises. Should rise, then level off."),
    Curve(
        "score",
        "Score",
        "score",
        "What the reward model says of the rollouts; 0 is the SFT policy at the start. A rise here without one in the "
        "independent scorers means the policy exploits the reward model.",
    ),
    Curve(
        "kl",
        "KL to the SFT policy",
        "nats a response",
        "How far the policy has moved. Should grow slowly; a jump means the updates are too large.",
        True,
    ),
    Curve(
        "entropy",
        "Entropy",
        "nats a token",
        "How open the policy keeps its choices. A slow fall is normal; close to 0 it repeats a few phrases.",
        True,
    ),
    Curve(
        "response_tokens",
        "Response length",
        "tokens",
        "A steady climb or fall without need is a common way to please a reward model.",
        True,
    ),
    Curve(
        "eos_rate",
        "Responses that end by themselves",
        "share",
        "The rest are cut at the token limit. At 0 throughout, the limit is shorter than what the model wants to say.",
        True,
    ),
    Curve("policy_loss", "Policy loss", "loss", "Noise around 0 without a trend. Spikes mean too large updates."),
    Curve("value_loss", "Value loss", "loss", "Should fall and stay low; if it rises the critic cannot follow.", True),
    Curve(
        "explained_variance",
        "Explained variance of the critic",
        "share",
        "Should climb towards 1. At or below 0 the critic is no better than a constant and advantages are noise.",
    ),
    Curve(
        "clip_fraction",
        "Clipped tokens",
        "share",
        "Tokens whose probability moved past the clip. Up to 0.3 is usual; at 0 the learning rate could be higher.",
        True,
    ),
    Curve(
        "approx_kl",
        "KL of one update",
        "nats a token",
        "How far one rollout's updates move the policy. Keep it well below 0.1.",
        True,
    ),
    Curve("ratio_max", "Largest probability ratio", "ratio", "Stays in single figures in a healthy run."),
    Curve(
        "grad_norm", "Gradient norm", "norm", "Before clipping. Rare spikes are harmless, a steady growth is not.", True
    ),
    Curve("kl_coefficient", "KL coefficient", "weight", "Fixed, or steered by adaptiveKl towards its target.", True),
    Curve("tokens_per_second", "Sampling speed", "tokens a second", "Should stay flat; a fall points at memory.", True),
    Curve("peak_memory_gib", "Peak GPU memory", "GiB", "Should be flat after the first rollouts.", True),
)
SFT: Final = (
    Curve(
        "loss",
        "Training loss",
        "nats a token",
        "Should fall quickly, then slowly. Flat from the start: raise the rate.",
    ),
    Curve(
        "grad_norm", "Gradient norm", "norm", "Before clipping. Rare spikes are harmless, a steady growth is not.", True
    ),
)
REWARD: Final = (
    Curve("loss", "Training loss", "loss", "Starts near 0.69, a coin's toss, and should fall well below.", True),
    Curve(
        "accuracy", "Training accuracy", "share", "Pairs ranked right. Near 1 while held-out accuracy lags: overfitted."
    ),
    Curve("margin", "Margin", "score", "Chosen minus rejected. Should grow, then slow down."),
)
CURVES: Final = {"ppo": PPO, "sft": SFT, "reward": REWARD}
STEP_NAMES: Final = {"ppo": "rollout"}


def figures(record: Record) -> list[Figure]:
    """The charts of one stage: of those metrics it logged, except a coefficient that never moved."""
    step = STEP_NAMES.get(record.stage, "step")
    drawn = []
    for curve in CURVES.get(record.stage, ()):
        points = [
            (float(row["step"] or 0), float(value))
            for row in record.curve
            if (value := row.get(curve.metric)) is not None
        ]
        constant = len({y for _, y in points}) == 1 and curve.metric == "kl_coefficient"
        if points and not constant:
            svg = line(thinned(points), curve.title, step, curve.unit, curve.zero)
            drawn.append(Figure(curve.title, curve.look_for, svg))
    return drawn


def thinned(points: Sequence[tuple[float, float]], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: means of neighbours, each at the last x of its group. The last x is kept."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) // most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], statistics.fmean(y for _, y in group)) for group in groups]
