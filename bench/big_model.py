"""Models of any size with random weights, made on the GPU as they are quantised, so that no 16-bit copy ever exists.

For speed and memory only: what matters there is shapes. The process is kept within the memory of the card asked for.
"""

import tempfile
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from rlhf_api.run import Lora
from rlhf_pipeline.passes import fuse
from rlhf_pipeline.roles import Roles

GIB = 2**30
# GPT-NeoX-20B asks for gelu_fast, which transformers computes in seven passes over the widest tensor. `load_base` puts
# one pass in their place; for a fair comparison a peer gets one as well.
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt-neox-20b": {
        "model_type": "gpt_neox", "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
        "intermediate_size": 24576, "vocab_size": 50432, "max_position_embeddings": 2048, "hidden_act": "gelu",
        "tie_word_embeddings": False,
    },
    "pythia-6.9b": {
        "model_type": "gpt_neox", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "intermediate_size": 16384, "vocab_size": 50432, "max_position_embeddings": 2048, "hidden_act": "gelu",
        "tie_word_embeddings": False,
    },
    "pythia-2.8b": {
        "model_type": "gpt_neox", "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32,
        "intermediate_size": 10240, "vocab_size": 50304, "max_position_embeddings": 2048, "hidden_act": "gelu",
        "tie_word_embeddings": False,
    },
    "pythia-160m": {
        "model_type": "gpt_neox", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "vocab_size": 50432, "max_position_embeddings": 2048, "hidden_act": "gelu",
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936,
        "max_position_embeddings": 8192, "tie_word_embeddings": False,
    },
    "qwen3-1.7b": {
        "model_type": "qwen3", "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 6144, "vocab_size": 151936,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    "opt-6.7b": {
        "model_type": "opt", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "ffn_dim": 16384,
        "vocab_size": 50272, "max_position_embeddings": 2048, "word_embed_proj_dim": 4096,
    },
}  # fmt: skip


def keep_within(gibibytes: float) -> None:
    """Let PyTorch take no more than this of the card; a 24 GB card leaves 23 GiB beside CUDA's own context."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gibibytes * GIB / total))


def big_model(name: str, quantization: str = "nf4", layers: int | None = None) -> Any:
    """The model `name` of CONFIGS with random weights, in nf4, int8 or none (bfloat16), frozen, on the GPU."""
    settings = dict(CONFIGS[name])
    if layers:
        settings["num_hidden_layers"] = layers
    config = AutoConfig.for_model(**settings, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if quantization != "none":
        asked = (
            BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
            if quantization == "nf4"
            else BitsAndBytesConfig(load_in_8bit=True)
        )  # fmt: skip
        outside = ["embed_out", "lm_head"]
        model = replace_with_bnb_linear(model, modules_to_not_convert=outside, quantization_config=asked) or model
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = quantization == "nf4", quantization == "int8"
        model.is_quantized, model.config.quantization_config = True, asked
    torch.manual_seed(0)
    for module in model.modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[leaf] = _made(module, leaf, parameter)
        for leaf, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta and "inv_freq" not in leaf:
                module._buffers[leaf] = None
    for parent in list(model.modules()):
        for leaf, module in list(parent.named_children()):
            if type(module).__name__.endswith("RotaryEmbedding"):
                setattr(parent, leaf, type(module)(config=config).to("cuda"))
    model.tie_weights()
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


def big_classifier(name: str, quantization: str = "nf4") -> Any:
    """The same body with one output instead of a vocabulary, as a sequence classifier."""
    body = big_model(name, quantization)
    config = body.config
    config.num_labels = 1
    asked = config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    if asked is not None:
        config.quantization_config = asked
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = body.is_loaded_in_4bit, body.is_loaded_in_8bit
        model.is_quantized = True
    setattr(model, model.base_model_prefix, body.base_model)
    model.score = nn.Linear(config.hidden_size, 1, bias=False, device=body.device, dtype=torch.bfloat16)
    return model.requires_grad_(False).eval()


def plain_tokenizer() -> Any:
    """A tokenizer that only has to know its special tokens."""
    words = {"<eos>": 0, "<pad>": 1, "<unk>": 2}
    made = Tokenizer(WordLevel(words, "<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")


def four_roles(model: Any, layers: str, kept_layers: int) -> Roles:
    """Policy, critic and a random reward as adapters of rank 16 on `model`, checkpointed but for `kept_layers`."""
    fuse(model)  # as `load_base` does
    lora = Lora(rank=16, alpha=32, layers=layers)  # type: ignore[arg-type]
    roles = Roles(model, lora, checkpointing=True, kept_layers=kept_layers)
    with tempfile.TemporaryDirectory() as name:
        roles.save_adapter("critic", Path(name) / "adapter")
        save_file({"weight": torch.randn(1, roles.width) * 0.02}, Path(name) / "head.safetensors")
        roles.add_reward(Path(name))
    return roles


def _made(module: nn.Module, leaf: str, parameter: nn.Parameter) -> nn.Parameter:
    if leaf == "weight" and isinstance(module, bnb.nn.Linear4bit):
        weight = torch.randn(module.out_features, module.in_features, device="cuda", dtype=torch.bfloat16) * 0.02
        made = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=module)
        return made.to("cuda")
    if leaf == "weight" and isinstance(module, bnb.nn.Linear8bitLt):
        weight = torch.randn(module.out_features, module.in_features, device="cuda", dtype=torch.float16) * 0.02
        return bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to("cuda")
    norm = "Norm" in type(module).__name__
    if leaf == "bias":
        value = torch.zeros(parameter.shape, device="cuda", dtype=torch.bfloat16)
    elif norm:
        value = torch.ones(parameter.shape, device="cuda", dtype=torch.bfloat16)
    else:
        value = torch.randn(parameter.shape, device="cuda", dtype=torch.bfloat16) * 0.02
    return nn.Parameter(value, requires_grad=False)
