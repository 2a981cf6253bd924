"""What is wrong with a message, gathered field by field, so that a refusal names every one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import Message

from weft.errors import InvalidRequest, Problem

MAX_PROBLEMS = 256
"""Of one message that are kept; far more than fit in a status."""

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class Range:
    """low ≤ value ≤ high, or low < value where `above`. No range holds NaN."""

    low: float
    high: float = math.inf
    above: bool = False

    def holds(self, value: float) -> bool:
        return math.isfinite(value) and (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'at least'} {_digits(self.low)}"
        return low if math.isinf(self.high) else f"{low} and at most {_digits(self.high)}"


def _digits(value: float) -> str:
    """An integer in all its digits, another number in those that a float32 has."""
    return str(value) if isinstance(value, int) else f"{value:.7g}"


class Violations:
    """What is wrong with a message, noted field by field."""

    def __init__(self) -> None:
        self._problems: list[Problem] = []

    def add(self, path: str, description: str) -> None:
        if len(self._problems) < MAX_PROBLEMS:
            self._problems.append(Problem(path, description))

    def fits(self, items: Sized, path: str, limit: int) -> bool:
        """Whether a field has no more items than that; noted if not. Who gets False leaves the items alone."""
        if len(items) > limit:
            self.add(path, f"has {len(items)} entries; at most {limit} are taken")
        return len(items) <= limit

    def size(self, num_bytes: int, path: str, limit: int) -> None:
        """Note a text, or several together, of more bytes than that."""
        if num_bytes > limit:
            self.add(path, f"has {num_bytes} bytes; at most {limit} are taken")

    def length(self, text: str, path: str, limit: int) -> None:
        """Note a text of more characters than that."""
        if len(text) > limit:
            self.add(path, f"has {len(text)} characters; at most {limit} are taken")

    def number(self, message: Message, path: str, default: Number, allowed: Range) -> Number:
        """The field's value, or its default where it is not set; noted if out of range."""
        name = path.rpartition(".")[2]
        if not message.HasField(name):
            return default
        value: Number = getattr(message, name)
        self.value(value, path, allowed)
        return value

    def value(self, value: float, path: str, allowed: Range) -> None:
        """Note a number that is out of range."""
        if not allowed.holds(value):
            self.add(path, f"is {_digits(value)}; must be {'' if math.isfinite(value) else 'finite, '}{allowed}")

    def token_ids(self, ids: Sequence[int], path: str, vocab_size: int) -> None:
        """Note the first id that is outside of the vocabulary."""
        if max(ids, default=0) >= vocab_size:
            index, token = next((index, token) for index, token in enumerate(ids) if token >= vocab_size)
            self.add(f"{path}[{index}]", f"is {token}; token ids end at {vocab_size - 1}")

    def raise_any(self) -> None:
        """Raises InvalidRequest if anything was noted."""
        if self._problems:
            raise InvalidRequest(self._problems)
