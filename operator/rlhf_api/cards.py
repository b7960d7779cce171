"""NVIDIA's cards that people rent or own for this: how much memory, how fast, and who says so.

Speeds are the vendor's peaks, without sparsity; what of them is reached, `rlhf_api.estimate` says.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Card:
    """One card. `memory` can stand in `gpu.memory`: it is what nvidia-smi reports, ECC on where it is so by default."""

    name: str
    memory: str
    bandwidth: float  # of the memory, bytes a second
    flops: float  # a second, of dense bfloat16 products summed in float32; float16 where there is no bfloat16
    source: str  # of the speeds
    bfloat16: bool = True


CARDS: Final = (
    Card("T4", "15360Mi", 300e9, 65e12, "NVIDIA T4 data sheet", bfloat16=False),
    Card("L4", "23034Mi", 300e9, 121e12, "NVIDIA L4 data sheet (242 with sparsity)"),
    Card("A10G", "23028Mi", 600e9, 70e12, "NVIDIA A10G data sheet, of AWS"),
    Card("RTX 3090", "24576Mi", 936e9, 71e12, "NVIDIA Ampere GA102 whitepaper"),
    Card("RTX 4090", "24564Mi", 1008e9, 165e12, "NVIDIA Ada GPU architecture whitepaper"),
    Card("A100 40 GB", "40960Mi", 1555e9, 312e12, "NVIDIA A100 data sheet"),
    Card("L40S", "46068Mi", 864e9, 362e12, "NVIDIA L40S data sheet"),
    Card("A100 80 GB", "81920Mi", 2039e9, 312e12, "NVIDIA A100 data sheet, SXM"),
    Card("H100", "81559Mi", 3350e9, 989e12, "NVIDIA H100 data sheet, SXM (1,979 with sparsity)"),
    Card("H200", "143771Mi", 4800e9, 989e12, "NVIDIA H200 data sheet, SXM (1,979 with sparsity)"),
)


# In the names of cards that share a number with one above and not its speed.
OTHERS: Final = frozenset(("PCIe", "PCIE", "NVL", "Laptop", "D", "Ti", "SUPER", "MIG"))


def card_named(device: str) -> Card | None:
    """The card that PyTorch reports by this name, such as NVIDIA H100 80GB HBM3; None if it is not in the table."""
    words = set(device.replace("-", " ").split())
    for card in CARDS:
        number, *size = card.name.removeprefix("RTX ").split(maxsplit=1)
        if number in words and not words & OTHERS and all(gigabytes.replace(" ", "") in words for gigabytes in size):
            return card
    return None
