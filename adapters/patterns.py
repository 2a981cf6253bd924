"""Regular expressions that somebody else wrote, bounded: while they are compiled, and while they match.

PEFT's are Python's `re`, which can't be stopped. `regex` can, and agrees with it on all that both take; what only one
of them takes is refused.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

import regex

MATCH_TIMEOUT_S = 0.2
"""How long one pattern may take on one module's name; an honest one takes microseconds."""

MATCH_BUDGET_S = 10.0
"""How long all the patterns of an adapter may take on all names."""

MAX_CHARACTERS = 1 << 17
"""Of all the patterns of an adapter, laid out: `regex` writes counted repeats out, one inside the other."""

_BY_END = r"(.*\.)?({})$"
_WHOLE = r"(?:{})\Z"
_LAYER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")

_PLAIN = re.compile(r"[\w.-]*")
_BRACES = re.compile(r"\{[^{}]*\}?")
_COUNTS = re.compile(r"\{(\d{1,9})?(?:,(\d{1,9})?)?\}")


class Patterns:
    """Those of one adapter. Each must be added before it is asked for; every answer may raise TimeoutError."""

    def __init__(self) -> None:
        self._compiled: dict[str, regex.Pattern[str]] = {}
        self._num_characters = 0
        self._left_s = MATCH_BUDGET_S

    def add_whole(self, pattern: str) -> None:
        """One for `is_whole`. Raises ValueError saying what is wrong with it."""
        self._add(pattern, _WHOLE)

    def add_end(self, pattern: str) -> None:
        """One for `is_end`. Raises ValueError saying what is wrong with it."""
        if not _PLAIN.fullmatch(pattern):
            self._add(pattern, _BY_END)

    def add_layers(self, pattern: str) -> None:
        """One for `layer`. Raises ValueError saying what is wrong with it."""
        self._add(pattern, _LAYER)

    def is_whole(self, pattern: str, name: str) -> bool:
        """Whether the name matches from end to end."""
        return self._match(pattern, _WHOLE, name) is not None

    def is_end(self, pattern: str, name: str) -> bool:
        """PEFT's `get_pattern_key`: whether the name matches, or a dotted end of it."""
        if not _PLAIN.fullmatch(pattern):
            return self._match(pattern, _BY_END, name) is not None
        before, tail = name[: -len(pattern)], name[-len(pattern) :]
        fits = len(tail) == len(pattern) > 0 and (not before or before.endswith("."))
        return fits and (tail == pattern or all(want in (is_, ".") for want, is_ in zip(pattern, tail, strict=True)))

    def layer(self, patterns: Sequence[str], name: str) -> int | None:
        """The number after the first part of the name that one of the patterns matches; without any, the first."""
        if not patterns:
            found = _ANY_LAYER.match(name)
            return int(found["idx"]) if found else None
        matches = (self._match(pattern, _LAYER, name) for pattern in patterns)
        first = next((match for match in matches if match), None)
        return int(first["idx"]) if first and first["idx"] is not None else None

    def _add(self, pattern: str, form: str) -> None:
        self._check_size(pattern)
        whole = form.format(pattern)
        try:
            for each in (pattern, whole):
                re.compile(each)
            self._compiled[whole] = regex.compile(whole)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
            raise ValueError(f"is not a regular expression ({reason})") from None

    def _match(self, pattern: str, form: str, name: str) -> regex.Match[str] | None:
        compiled = self._compiled[form.format(pattern)]
        started = time.monotonic()
        try:  # others run beside it
            return compiled.match(name, timeout=min(MATCH_TIMEOUT_S, max(self._left_s, 0.0)), concurrent=True)
        finally:
            self._left_s -= time.monotonic() - started

    def _check_size(self, pattern: str) -> None:
        """Before anything is compiled: that may take far more time and memory than the pattern is long."""
        num_characters = len(pattern)
        for braces in _BRACES.findall(pattern):
            counts = _COUNTS.fullmatch(braces)
            if counts is None:
                raise ValueError(f"holds {braces[:20]!a}, which no module's name does")
            num_characters *= max(1, *(int(count or 0) for count in counts.groups()))
        self._num_characters += num_characters
        if self._num_characters > MAX_CHARACTERS:
            raise ValueError(
                f"is too large: {self._num_characters:,} characters with its repeats and the patterns before it, "
                f"and {MAX_CHARACTERS:,} are allowed"
            )
