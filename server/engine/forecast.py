"""How long a request that waits will take, at the rate at which others get on now."""

from __future__ import annotations

import math
from collections.abc import Callable

from weft.errors import OutOfCapacity
from weft.server.engine.fairness import FairQueue
from weft.server.engine.pacing import Pace
from weft.server.engine.sequence import Sequence

MEASURED_S = 1.0
"""Time with a queue after which its rate means something."""

EVERY_S = 0.25
"""How often the requests that wait are looked over."""

_MEMORY_S = 30.0
"""Age at which a measurement counts 1/e."""

_GAP_WEIGHT = 0.05
"""Of the newest time between two tokens in the mean."""


class Forecast:
    """Measures how fast the queue moves and running requests get their tokens; says nothing before it has."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._waited_s = 0.0
        self._started_tokens = 0.0
        self._measured_s = -math.inf
        self._gap_s: float | None = None
        self._looked_s = -math.inf

    def queued_token_s(self, now_s: float) -> float | None:
        """Seconds for which each prompt token in the queue holds up who waits behind it.

        None: not measured, or too long ago.
        """
        kept, started_tokens = self._kept(now_s), self._started_tokens
        if self._waited_s * kept < MEASURED_S or started_tokens * kept < 1:
            return None
        return self._waited_s / started_tokens

    def step(self, started_tokens: int, duration_s: float, now_s: float) -> None:
        """A step that had no room for all who were ready to run, and ends now.

        It began prompts of so many tokens, what a cache held of them included.
        """
        kept = self._kept(now_s)
        self._waited_s = self._waited_s * kept + duration_s
        self._started_tokens = self._started_tokens * kept + started_tokens
        self._measured_s = now_s

    def token(self, gap_s: float) -> None:
        """A running request got a token, so long after the one before."""
        self._gap_s = gap_s if self._gap_s is None else self._gap_s + _GAP_WEIGHT * (gap_s - self._gap_s)

    def late(
        self, waiting: FairQueue, num_cached: Callable[[Sequence], int], now_s: float, *, is_idle: bool, is_full: bool
    ) -> list[tuple[Sequence, OutOfCapacity]]:
        """Who waits and can't meet its deadline at the current rate, looked for every EVERY_S; the errors say why.

        num_cached: tokens of one that need not be computed. is_idle: nothing runs. Then the rate is an old one, and the
        next request is not refused, since only one that runs makes it new. is_full: the last step had no room for all
        who were ready; else all that have come since may begin at once, and none waits for those before it. Who ran
        before and was preempted is not refused.
        """
        if not waiting or now_s < self._looked_s + EVERY_S:
            return []
        self._looked_s = now_s
        found: list[tuple[Sequence, OutOfCapacity]] = []
        tokens_ahead = 0
        for sequence in waiting.forecast():
            deadline_s = sequence.request.deadline_s
            may_run_now = is_idle and not tokens_ahead
            stays = deadline_s is None or may_run_now or sequence.started_s is not None
            finish_s = None if stays else self.finish_s(sequence, tokens_ahead, now_s)
            if finish_s is not None and deadline_s is not None and now_s + finish_s > deadline_s:
                finish_s = self.finish_s(sequence, tokens_ahead, now_s, num_cached(sequence))
            if finish_s is None or deadline_s is None or now_s + finish_s <= deadline_s:
                tokens_ahead += sequence.num_pending if is_full else 0
                continue
            left_s = deadline_s - now_s
            message = (
                f"at the current rate the answer takes another {finish_s:.1f} s at least, after {tokens_ahead} prompt "
                f"tokens that go before it; its deadline is in {left_s:.1f} s"
            )
            found.append((sequence, OutOfCapacity(message, retry_after_s=finish_s - left_s)))
        return found

    def finish_s(self, sequence: Sequence, tokens_ahead: int, now_s: float, num_cached: int = 0) -> float | None:
        """Seconds until one that waits is done, if its answer is as short as it can be; None: not known.

        tokens_ahead: of the prompts that will begin before; num_cached: of its own, that need not be computed.
        """
        per_token_s = self.queued_token_s(now_s)
        if per_token_s is None or self._gap_s is None or self._pace.prompt_token_s is None:
            return None
        own_s = (sequence.num_pending - num_cached) * min(self._pace.prompt_token_s, per_token_s)
        return tokens_ahead * per_token_s + own_s + certain_tokens(sequence) * self._gap_s

    def _kept(self, now_s: float) -> float:
        """What is left of the measurements."""
        return math.exp(-max(0.0, now_s - self._measured_s) / _MEMORY_S)


def certain_tokens(sequence: Sequence) -> int:
    """Tokens after the next one that will be generated whatever they are."""
    request, stopping = sequence.request, sequence.request.stopping
    if stopping.time_limit_s is not None or request.constraint is not None:
        return 0
    runs_out = stopping.ignore_eos and not stopping.stop_sequences and not stopping.stop_token_ids
    sure = stopping.max_tokens if runs_out else stopping.min_tokens
    return max(0, sure - sequence.num_generated - 1)
