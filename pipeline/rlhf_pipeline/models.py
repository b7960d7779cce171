"""Loads the one base model, quantised as the run asks, and says where its adapters go."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_api.errors import UserError
from rlhf_api.quantity import bytes_of
from rlhf_api.run import GPU, Lora, Quantization
from rlhf_pipeline.passes import fuse
from rlhf_pipeline.stack import stack_of

CUDA_CONTEXT_BYTES = 2**30  # what the driver and CUDA take of a card before PyTorch gets any


def device_of(gpu: GPU, rank: int = 0) -> torch.device:
    """The device a rank of a stage runs on: the CPU if the run asks for no GPU. Raises UserError if there are too few.

    On a card larger than gpu.memory the process keeps within gpu.memory: what fits here fits on the card asked for.
    """
    if gpu.count == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"gpu.count: {gpu.count} asks for a GPU and this machine has none; use 0 to run on the CPU")
    if (there := torch.cuda.device_count()) < gpu.count:
        raise UserError(f"gpu.count: {gpu.count} asks for more GPUs than this machine's {there}; use {there}")
    if rank:
        torch.cuda.set_device(rank)
    device = torch.device("cuda", torch.cuda.current_device())
    total = torch.cuda.get_device_properties(device).total_memory
    share = (bytes_of(gpu.memory) - CUDA_CONTEXT_BYTES) / total
    if 0 < share < 1:
        torch.cuda.set_per_process_memory_fraction(share, device)
    return device


def memory_limit(device: torch.device) -> float:
    """Bytes that PyTorch may take of a CUDA device, by `device_of` or by the card."""
    total = torch.cuda.get_device_properties(device).total_memory
    return float(torch.cuda.get_per_process_memory_fraction(device) * total)


def compute_dtype(quantization: Quantization, device: torch.device) -> torch.dtype:
    """The type of activations. auto: bfloat16 on a GPU; float32 on a CPU, where it is faster and repeats exactly."""
    if quantization.compute_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, quantization.compute_dtype)
    return dtype


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of an imported model: pads on the left. Raises UserError if PAD is missing or equals EOS."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"model: the tokenizer in {folder} has PAD {tokenizer.pad_token!r} and EOS {tokenizer.eos_token!r}; "
            "they must differ, or a response could not end: set model.padToken"
        )
    return tokenizer


def load_base(folder: Path, quantization: Quantization, device: torch.device, classifier: bool = False) -> Any:
    """The base model on `device`, frozen, in evaluation mode, without a cache in training passes.

    classifier: load it as a sequence classifier with one output, for TRL's reward trainer.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    dtype = compute_dtype(quantization, device)
    arguments: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    if quantization.type != "none":
        arguments["quantization_config"] = _bitsandbytes(quantization, dtype)
    if classifier:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, **arguments)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    model.config.use_cache = False
    _fuse_gelu(model)
    if quantization.type == "nf4":
        _keep_packing(model)
    model.requires_grad_(False).eval()
    fuse(model)
    return model


def _fuse_gelu(model: nn.Module) -> None:
    """Compute the tanh form of GELU in one pass. transformers' modules for gelu_new and gelu_fast, which GPT-2 and
    GPT-NeoX-20B ask for, take seven over the widest tensor of a layer and keep five for the backward pass.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ in ("NewGELUActivation", "FastGELUActivation"):
                setattr(module, name, nn.GELU(approximate="tanh"))


def _keep_packing(model: nn.Module) -> None:
    """On a CPU with AVX512-BF16 bitsandbytes packs weights anew for the first pass that needs no gradient, their scales
    as bfloat16: a rollout would compute with other weights than training, and widths below a block of 64 would fail.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _bitsandbytes(quantization: Quantization, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantization.type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def vocabulary_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits of final hidden states, as the model's own forward computes them: (..., vocabulary)."""
    config = model.config.get_text_config()
    logits: Tensor = model.get_output_embeddings()(hidden)
    scale = getattr(config, "logit_scale", None)
    if scale is not None:
        logits = logits * scale
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def adapted_layers(lora: Lora, depth: int) -> list[int]:
    """Indexes of the layers that policy, critic and reward adapt, of a model `depth` layers deep."""
    if lora.layers == "all":
        return list(range(depth))
    top = int(lora.layers.removeprefix("top:"))
    if top > depth:
        raise UserError(f"lora.layers: {lora.layers} asks for more layers than the model's {depth}; use all")
    return list(range(depth - top, depth))


def target_modules(lora: Lora, model: nn.Module) -> list[str]:
    """Names of the linear layers that adapters sit on, relative to a decoder layer (`self_attn.q_proj`)."""
    layer = stack_of(model).layers[0]
    linear = [name for name, module in layer.named_modules() if _is_linear(module) and ".lora_" not in name]
    linear = [name.removesuffix(".base_layer") for name in linear]
    if isinstance(lora.target_modules, list):
        missing = [want for want in lora.target_modules if not any(_matches(name, want) for name in linear)]
        if missing:
            raise UserError(f"lora.targetModules: {missing[0]!r} is no linear layer of the model; it has {linear}")
        return [name for name in linear if any(_matches(name, want) for want in lora.target_modules)]
    if lora.target_modules == "all-linear":
        return linear
    attention = [name for name in linear if any("attn" in part or "attention" in part for part in name.split(".")[:-1])]
    if not attention:
        raise UserError(f"lora.targetModules: attention finds none in the model; name them, from {linear}")
    return attention


def lora_config(lora: Lora, model: nn.Module, *, top: bool, dropout: bool = False, task: str = "CAUSAL_LM") -> Any:
    """PEFT's config for an adapter on `model`.

    top: only on the layers that lora.layers names (policy, critic, reward); otherwise on all of them (sft).
    """
    from peft import LoraConfig

    stack = stack_of(model)
    layers = adapted_layers(lora, len(stack.layers))
    some = top and len(layers) < len(stack.layers)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout if dropout else 0.0,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora and not top,
        target_modules=target_modules(lora, model),
        layers_to_transform=layers if some else None,
        layers_pattern=stack.pattern if some else None,
        fan_in_fan_out=any(_is_conv1d(module) for module in stack.layers[0].modules()),
        task_type=task,
    )


def _matches(name: str, want: str) -> bool:
    return name == want or name.endswith(f".{want}")


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)
