"""What a comparison of two policies says beyond chance: means, paired rises and win rates with 95 % intervals."""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_pipeline.agreement import wilson_interval

CONFIDENCE = 0.95
WORD = re.compile(r"\w+(?:['’]\w+)*")


@dataclass(frozen=True)
class Mean:
    """A mean of `count` values, its 95 % interval, and the values' standard deviation."""

    mean: float
    low: float
    high: float
    deviation: float
    count: int


@dataclass(frozen=True)
class WinRate:
    """How often the second of two is better, a tie counting half, with the 95 % interval of that share."""

    share: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int


def mean_of(values: Sequence[float]) -> Mean:
    """The mean with Student's interval. Raises ValueError for fewer than two values: nothing tells their spread."""
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    count = len(values)
    if count < 2:
        raise ValueError(f"an interval needs at least 2 values, not {count}")
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    half = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * deviation / math.sqrt(count)
    return Mean(mean, mean - half, mean + half, deviation, count)


def paired_rise(before: Sequence[float], after: Sequence[float]) -> Mean:
    """The mean of after - before over the same prompts, with Student's interval. Raises ValueError as `mean_of`."""
    return mean_of([b - a for a, b in zip(before, after, strict=True)])


def win_rate(before: Sequence[float], after: Sequence[float]) -> WinRate:
    """How often `after` beats `before` on the same prompt, with Wilson's interval. Raises ValueError if both are empty.

    A tie as half a win makes the interval slightly too wide, never too narrow.
    """
    pairs = list(zip(before, after, strict=True))
    if not pairs:
        raise ValueError("a win rate needs at least 1 pair")
    wins = sum(b > a for a, b in pairs)
    ties = sum(b == a for a, b in pairs)
    share = (wins + ties / 2) / len(pairs)
    low, high = wilson_interval(share, len(pairs))
    return WinRate(share, low, high, wins, ties, len(pairs) - wins - ties)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams over all of them, within texts, case ignored. 0 where no text has n words.

    A policy that found one phrase the reward likes scores low. Source: Li et al. 2016 (arXiv 1510.03055), section 5.
    """
    grams = []
    for text in texts:
        words = WORD.findall(text.lower())
        grams += [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
