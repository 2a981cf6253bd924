"""How many prompt tokens a step may take so that those who decode beside them get their next token in time."""

from __future__ import annotations

FLOOR_BLOCKS = 4
"""Blocks of prompt that every step may take, however slow it is: prompts go on."""

_WEIGHT = 0.25
"""Of the newest step in the estimates."""

_FEWEST = 16
"""Prompt tokens of a step that says something about the time of one."""

_LEAST_SHARE = 0.1
"""Of a step's time that is put down to its prompt tokens at least."""


class Pace:
    """Estimates a step's time as that of a step of decodes alone, plus so much for each prompt token.

    Both are running means of what was measured, so the estimate follows whatever changes: contexts that grow, more
    decodes, a machine that is busy. What a chunk takes too long over makes the next one smaller.
    """

    def __init__(self, target_s: float, floor_tokens: int) -> None:
        """target_s: what a step with decodes should take, 0: however long. floor_tokens: it may take, even so."""
        self._target_s = target_s
        self._floor_tokens = floor_tokens
        self.decode_s: float | None = None
        """Time of a step of decodes alone; None: not measured."""
        self.prompt_token_s: float | None = None
        """Time that a prompt token adds to a step; None: not measured."""

    def prompt_tokens(self, num_decodes: int) -> int | None:
        """How many the next step may take beside so many decodes; None: any number.

        Where decodes alone take more than half of the target, as long again: or prompts would hardly go on.
        """
        if not (self._target_s and num_decodes and self.prompt_token_s):
            return None
        decode_s = self.decode_s or 0.0
        left_s = max(self._target_s - decode_s, decode_s)
        return max(self._floor_tokens, int(left_s / self.prompt_token_s))

    def observe(self, num_prompt_tokens: int, duration_s: float) -> None:
        """A step took so long."""
        if not num_prompt_tokens:
            self.decode_s = _mean(self.decode_s, duration_s)
        elif num_prompt_tokens >= _FEWEST:
            rest_s = max(duration_s - (self.decode_s or 0.0), _LEAST_SHARE * duration_s)
            self.prompt_token_s = _mean(self.prompt_token_s, rest_s / num_prompt_tokens)


def _mean(before: float | None, now: float) -> float:
    """One step that hung for other reasons moves it no further than any that took four times as long."""
    if before is None:
        return now
    return before + _WEIGHT * (min(now, 4 * before) - before)
