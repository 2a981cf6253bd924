"""Names of adapters: which there may be, and which was meant by one that nobody has."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable
from difflib import get_close_matches

from weft.errors import InvalidRequest

MAX_NAME_CHARACTERS = 128

NUM_BESIDE = 16
MAX_COMPARED_CHARACTERS = 64
"""To compare two takes the square of their length: a few milliseconds for all of this length."""

_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._/-]{{0,{MAX_NAME_CHARACTERS - 1}}}")


def check_name(name: str) -> None:
    """Raises InvalidRequest unless the name may stand for an adapter."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidRequest.of(
            "adapter.name",
            f"is {name!r}; must be 1 to {MAX_NAME_CHARACTERS} letters, digits, '.', '_', '/' or '-', start with a "
            "letter or digit and not hold '..'",
        )


def what_was_meant(name: str, names: Iterable[str]) -> str:
    """A hint for who asked for a name that is none of these."""
    close = nearest(name, names)
    return f"did you mean {close!r}?" if close else "list what is loaded with `weft adapters list`"


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of those that stand beside it in the alphabet, on either side; None where none is.

    However many there are, and however long, it takes no more than milliseconds.
    """
    if len(name) > MAX_COMPARED_CHARACTERS:
        return None
    ordered = sorted(names)
    at = bisect_left(ordered, name)
    beside = ordered[max(0, at - NUM_BESIDE) : at + NUM_BESIDE]
    close = get_close_matches(name, [each for each in beside if len(each) <= MAX_COMPARED_CHARACTERS], n=1)
    return close[0] if close else None
