"""JSON files that somebody else wrote: objects, read whole, with every key once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weft.adapters.safe_files import open_regular
from weft.errors import InvalidAdapter, Problem

MAX_JSON_BYTES = 1 << 20


def read_object(path: Path, source: str) -> dict[str, Any]:
    """source names the adapter in messages. Raises InvalidAdapter."""
    try:
        with open_regular(path) as file:
            content = file.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise InvalidAdapter(source, [Problem(path.name, f"is larger than {MAX_JSON_BYTES} bytes")])
        raw = json.loads(content.decode(), object_pairs_hook=_no_duplicates)
        json.dumps(raw, ensure_ascii=False).encode()  # refuses lone surrogates, which no message could repeat
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidAdapter(source, [Problem(path.name, f"can't be read as JSON ({reason})")]) from None
    if not isinstance(raw, dict):
        raise InvalidAdapter(source, [Problem(path.name, "must hold a JSON object")])
    return raw


def shown(value: object) -> str:
    """The value as a message can hold it: in one line, and not too long."""
    try:
        text = ascii(value)
    except RecursionError:
        return "nested too deep"
    return text if len(text) <= 80 else f"{text[:80]}…"


def _no_duplicates(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {shown(key)} appears twice")
        found[key] = value
    return found
