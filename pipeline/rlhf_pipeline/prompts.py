"""The order in which prompts are rolled out: every prompt once an epoch, shuffled anew each time, repeatable."""

from pathlib import Path

import torch
from torch import Tensor

from rlhf_api.errors import UserError


class Prompts:
    """The prompts of a prompt-data artifact."""

    def __init__(self, folder: Path, part: str, pad: int, seed: int) -> None:
        """part: train or heldout. Raises UserError if there are none."""
        import pyarrow.parquet as pq

        table = pq.read_table(folder / f"{part}.parquet", columns=["prompt", "input_ids"])
        self.rows: list[list[int]] = table.column("input_ids").to_pylist()
        self.texts: list[str] = table.column("prompt").to_pylist()
        if not self.rows:
            raise UserError(
                f"data.prompts: no prompt is left in the {part} part; add rows or change data.prompts.heldOut"
            )
        self.pad, self.seed = pad, seed

    def batch(self, index: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Batch number `index` of `size` prompts: (ids, mask), both (size, longest), padded on the left.

        A function of (seed, index, size) alone, so a resumed run continues with the prompts it would have had.
        """
        picked = [self._at(position) for position in range(index * size, (index + 1) * size)]
        return self.padded([self.rows[row] for row in picked], device)

    def padded(self, rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Token ids and mask, (rows, longest), padded on the left."""
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[self.pad] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows], device=device)
        return ids, mask

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.rows))
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch = epoch
            self._order = torch.randperm(len(self.rows), generator=generator).tolist()
        row: int = self._order[offset]
        return row
