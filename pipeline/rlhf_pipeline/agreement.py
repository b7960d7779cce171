"""How far scores agree with preferences, and with each other."""

import math

import torch
from torch import Tensor


def pair_accuracy(scores: Tensor) -> float:
    """The share of pairs whose chosen text scores higher. scores: (pairs, 2), chosen first."""
    return (scores[:, 0] > scores[:, 1]).double().mean().item()


def wilson_interval(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share seen in `count` trials. Source: Wilson 1927."""
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors, with average ranks for ties; 0 if one does not vary."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    if ranks.std(dim=1).min() == 0:
        return 0.0
    return torch.corrcoef(ranks)[0, 1].item()


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts - 1) / 2).double()[inverse]
