"""Canonical JSON, and digests of it: the same document gives the same bytes on every machine."""

import hashlib
import json
from typing import Any


def canonical_json(document: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces. Raises ValueError for NaN and infinities, which JSON cannot hold."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_of(document: Any) -> str:
    """Hex SHA-256 of the canonical JSON of `document`."""
    return hashlib.sha256(canonical_json(document)).hexdigest()
