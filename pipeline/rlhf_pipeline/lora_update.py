"""What a LoRA adapter on disk does to each weight of the base: the arithmetic of a merge, one weight at a time."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_api.errors import UserError
from rlhf_pipeline.tensor_files import TensorEntry, read_header, read_tensor

KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.weight)?")
# What PEFT can put into an adapter beyond A, B and DoRA's magnitudes, and the value that means it did not.
PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "modules_to_save": None,
    "lora_bias": False,
    "alpha_pattern": {},
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_qalora": False,
}


@dataclass(frozen=True)
class LoraUpdate:
    """The update of one weight: scale · B · A, and with DoRA the lengths of the weight's rows."""

    a: TensorEntry  # (rank, in)
    b: TensorEntry  # (out, rank)
    magnitude: TensorEntry | None  # (out,)
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight it belongs to."""
        return self.b.shape[0], self.a.shape[1]

    def merge(self, weight: Tensor, fan_in_fan_out: bool) -> Tensor:
        """The merged weight in float32, of the shape of `weight`: (out, in), or (in, out) if fan_in_fan_out.

        The same operations in the same order as PEFT's merge of a float32 adapter, hence the same bits.
        DoRA: https://arxiv.org/abs/2402.09353, equation 5.
        """
        delta = _float32(self.b) @ _float32(self.a)
        delta = (delta.T if fan_in_fan_out else delta).mul_(self.scale)
        if self.magnitude is None:
            return delta.add_(weight)
        merged = weight.float() + delta
        rows = merged.T if fan_in_fan_out else merged
        factor = (_float32(self.magnitude) / torch.linalg.norm(rows, dim=1)).view(-1, 1)
        return (factor.T if fan_in_fan_out else factor) * merged


def read_adapter(folder: Path) -> dict[str, LoraUpdate]:
    """The updates of a PEFT LoRA adapter by the name of the module they belong to.

    Raises UserError if the adapter holds anything that is no LoRA update of a weight.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    for name, plain in PLAIN.items():
        if (value := config.get(name, plain)) not in (plain, None, {}, []):
            raise UserError(f"adapter: {name} {value!r} cannot be merged into the weights; train it with {plain!r}")
    parts: dict[str, dict[str, TensorEntry]] = {}
    for key, entry in read_header(folder / "adapter_model.safetensors").items():
        match = KEY.fullmatch(key)
        if match is None:
            raise UserError(f"adapter: {key} is no LoRA matrix of a linear layer and cannot be merged")
        parts.setdefault(match["module"], {})[match["part"]] = entry
    updates = {}
    for module, found in sorted(parts.items()):
        if missing := {"lora_A", "lora_B"} - set(found):
            raise UserError(f"adapter: {module} has no {missing.pop()}; the file is incomplete")
        a, b = found["lora_A"], found["lora_B"]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise UserError(f"adapter: {module} has matrices of {a.shape} and {b.shape}; only linear layers are merged")
        rank = a.shape[0]
        scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        updates[module] = LoraUpdate(a, b, found.get("lora_magnitude_vector"), scale)
    return updates


def _float32(entry: TensorEntry) -> Tensor:
    # A copy in torch's own memory: the BLAS may sum in another order where memory is aligned otherwise.
    return read_tensor(entry).to(torch.float32, copy=True)
