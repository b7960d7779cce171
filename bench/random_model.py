"""Writes a model folder with random weights, shard by shard: for speed and memory, where weights cannot be had.

python bench/random_model.py --size 2.8b --tokenizer FOLDER OUT
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig

# GPT-NeoX's published shapes: hidden size, layers, heads.
SHAPES = {"160m": (768, 12, 12), "1.4b": (2048, 24, 16), "2.8b": (2560, 32, 32), "6.9b": (4096, 32, 32)}
SHARD_BYTES = 2 * 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SHAPES, default="2.8b")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder whose tokenizer files are copied")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    write(arguments.size, arguments.tokenizer, arguments.out)


def write(size: str, tokenizer: Path, out: Path) -> None:
    """Write config, tokenizer and bfloat16 weights (normal, standard deviation 0.02; norms 1; biases 0)."""
    out.mkdir(parents=True, exist_ok=True)
    hidden, layers, heads = SHAPES[size]
    config = GPTNeoXConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        vocab_size=50432,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    where: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    number = held = total = 0

    def flush() -> None:
        nonlocal number, held
        number += 1
        name = f"model-{number:05d}.safetensors"
        save_file(shard, out / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, name))
        shard.clear()
        held = 0

    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            tensor = torch.zeros(parameter.shape, dtype=torch.bfloat16)
        elif parameter.dim() == 1:
            tensor = torch.ones(parameter.shape, dtype=torch.bfloat16)
        else:
            tensor = (torch.randn(parameter.shape, device=device) * 0.02).to(torch.bfloat16).cpu()
        shard[name] = tensor
        held += tensor.nbytes
        total += tensor.nbytes
        if held >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": where})
    )


if __name__ == "__main__":
    main()
