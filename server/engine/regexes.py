"""Regular expressions before they are compiled: parts that can be left out multiply each other's states."""

from __future__ import annotations

import re

MAX_OPTIONAL = 1000
"""Parts of one expression that may be missing or repeat: twice as many take four times the time and the memory."""

_OPTIONAL = re.compile(r"[?*{]|\|\)|\(\||\|\|")


def check_regex(text: str) -> None:
    """Raises ValueError where too many parts may be missing or repeat, those that are escaped counted, too."""
    count = len(_OPTIONAL.findall(text))
    if count > MAX_OPTIONAL:
        raise ValueError(
            f"has {count} parts that may be missing or repeat (?, *, {{}}); at most {MAX_OPTIONAL} are taken"
        )
