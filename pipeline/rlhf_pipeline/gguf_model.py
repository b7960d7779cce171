"""Reads a GGUF file as a Hugging Face model in bfloat16, through transformers, which holds all of it in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
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
        with _read_once():
            model, loaded = AutoModelForCausalLM.from_pretrained(
                **place,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(**place)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UserError(
            f"model.source: {file.name} is no GGUF file that transformers reads ({error}); "
            "use the model's safetensors instead"
        ) from error
    if missing := sorted(loaded["missing_keys"]):  # transformers would fill them with random numbers
        raise UserError(f"model.source: {file.name} lacks {missing[0]} and {len(missing) - 1} more; download it again")
    model.save_pretrained(folder, max_shard_size="2GB")
    return tokenizer


@contextmanager
def _read_once() -> Iterator[None]:
    """Keep what transformers asks of the file again and again: its metadata, seconds each time, and its names."""
    import gguf

    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(reader), cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names
