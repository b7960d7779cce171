"""Peak memory and time of the streaming merge against PEFT's merge_and_unload, on a synthetic Llama in bfloat16.

    python bench/merge_memory.py --gib 8 --folder /var/tmp

Each side runs in a process of its own, whose peak resident memory (ru_maxrss) is reported.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from rlhf_api.run import Lora, Merge
from rlhf_pipeline.tensor_files import ShardWriter, TensorPlan, index_of, plan_shards

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY, RANK = 4096, 11008, 32, 32000, 16
SHARD = 2 * 2**30
PIECE = 2**22  # elements made at once
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Make the model and the adapter, run both sides, print a line each and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8, help="size of the model")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room for it")
    parser.add_argument("--side", choices=["ours", "peft"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options.folder)))
        return
    need = int(options.gib * 2.2 * 2**30)
    if (free := shutil.disk_usage(options.folder).free) < need:
        sys.exit(f"{options.folder} has {free / 2**30:.0f} GiB free and {need / 2**30:.0f} are needed; use --folder")
    work = Path(tempfile.mkdtemp(dir=options.folder, prefix="merge-memory-"))
    try:
        size = make_model(work / "base", options.gib)
        make_adapter(work / "base", work / "adapter")
        found = {}
        for side in ("ours", "peft"):
            command = [sys.executable, __file__, "--side", side, "--folder", str(work)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            shutil.rmtree(work / "merged", ignore_errors=True)
            if done.returncode:
                print(f"{side}: ended with {done.returncode} (-9: killed for memory)")
                continue
            found[side] = json.loads(done.stdout.splitlines()[-1])
            peak, before = found[side]["peak_gib"], found[side]["before_gib"]
            print(f"{side:5} peak {peak:6.2f} GiB ({before:.2f} of it after imports)  {found[side]['seconds']:6.1f} s")
        print(f"model {size / 2**30:.2f} GiB, torch {torch.__version__}, {torch.get_num_threads()} threads")
        if len(found) == 2:
            print(f"memory peft / ours {found['peft']['peak_gib'] / found['ours']['peak_gib']:.1f}")
    finally:
        shutil.rmtree(work)


def measure(side: str, work: Path) -> dict[str, float]:
    """Merge once. Returns the peak resident memory, that before the merge, and the seconds of the merge alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from rlhf_pipeline.merge import write_merged
    from rlhf_pipeline.sources import LocalFiles

    target = work / "merged"
    target.mkdir()
    before = _peak_gib()
    began = time.monotonic()
    if side == "ours":
        base = LocalFiles(work / "base")
        write_merged(base, work / "adapter", target, Merge(), progress=lambda *_: None, ship=lambda _: None)
    else:
        model = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.bfloat16)
        merged = PeftModel.from_pretrained(model, work / "adapter").merge_and_unload()
        merged.save_pretrained(target, max_shard_size="2GB")
    return {"peak_gib": _peak_gib(), "before_gib": before, "seconds": time.monotonic() - began}


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def make_model(folder: Path, gib: float) -> int:
    """Write a random Llama of about that size, piece by piece. Returns its bytes."""
    from transformers import LlamaConfig

    layer = 4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN
    layers = max(1, round((gib * 2**29 - 2 * VOCABULARY * HIDDEN) / layer))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for index in range(layers):
        at = f"model.layers.{index}"
        for name in TARGETS:
            block = "self_attn" if name[0] in "qkvo" else "mlp"
            shapes[f"{at}.{block}.{name}.weight"] = _shape(name)
        shapes |= {f"{at}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    tensors = {name: TensorPlan(shape, torch.bfloat16) for name, shape in shapes.items()}
    shards = plan_shards(tensors, SHARD)
    for file, names in shards.items():
        with ShardWriter(folder / file, names, tensors) as writer:
            for name in writer.order:
                writer.write(name, _random(prod(shapes[name])))
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_bytes(index_of(shards, tensors))
    return sum(plan.bytes for plan in tensors.values())


def _shape(name: str) -> tuple[int, int]:
    rows = INTERMEDIATE if name in ("gate_proj", "up_proj") else HIDDEN
    return rows, INTERMEDIATE if name == "down_proj" else HIDDEN


def _random(count: int) -> Iterator[torch.Tensor]:
    piece = torch.randn(min(PIECE, count)).mul_(0.02).bfloat16()  # repeated: random enough for a merge
    for start in range(0, count, PIECE):
        yield piece[: count - start]


def make_adapter(base: Path, folder: Path) -> None:
    """Write a random LoRA adapter on every linear layer."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    lora = Lora(rank=RANK, alpha=2 * RANK)
    config: Any = json.loads((base / "config.json").read_text())
    weights = {}
    for index in range(config["num_hidden_layers"]):
        for name in TARGETS:
            block = "self_attn" if name[0] in "qkvo" else "mlp"
            rows, columns = _shape(name)
            at = f"base_model.model.model.layers.{index}.{block}.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(lora.rank, columns) * 0.01
            weights[f"{at}.lora_B.weight"] = torch.randn(rows, lora.rank) * 0.01
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=TARGETS, task_type="CAUSAL_LM").save_pretrained(
        folder
    )


if __name__ == "__main__":
    main()
