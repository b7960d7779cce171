"""Kubernetes quantities of bytes, such as 24Gi."""

import re

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)(Ki|Mi|Gi|Ti|k|M|G|T)?")


def bytes_of(quantity: str) -> int:
    """The number of bytes that a quantity stands for, rounded down. Raises ValueError if it is none."""
    match = _QUANTITY.fullmatch(quantity)
    if match is None:
        raise ValueError(f"{quantity!r} is no quantity; write a number and a unit such as 24Gi")
    return int(float(match[1]) * _UNITS[match[2] or ""])
