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


def card_named(name: str) -> Card | None:
    """The card in a device's name as PyTorch reports it, such as NVIDIA H100 80GB HBM3; None if it is not known here.

    Cards of one name and other speeds, such as those for PCIe slots, are not told apart.
    """
    words = name.replace("-", " ").split()
    for card in CARDS:
        model, *size = card.name.removeprefix("RTX ").split(maxsplit=1)
        if model in words and (not size or size[0].replace(" ", "") in words):
            return card
    return None
