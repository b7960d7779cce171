"""A few rows times a 4-bit weight in bitsandbytes' own layout, several times faster than dequantising it first.

For 4 to 64 rows bitsandbytes writes the weight out in 16 bits and multiplies that; here the packed bytes are read
once. The kernel and how it works: nf4_kernel.py. Which of its tiles is fastest differs by card and shape:
`measured` times some on the card at hand, and holds each against a plain product of the dequantised weight first.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

import torch
from torch import Tensor

from rlhf_pipeline.nf4_weight import Nf4Weight

Activation = Literal["none", "gelu", "gelu_tanh", "silu", "relu"]
MAX_ROWS: Final = 64
RANK_STEP: Final = 16  # ranks are padded to multiples of the tensor cores' depth
TOLERANCE: Final = 1e-2  # relative error against float32 arithmetic on the dequantised weight; bfloat16 gives 2e-3
LARGEST_PARTIAL: Final = 2 * 128 * MAX_ROWS  # floats that a thread block may leave of two unfinished tiles
MOST_BLOCKS: Final = 2  # thread blocks a multiprocessor
MOST_TILES: Final = 1 << 15


@dataclass(frozen=True)
class Tile:
    """How the work is cut: outputs and inputs of a unit, and how many threads and copies in flight work on it."""

    outputs: int
    inputs: int
    warps: int
    stages: int
    blocks: int  # thread blocks a multiprocessor
    table: bool  # weights from a table in shared memory, 32 KiB; otherwise by byte permutes


# By the number of rows, padded to a power of two: the fastest tiles of an H200, and some for smaller shared memories.
# Beside a table the ring has to be over 48 KiB: only then does Triton ask the driver for as much as both need.
CANDIDATES: Final[dict[int, tuple[Tile, ...]]] = {
    8: (Tile(128, 256, 4, 3, 2, True), Tile(64, 256, 4, 4, 2, True), Tile(128, 256, 4, 3, 1, True),
        Tile(64, 128, 4, 10, 1, True), Tile(64, 128, 4, 4, 2, False)),
    16: (Tile(128, 256, 4, 3, 2, True), Tile(128, 256, 4, 3, 1, True), Tile(64, 256, 4, 3, 2, True),
         Tile(64, 128, 4, 7, 1, True), Tile(64, 128, 4, 4, 2, False)),
    32: (Tile(128, 128, 4, 4, 2, True), Tile(128, 256, 4, 3, 1, True), Tile(64, 128, 4, 5, 1, True),
         Tile(64, 128, 4, 4, 2, False)),
    64: (Tile(128, 128, 8, 3, 1, True), Tile(128, 128, 8, 4, 1, False), Tile(64, 128, 4, 3, 1, False)),
}  # fmt: skip


@dataclass(frozen=True)
class LowRank:
    """An adapter's update of a weight, in bfloat16: down (rank, in), up (out, rank) with the scale in it."""

    down: Tensor
    up: Tensor


