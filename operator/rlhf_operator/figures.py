"""How times, sizes and metrics are written, on the screen and in logs."""

from collections.abc import Mapping
from typing import Final

# What practitioners look at first, in this order.
KEY_METRICS: Final = (
    "reward_rise", "reward", "score", "kl", "accuracy", "held_out_loss_before", "held_out_loss_after", "loss",
)  # fmt: skip


def duration(seconds: float) -> str:
    """Such as 4 s, 3 min 05 s or 2 h 07 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def roughly(seconds: float) -> str:
    """An estimate of a duration, to two digits or so: 40 s, 25 min, 2.8 h or 31 h."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    if seconds < 3600:
        return f"{round(seconds / 60)} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 10 else f"{hours:.0f} h"


def size(count: float) -> str:
    """Bytes in binary units, such as 512 B or 1.4 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def number(value: float) -> str:
    """Three or so significant digits."""
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e6 else f"{value:.3g}"


def key_metrics(metrics: Mapping[str, float], count: int = 3) -> str:
    """The `count` metrics that say most, such as `reward 0.41  kl 3.2`."""
    names = [name for name in KEY_METRICS if name in metrics]
    names += [name for name in metrics if name not in names]
    return "  ".join(f"{name.replace('_', ' ')} {number(metrics[name])}" for name in names[:count])
