"""Quantities of bytes."""

import pytest

from rlhf_api.quantity import bytes_of


@pytest.mark.parametrize(
    ("quantity", "size"),
    [
        ("24Gi", 24 * 2**30),
        ("24G", 24 * 10**9),
        ("1.5Ki", 1536),
        ("20k", 20_000),
        ("0.5Mi", 2**19),
        ("2Ti", 2**41),
        ("7", 7),
    ],
)
def test_quantities_are_bytes(quantity: str, size: int) -> None:
    assert bytes_of(quantity) == size


@pytest.mark.parametrize("quantity", ["", "Gi", "24GB", "24 Gi", "-1Gi", "1e3", "24gi", "٢Gi"])
def test_what_is_no_quantity_is_named(quantity: str) -> None:
    with pytest.raises(ValueError, match="is no quantity; write a number and a unit such as 24Gi"):
        bytes_of(quantity)
