"""Tokens as an answer tells them: with their text, how likely they were, and what else was likely."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch

from weft.server.engine.batch import PromptRows
from weft.server.engine.reports import report
from weft.server.engine.request import Token, TopLogprob
from weft.server.engine.sampler import Sample
from weft.server.engine.text import Decode

_MAX_TEXTS = 1 << 16
"""Tokens whose own text is kept: alternatives and prompts are told in the same ones again and again."""


class Reporter:
    """Makes what callers see of tokens from what the model and the sampler made."""

    def __init__(self, decode: Decode) -> None:
        self._text_of = lru_cache(maxsize=_MAX_TEXTS)(lambda token: decode([token]))

    def sampled(self, made: Sample, piece: str) -> Token:
        """A new token of an answer; piece: its text there."""
        return Token(made.token, piece, made.logprob, made.rank, self._top(made.top))

    def prompt(self, rows: PromptRows, logits: torch.Tensor) -> list[Token]:
        """Some tokens of a prompt; a logprob is NaN where its row is not finite. logits: [n, vocab] of the step."""
        request = rows.sequence.request
        tokens = request.prompt[rows.positions.start : rows.positions.stop]
        made = report(logits[rows.first_row : rows.first_row + len(tokens)], tokens, request.top_logprobs)
        return [
            Token(token, self._text_of(token), one.logprob, one.rank, self._top(one.top))
            for token, one in zip(tokens, made, strict=True)
        ]

    def _top(self, top: Iterable[tuple[int, float]]) -> tuple[TopLogprob, ...]:
        return tuple(TopLogprob(token, self._text_of(token), logprob) for token, logprob in top)
