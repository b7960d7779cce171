"""Reads a GGUF file as a Hugging Face model in bfloat16, through transformers, which holds all of it in memory."""

from pathlib import Path
from typing import Any

from rlhf_api.errors import UserError


def convert_gguf(file: Path, folder: Path) -> Any:
    """Write configs and bfloat16 safetensors of `file` into `folder`; returns its tokenizer.

    Raises UserError if transformers does not know the architecture or the quantisation.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **place, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UserError(
            f"model.source: {file.name} is no GGUF file that transformers reads ({error}); "
            "use the model's safetensors instead"
        ) from error
    model.save_pretrained(folder, max_shard_size="2GB")
    return tokenizer
