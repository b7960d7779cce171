"""Writes adapters as PEFT does, with the same bytes for the same weights on every machine."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def save_adapter(model: Any, config: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors (float32) into `folder`.

    model: the transformers model adapted. config: PEFT's LoraConfig. tensors: weights by the names that
    `peft.get_peft_model_state_dict` gives.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    path = folder / "adapter_config.json"
    document = json.loads(path.read_text())
    document["base_model_name_or_path"] = None  # a path of this machine means nothing to the next one
    document["inference_mode"] = True
    document["fan_in_fan_out"] = stores_transposed(model.config)
    for name, value in document.items():
        if isinstance(value, list):  # PEFT keeps sets, whose order differs from process to process
            document[name] = sorted(value)
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def stores_transposed(config: Any) -> bool:
    """Whether the unquantised model has Conv1D layers (GPT-2), whose weights are (in, out): PEFT's fan_in_fan_out.

    A quantised model does not show it: its layers are linear ones.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return any(type(module).__name__ == "Conv1D" for module in model.modules())
