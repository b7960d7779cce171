"""Which rows are kept and which are held out: decided by hashes of the text, so the same on every machine."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from hashlib import sha256


@dataclass(frozen=True)
class Split:
    """Indexes of rows, each list in hashed order."""

    train: list[int]
    held_out: list[int]


def position(text: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the text alone; independent for each purpose."""
    digest = sha256(f"{purpose}\0{text}".encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # as many bits as a float holds: it is never 1


def in_range(texts: Sequence[str], rows: str | None) -> list[int]:
    """Indexes of the texts that fall in `rows` ("a%:b%"), in hashed order: the order of SHA-256.

    The range is one of hash values, so equal texts fall in the same range, and ranges that do not overlap share no
    text whatever else the tables are filtered by. A range holds its share of rows up to chance.
    """
    low, high = (0.0, 1.0) if rows is None else (float(part.rstrip("%")) / 100 for part in rows.split(":"))
    positions = [position(text, "rows") for text in texts]
    return sorted((i for i, at in enumerate(positions) if low <= at < high), key=lambda i: (positions[i], i))


def without_duplicates(keys: Sequence[Hashable], indexes: Sequence[int]) -> list[int]:
    """The indexes whose key has not come before."""
    seen: set[Hashable] = set()
    kept = []
    for index in indexes:
        if keys[index] not in seen:
            seen.add(keys[index])
            kept.append(index)
    return kept


def hold_out(texts: Sequence[str], indexes: Sequence[int], fraction: float) -> Split:
    """Hold out the rows whose text hashes below `fraction`, and at least one text if the fraction is not 0.

    Whether a text is held out does not depend on the other rows, so it is in every table made from the same texts.
    """
    positions = {index: position(texts[index], "held out") for index in indexes}
    held_out = [index for index in indexes if positions[index] < fraction]
    if not held_out and positions and fraction > 0:
        lowest = min(positions.values())
        held_out = [index for index in indexes if positions[index] == lowest]
    chosen = set(held_out)
    return Split([index for index in indexes if index not in chosen], held_out)
