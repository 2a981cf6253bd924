"""Guesses of what comes next, without a model: what followed the same few tokens before is guessed to follow again.

Prompt lookup (Saxena 2023; transformers' `prompt_lookup_num_tokens`).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy
from numpy.typing import NDArray

_LONGEST, _SHORTEST = 4, 2
"""Tokens at the end of a sequence that are looked for in what comes before: as many as match, but not fewer."""

_MOST_MISSES = 6
"""In a row, after which the pause, 2^misses - 1 steps, grows no more."""

_MOST = 64


class Lookup:
    """Guesses for one sequence, and how well they do: it guesses less, and less often, where they fail."""

    def __init__(self) -> None:
        self._tokens: NDArray[numpy.int64] = numpy.zeros(256, dtype=numpy.int64)
        self._num_tokens = 0
        self._length = _LONGEST
        self._misses = 0
        self._pause = 0

    def draft(self, tokens: Seq[int], most: int) -> tuple[int, ...]:
        """Up to `most` guesses of what follows the tokens, which only ever grow; often none."""
        if self._pause > 0 or most <= 0:
            self._pause = max(0, self._pause - 1)
            return ()
        self._catch_up(tokens)
        end = self._last_match()
        if end is None:
            return ()
        following = self._tokens[end + 1 : self._num_tokens]
        return tuple(numpy.resize(following, min(most, self._length)).tolist())  # a loop goes on around

    def learn(self, num_drafted: int, num_accepted: int) -> None:
        """How many of the last guesses were right."""
        if num_accepted == 0:
            self._misses = min(self._misses + 1, _MOST_MISSES)
            self._pause = 2**self._misses - 1
        else:
            self._misses = 0
        self._length = min(_MOST, 2 * self._length) if num_accepted == num_drafted else num_accepted + 1

    def stop(self) -> None:
        """Guess no more."""
        self._pause = 1 << 62

    def _catch_up(self, tokens: Seq[int]) -> None:
        while len(self._tokens) < len(tokens):
            self._tokens = numpy.append(self._tokens, numpy.zeros_like(self._tokens))
        self._tokens[self._num_tokens : len(tokens)] = tokens[self._num_tokens :]
        self._num_tokens = len(tokens)

    def _last_match(self) -> int | None:
        """Where the longest match of the end was before, the last of several: the place of its last token."""
        known = self._tokens[: self._num_tokens]
        matches = (known[:-1] == known[-1]).nonzero()[0]
        found = None
        for back in range(1, min(_LONGEST, len(known) - 1)):
            matches = matches[matches >= back]
            matches = matches[known[matches - back] == known[-1 - back]]
            if not len(matches):
                break
            if back + 1 >= _SHORTEST:
                found = int(matches[-1])
        return found
