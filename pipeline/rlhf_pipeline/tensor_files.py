"""Safetensors files read and written tensor by tensor, so that memory does not grow with the model.

Format: 8 bytes of header length, a JSON header of {name: dtype, shape, data_offsets}, then the tensors' bytes.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from rlhf_api.errors import UserError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
BLOCK = 16 * 2**20  # bytes held of a tensor that is only copied


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: bytes [start, end) of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file of this machine, in the order of their bytes. Raises as parse_header does."""
    with file.open("rb") as stream:

        def read(start: int, length: int) -> bytes:
            stream.seek(start)
            return stream.read(length)

        return parse_header(file, file.stat().st_size, read)


def parse_header(file: Path, size: int, read: Callable[[int, int], bytes]) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file of `size` bytes, in the order of their bytes; `read` takes start and length.

    Raises UserError if it is no whole safetensors file, or holds types other than plain floats and integers.
    """
    length = int.from_bytes(read(0, min(8, size)), "little")
    if size < 8 or length > size - 8:
        raise UserError(f"{file.name} is truncated or no safetensors file ({size} bytes); copy it again")
    try:
        header = json.loads(read(8, length))
    except ValueError as error:
        raise UserError(f"{file.name} is no safetensors file: its header is not JSON; copy it again") from error
    header.pop("__metadata__", None)
    entries = {}
    for name, about in header.items():
        if about["dtype"] not in DTYPES:
            raise UserError(
                f"{file.name}: {name} has type {about['dtype']}, as of a quantised model; use 16- or 32-bit weights"
            )
        dtype, shape = DTYPES[about["dtype"]], tuple(about["shape"])
        start, end = (8 + length + offset for offset in about["data_offsets"])
        if end - start != prod(shape) * dtype.itemsize or end > size:
            raise UserError(f"{file.name} is truncated: {name} ends at byte {end} of {size}; copy it again")
        entries[name] = TensorEntry(file, dtype, shape, start, end)
    return dict(sorted(entries.items(), key=lambda item: item[1].start))


def read_tensor(entry: TensorEntry) -> Tensor:
    """One tensor. Read, not mapped: the pages of a map would count as the process's memory."""
    return _read(entry, entry.start, entry.end).reshape(entry.shape)


def read_blocks(entry: TensorEntry) -> Iterator[Tensor]:
    """One tensor as flat pieces of at most 16 MiB."""
    for start in range(entry.start, entry.end, BLOCK):
        yield _read(entry, start, min(start + BLOCK, entry.end))


def _read(entry: TensorEntry, start: int, end: int) -> Tensor:
    if start == end:
        return torch.empty(0, dtype=entry.dtype)
    buffer = bytearray(end - start)
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(start)
        view = memoryview(buffer)
        while view:
            if not (count := stream.readinto(view)):
                raise UserError(f"{entry.file.name} was truncated while it was read")
            view = view[count:]
    return torch.frombuffer(buffer, dtype=entry.dtype)


@dataclass(frozen=True)
class TensorPlan:
    """What will be written: shape and type."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def plan_shards(tensors: Mapping[str, TensorPlan], limit: int) -> dict[str, list[str]]:
    """File name to tensor names, in order, each file at most `limit` bytes of tensors unless one tensor is larger."""
    shards: list[list[str]] = []
    filled = 0
    for name, plan in tensors.items():
        if not shards or filled + plan.bytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += plan.bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def index_of(shards: Mapping[str, Sequence[str]], tensors: Mapping[str, TensorPlan]) -> bytes:
    """The content of model.safetensors.index.json."""
    document = {
        "metadata": {"total_size": sum(plan.bytes for plan in tensors.values())},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    return json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"


class ShardWriter:
    """Writes one safetensors file: the header first, from the plan alone, then each tensor in pieces, in order."""

    def __init__(self, path: Path, names: Sequence[str], tensors: Mapping[str, TensorPlan]) -> None:
        # Wide types first: every tensor is then aligned to its own width.
        ordered = sorted(names, key=lambda name: -tensors[name].dtype.itemsize)
        self.path, self.order = path, ordered
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._ends: dict[str, int] = {}
        offset = 0
        for name in ordered:
            plan = tensors[name]
            end = offset + plan.bytes
            header[name] = {"dtype": CODES[plan.dtype], "shape": list(plan.shape), "data_offsets": [offset, end]}
            self._ends[name] = offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._tensors = tensors
        self._stream = path.open("wb")
        self._stream.write(len(text).to_bytes(8, "little") + text)
        self._data = self._stream.tell()

    def write(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Append one tensor, given as pieces that follow each other. Raises ValueError if it is not the next one."""
        plan = self._tensors[name]
        if self._stream.tell() - self._data != self._ends[name] - plan.bytes:
            raise ValueError(f"{self.path.name}: {name} is not the next tensor")
        for piece in pieces:
            raw = piece.detach().to(plan.dtype).contiguous().view(-1).view(torch.uint8)
            self._stream.write(memoryview(raw.numpy()))
        if self._stream.tell() - self._data != self._ends[name]:
            raise ValueError(f"{self.path.name}: {name} has another size than planned")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