def nf4_gemm(
    x: Tensor,
    weight: Nf4Weight,
    tile: Tile,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
    activation: Activation = "none",
) -> Tensor:
    """act(x W^T + bias + low up^T): (rows, out) bfloat16.

    x: (rows, in) bfloat16, contiguous, at most 64 rows. low: (rows, rank), up: (out, rank), bfloat16, rank a multiple
    of 16. Calls on one device share a workspace: they must not overlap on two streams. Capturable in a CUDA graph.
    """
    from rlhf_pipeline.decode.nf4_kernel import nf4_gemm_kernel

    rows = x.shape[0]
    out, inner = weight.shape
    device = x.device
    padded = padded_rows(rows)
    y = torch.empty(rows, out, dtype=torch.bfloat16, device=device)
    work = _workspace(device)
    chained = dependent_launch(device)
    units = (out // tile.outputs) * (inner // tile.inputs)
    nf4_gemm_kernel[(min(work.multiprocessors * tile.blocks, units),)](
        x, weight.packed, weight.codes, weight.steps, weight.code_values, weight.offset, work.pairs,
        y if bias is None else bias, y if low is None else low, y if up is None else up, y, work.partial, work.arrived,
        rows,
        out, inner, tile.outputs, tile.inputs, padded, tile.warps, tile.stages, tile.table, bias is not None,
        0 if up is None else up.shape[1], activation, chained, _input_layout(padded, tile.warps),
        num_warps=tile.warps, **launch_options(tile, chained),
    )  # fmt: skip
    return y


def padded_rows(rows: int) -> int:
    """The power of two of rows, at least 8, that the kernel computes."""
    return max(8, 1 << (rows - 1).bit_length())


def dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may begin under the tail of the one before it: programmatic dependent launch, from sm_90 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def launch_options(tile: Tile, chained: bool) -> dict[str, Any]:
    """Registers that let as many thread blocks share a multiprocessor as the tile asks for."""
    registers = min(255, 65536 // (tile.blocks * tile.warps * 32) // 8 * 8)
    return {"maxnreg": registers, **({"launch_pdl": True} if chained else {})}


@dataclass(frozen=True)
class Choice:
    """What was measured for one shape and number of rows: seconds by tile, and of the layers' own product."""

    tiles: dict[Tile, float]
    own: float
    refused: list[str]  # tiles that this card or this Triton cannot run, or that are wrong there, and why

    @property
    def best(self) -> Tile | None:
        """The fastest tile; None where the layers' own product is faster than any."""
        tile = min(self.tiles, key=self.tiles.__getitem__, default=None)
        return tile if tile is not None and self.tiles[tile] < self.own else None


def measured(weights: Sequence[Nf4Weight], rows: int, own: Callable[[Tensor], object]) -> Choice:
    """Time every tile that is right on this card, over all of `weights`, which have one shape.

    own: the same products as the layers themselves compute them. Few weights may stay in the card's cache, where any
    tile is fast: give more than it holds if there are so many.
    """
    device, (out, inner) = weights[0].packed.device, weights[0].shape
    own_draws = torch.Generator(device).manual_seed(0)  # sampling must not depend on what was timed before
    x = torch.randn(rows, inner, dtype=torch.bfloat16, device=device, generator=own_draws)
    expected = dequantised_product(weights[0], x)
    found = Choice({}, _seconds(lambda: own(x)), [])
    for tile in CANDIDATES[padded_rows(rows)]:
        if out % tile.outputs or inner % tile.inputs:
            continue
        try:
            error = float((nf4_gemm(x, weights[0], tile).float() - expected).norm() / expected.norm())
            if not error < TOLERANCE:
                raise ArithmeticError(f"relative error {error:.1e}")
            found.tiles[tile] = _seconds(lambda tile=tile: [nf4_gemm(x, weight, tile) for weight in weights])  # type: ignore[misc]
        except Exception as error:  # noqa: BLE001 - whatever keeps a tile from running here, it is not to be chosen
            found.refused.append(f"{tile}: {type(error).__name__}: {str(error)[:200]}")
    return found


def _seconds(work: Callable[[], object]) -> float:
    """Seconds of a replay of `work` as a CUDA graph: the best of five."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    best = math.inf
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return best


def dequantised_product(weight: Nf4Weight, x: Tensor) -> Tensor:
    """x W^T by plain PyTorch in float32, in pieces: (rows, out)."""
    scales = weight.code_values[weight.codes.long()] * weight.steps.repeat_interleave(256)[: weight.codes.numel()]
    flat = weight.packed.view(-1)
    out, inner = weight.shape
    result = torch.empty(x.shape[0], out, device=x.device)
    levels = _levels(x.device)
    rows = max(1, (1 << 24) // inner)
    for start in range(0, out, rows):  # not the whole weight in 32 bits at once
        part = slice(start * inner, min(out, start + rows) * inner)
        bytes_ = flat[part.start // 2 : part.stop // 2].long()
        values = levels[torch.stack([bytes_ >> 4, bytes_ & 15], 1)].view(-1, 64)
        values = values * (scales + weight.offset)[part.start // 64 : part.stop // 64, None]
        result[:, start : start + rows] = x.float() @ values.view(-1, inner).T
    return result


@dataclass(frozen=True)
class _Workspace:
    pairs: Tensor  # (256,) int32: a packed byte as two bfloat16
    partial: Tensor
    arrived: Tensor
    multiprocessors: int


@cache
def _workspace(device: torch.device) -> _Workspace:
    from rlhf_pipeline.decode.nf4_kernel import LEVELS

    pairs = [LEVELS[byte >> 4] | LEVELS[byte & 15] << 16 for byte in range(256)]
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return _Workspace(
        torch.tensor([pair - (1 << 32) if pair >> 31 else pair for pair in pairs], dtype=torch.int32, device=device),
        torch.empty(multiprocessors * MOST_BLOCKS * LARGEST_PARTIAL, dtype=torch.float32, device=device),
        torch.zeros(MOST_TILES, dtype=torch.int32, device=device),
        multiprocessors,
    )


@cache
def _levels(device: torch.device) -> Tensor:
    from rlhf_pipeline.decode.nf4_kernel import NF4

    return torch.tensor(NF4, device=device)


@cache
def _input_layout(padded: int, warps: int) -> Any:
    """Which thread holds which of a block of inputs in the order of the tensor cores' fragments."""
    from triton.experimental.gluon import language as gl

    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32]] + [[8 << i, 0] for i in range((padded // 8).bit_length() - 1)],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[0, 0]] * (warps.bit_length() - 1),
        block_bases=[],
        shape=[padded, 64],
    )
