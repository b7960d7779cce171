"""The processes that train one stage together, one for each GPU: which of them this is, and what they tell one another.

Alone, a process gets back what it gives. Every method that takes the others' part must be called by all of them, in
the same order. torch is imported where it is used: a stage without ranks may do without it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

# A rank that died is seen by the process that started it (rank_processes.py), which then ends the others. This is for
# what nobody sees, and longer than any rank may wait for another's checkpoint or for a slow reward function.
PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Ranks:
    """One of `size` processes; number `rank`."""

    rank: int = 0
    size: int = 1

    def join(self, gpus: bool) -> None:
        """Meet the others, before anything else here. Needs MASTER_ADDR and MASTER_PORT in the environment."""
        import torch.distributed as dist

        # Flags and figures go from host to host: they need not wait for what a GPU still has to do.
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, rank=self.rank, world_size=self.size, timeout=PATIENCE)

    @property
    def first(self) -> bool:
        """Whether this is the rank that logs, saves and commits."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """This rank's part of `rows` rows: equal shares in the order of the ranks. Raises ValueError for others."""
        if rows % self.size:
            raise ValueError(f"{rows} rows cannot be shared by {self.size} ranks")
        each = rows // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def gather(self, rows: "Tensor") -> "Tensor":
        """Every rank's rows, in the order of the ranks. Their shapes must be equal."""
        if self.size == 1:
            return rows
        import torch
        import torch.distributed as dist

        sent = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(parts, sent.contiguous())
        return torch.cat(parts).to(rows.dtype)

    def add_gradients(self, parameters: Iterable["nn.Parameter"]) -> None:
        """Replace each gradient by its sum over the ranks."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def add(self, figures: Sequence[float]) -> list[float]:
        """The sum of each figure over the ranks."""
        return self._reduced(figures, "SUM")

    def most(self, figure: float) -> float:
        """The largest of the ranks' figures."""
        return self._reduced([figure], "MAX")[0]

    def least(self, figure: float) -> float:
        """The smallest of the ranks' figures."""
        return self._reduced([figure], "MIN")[0]

    def any(self, flag: bool) -> bool:
        """Whether it is true of some rank."""
        return self.most(float(flag)) > 0

    def wait(self) -> None:
        """Until all ranks have come here."""
        self.any(False)

    def from_first(self, thing: Any) -> Any:
        """What the first rank gave."""
        if self.size == 1:
            return thing
        import torch.distributed as dist

        things = [thing]
        dist.broadcast_object_list(things, src=0)
        return things[0]

    def copy_first(self, parameters: Iterable["nn.Parameter"]) -> None:
        """Make parameters those of the first rank, bit by bit."""
        if self.size == 1:
            return
        import torch.distributed as dist

        for parameter in parameters:
            dist.broadcast(parameter.data, src=0)

    def _reduced(self, figures: Sequence[float], how: str) -> list[float]:
        if self.size == 1:
            return list(figures)
        import torch
        import torch.distributed as dist

        numbers = torch.tensor(figures, dtype=torch.float64)
        dist.all_reduce(numbers, getattr(dist.ReduceOp, how))
        return [float(number) for number in numbers]


ALONE = Ranks()
