"""Checks of an imported model and what is fixed on the way in: a PAD token that differs from EOS."""

import json
from pathlib import Path
from typing import Any

from rlhf_api.errors import UserError

SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "tie_word_embeddings",
)


def save_tokenizer(tokenizer: Any, pad_token: str | None, vocabulary: int, folder: Path) -> dict[str, Any]:
    """Save `tokenizer` with PAD ≠ EOS, padding on the left. Returns its facts for the report.

    vocabulary: rows of the model's embedding, which is never resized. Raises UserError if no token can be PAD.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "model.source: the tokenizer has no EOS token, so no response could end; add it to the tokenizer"
        )
    pad = _pad_token(tokenizer, pad_token)
    tokenizer.pad_token = pad
    if tokenizer.pad_token_id >= vocabulary:
        raise UserError(
            f"model.padToken: {pad!r} has id {tokenizer.pad_token_id}, beyond the model's {vocabulary} embeddings; "
            "name another token of the vocabulary"
        )
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    return {
        "vocabulary": len(tokenizer),
        "eos_token": tokenizer.eos_token,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token": tokenizer.bos_token,
        "pad_token": pad,
        "pad_token_id": tokenizer.pad_token_id,
        "chat_template": bool(tokenizer.chat_template),
    }


def _pad_token(tokenizer: Any, wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in tokenizer.get_vocab():
            raise UserError(f"model.padToken: {wanted!r} is not in the tokenizer's vocabulary; {_choices(tokenizer)}")
        if wanted == tokenizer.eos_token:
            raise UserError(f"model.padToken: {wanted!r} is EOS, so a response could not end; {_choices(tokenizer)}")
        return wanted
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        own: str = tokenizer.pad_token
        return own
    if free := _free_tokens(tokenizer):
        return free[0]
    raise UserError(
        f"model.padToken: the tokenizer's PAD is {tokenizer.pad_token!r}, its EOS {tokenizer.eos_token!r}, and it has "
        "no other special token; name a token of its vocabulary that your texts do not use"
    )


def _free_tokens(tokenizer: Any) -> list[str]:
    """Special tokens that could be PAD, best first: named so, then reserved, then others, the unknown token last."""
    template = str(tokenizer.chat_template or "")
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    taken = {tokenizer.eos_token, tokenizer.bos_token}

    def rank(token: str) -> tuple[int, int]:
        name = token.lower()
        if "pad" in name:
            return 0, added[token]
        if "reserved" in name or "unused" in name:
            return 1, added[token]
        if token == tokenizer.unk_token:
            return 4, added[token]
        return (3 if token in template else 2), added[token]

    return sorted((token for token in added if token not in taken), key=rank)


def _choices(tokenizer: Any) -> str:
    free = _free_tokens(tokenizer)
    return f"special tokens it has: {', '.join(free[:8])}" if free else "it has no special token besides EOS and BOS"


def set_pad_id(folder: Path, pad: int) -> None:
    """Write the PAD id into config.json and generation_config.json, where models read it."""
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        if not path.exists():
            continue
        document = json.loads(path.read_text())
        for part in (document, document.get("text_config")):
            if isinstance(part, dict):
                part["pad_token_id"] = pad
        path.write_text(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def vocabulary_of(folder: Path) -> int:
    """Rows of the embedding, by config.json. Raises UserError if the config does not say."""
    config = json.loads((folder / "config.json").read_text())
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not size:
        raise UserError("model.source: config.json has no vocab_size; it is not a causal language model's")
    return int(size)


def model_facts(folder: Path) -> dict[str, Any]:
    """The model's shape, for the report and the memory budget, as transformers reads config.json.

    Raises UserError if it is quantised already, or if transformers does not know the architecture.
    """
    from transformers import AutoConfig

    if method := json.loads((folder / "config.json").read_text()).get("quantization_config"):
        name = method.get("quant_method", "some method")
        raise UserError(f"model.source: the model is already quantised with {name}; use its 16-bit weights")
    try:
        config = AutoConfig.from_pretrained(folder)
    except ValueError as error:
        raise UserError(f"model.source: transformers cannot read its config.json: {error}") from error
    text = config.get_text_config()
    shape = {name: value for name in SHAPE if (value := getattr(text, name, None)) is not None}
    return {"architecture": (config.architectures or ["unknown"])[0], "model_type": text.model_type, **shape}
