"""Tiny random models of every supported family, each with a real tokenizer, for tests on a CPU."""

from pathlib import Path
from typing import Literal, get_args

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

Family = Literal["llama", "gpt_neox", "gpt2", "opt", "qwen2", "qwen3", "gemma", "gemma2"]
FAMILIES: tuple[Family, ...] = get_args(Family)
PAD, EOS = 0, 1
VOCABULARY = 384  # 256 bytes, the special tokens and the merges
POSITIONS = 256

TEXTS = [
    "the film is a warm and funny story with a great cast",
    "a dull and lifeless movie that goes nowhere slowly",
    "one of the best pictures of the year, moving and true",
    "an awful script, bad acting and a boring plot",
    "this is a small gem of a movie: sharp, tender and alive",
    "it is hard to care about any of these flat characters",
]


def build_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer saved into `folder`: texts survive the round trip; PAD ≠ EOS; padding left."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=POSITIONS,
    )
    fast.save_pretrained(folder)
    return fast


def tiny_config(family: Family, layers: int = 3, hidden: int = 32) -> PreTrainedConfig:
    """The configuration of a model of `family` with `layers` layers of width `hidden` and four heads."""
    ids = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": EOS}
    gqa = {
        **ids,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
    }
    match family:
        case "llama":
            return LlamaConfig(**gqa)
        case "qwen2":
            return Qwen2Config(**gqa)
        case "qwen3":
            return Qwen3Config(**gqa, head_dim=hidden // 4)
        case "gemma":
            return GemmaConfig(**gqa, head_dim=hidden // 4)
        case "gemma2":
            return Gemma2Config(**gqa, head_dim=hidden // 4, query_pre_attn_scalar=hidden // 4, sliding_window=64)
        case "gpt_neox":
            return GPTNeoXConfig(
                **ids,
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=4,
                max_position_embeddings=POSITIONS,
            )
        case "gpt2":
            return GPT2Config(
                **ids,
                n_embd=hidden,
                n_layer=layers,
                n_head=4,
                n_positions=POSITIONS,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        case "opt":
            return OPTConfig(
                **ids,
                hidden_size=hidden,
                word_embed_proj_dim=hidden,
                ffn_dim=2 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=4,
                max_position_embeddings=POSITIONS,
                dropout=0.0,
            )


def build_tiny_model(
    folder: Path, family: Family = "llama", *, layers: int = 3, hidden: int = 32, seed: int = 0
) -> Path:
    """Save a random causal model of `family` in float32, with its tokenizer, into `folder`, which is returned.

    Weights are larger than at a usual initialisation, so that logits differ clearly from token to token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = tiny_config(family, layers, hidden)
        config.initializer_range = 0.15
        if family == "opt":
            config.init_std = 0.15
        model = AutoModelForCausalLM.from_config(config)
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    build_tokenizer(folder)
    return folder
