"""How long a request that waits will take, at the rate at which others get on now."""

from __future__ import annotations

import math

from weft.server.engine.pacing import Pace
from weft.server.engine.sequence import Sequence

MEASURED_S = 1.0
"""Time with a queue after which its rate means something."""

_MEMORY_S = 10.0
"""Age at which a measurement counts 1/e."""

_GAP_WEIGHT = 0.05
"""Of the newest time between two tokens in the mean."""


class Forecast:
    """Measures how fast the queue moves and running requests get their tokens; says nothing before it has."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._waited_s = 0.0
        self._started_tokens = 0.0
        self._gap_s: float | None = None

    @property
    def queued_token_s(self) -> float | None:
        """Seconds for which each prompt token in the queue holds up who waits behind it; None: not measured."""
        if self._waited_s < MEASURED_S or self._started_tokens < 1:
            return None
        return self._waited_s / self._started_tokens

    def step(self, started_tokens: int, duration_s: float) -> None:
        """A step at whose end somebody waited began prompts of so many tokens, what a cache held of them included."""
        kept = math.exp(-duration_s / _MEMORY_S)
        self._waited_s = self._waited_s * kept + duration_s
        self._started_tokens = self._started_tokens * kept + started_tokens

    def token(self, gap_s: float) -> None:
        """A running request got a token, so long after the one before."""
        self._gap_s = gap_s if self._gap_s is None else self._gap_s + _GAP_WEIGHT * (gap_s - self._gap_s)

    def finish_s(self, sequence: Sequence, tokens_ahead: int) -> float | None:
        """Seconds until one that waits is done, if its answer is as short as it can be; None: not known.

        tokens_ahead: of the prompts that will begin before.
        """
        per_token_s = self.queued_token_s
        if per_token_s is None or self._gap_s is None or self._pace.prompt_token_s is None:
            return None
        own_s = sequence.num_pending * min(self._pace.prompt_token_s, per_token_s)
        return tokens_ahead * per_token_s + own_s + certain_tokens(sequence) * self._gap_s


def certain_tokens(sequence: Sequence) -> int:
    """Tokens after the next one that will be generated whatever they are."""
    request, stopping = sequence.request, sequence.request.stopping
    if stopping.time_limit_s is not None or request.constraint is not None:
        return 0
    runs_out = stopping.ignore_eos and not stopping.stop_sequences and not stopping.stop_token_ids
    sure = stopping.max_tokens if runs_out else stopping.min_tokens
    return max(0, sure - sequence.num_generated - 1)
