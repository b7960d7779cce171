"""Token ids of many texts without importing transformers, which would take longer than the import of most tables."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
BATCH = 1000


class Encoder:
    """The tokenizer of an imported model, as its tokenizer.json has it; equal to AutoTokenizer's ids (by test)."""

    def __init__(self, folder: Path) -> None:
        facts = json.loads((folder / "report.json").read_text())["tokenizer"]
        self.eos: int = facts["eos_token_id"]
        self._fast: Any = None
        self._slow: Any = None
        if (folder / "tokenizer.json").exists():
            from tokenizers import Tokenizer

            self._fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self._fast.no_truncation()
            self._fast.no_padding()
        else:  # a tokenizer written in Python alone
            from rlhf_pipeline.models import load_tokenizer

            self._slow = load_tokenizer(folder)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text with the special tokens that the model puts around a text."""
        rows: list[list[int]] = []
        for start in range(0, len(texts), BATCH):
            batch = list(texts[start : start + BATCH])
            if self._fast:
                rows += [encoding.ids for encoding in self._fast.encode_batch_fast(batch)]
            else:
                rows += self._slow(batch, verbose=False)["input_ids"]
        return rows

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row, without special tokens."""
        if self._fast:
            return list(self._fast.decode_batch([list(row) for row in rows], skip_special_tokens=True))
        return list(self._slow.batch_decode(rows, skip_special_tokens=True))
