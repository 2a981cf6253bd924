"""Several tokens a step: what comes next is guessed, and the step computes the guesses along with the last token.

A guess costs a row of the step. Each row is sampled by its own distribution and its own number of the sequence's
generator, and kept as long as the guesses before it were what was sampled: so the answer is the same as without
guesses, greedy or not.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

from weft.server.engine.kv_blocks import BlockPool
from weft.server.engine.lookup import Lookup
from weft.server.engine.scheduler import Scheduled
from weft.server.engine.sequence import Sequence

SMALL_STEP = 16
"""Tokens up to which a step takes hardly longer for one more of them, drafts included; see docs/performance.md."""


class Speculation:
    """Adds drafts to the decodes of a step as long as it is small, has the blocks, and they were right of late."""

    def __init__(self, pool: BlockPool, num_drafts: int, context_length: int, small_step: int) -> None:
        """num_drafts: the most a sequence a step; small_step: the most tokens of a step that holds drafts."""
        self._pool = pool
        self._num_drafts = num_drafts
        self._context_length = context_length
        self._small_step = small_step

    def extend(self, picked: list[Scheduled]) -> list[Scheduled]:
        """The same step with drafts. Blocks that they need are the sequences' from now on."""
        room = self._small_step - sum(item.num_tokens for item in picked)
        if room <= 0 or self._num_drafts == 0:
            return picked
        extended = []
        for index, item in enumerate(picked):
            share = -(-room // (len(picked) - index))
            drafts = self._drafts(item.sequence, share) if _may_draft(item) else ()
            room -= len(drafts)
            extended.append(replace(item, drafts=drafts) if drafts else item)
        return extended

    def would_extend(self, picked: Seq[Scheduled]) -> bool:
        """Whether there was anything to guess, for a step that can't be changed any more. Asked once a step."""
        room = self._small_step - len(picked)
        guesses = [self._guess(item.sequence, room) for item in picked if _may_draft(item)] if room > 0 else []
        return any(guesses)

    def _drafts(self, sequence: Sequence, most: int) -> tuple[int, ...]:
        drafts = self._guess(sequence, most)
        length = len(sequence.tokens)
        missing = self._pool.blocks_for(length + len(drafts)) - len(sequence.blocks)
        if missing > 0 and self._pool.can_allocate(missing):
            sequence.blocks += self._pool.allocate(missing)
        return drafts[: len(sequence.blocks) * self._pool.block_tokens - length]

    def _guess(self, sequence: Sequence, most: int) -> tuple[int, ...]:
        if sequence.lookup is None:
            sequence.lookup = Lookup()
        length = len(sequence.tokens)
        most = min(
            most,
            self._num_drafts,
            self._context_length - length,
            sequence.request.stopping.max_tokens - sequence.num_generated - 1,
        )
        return sequence.lookup.draft(sequence.tokens, most)


def _may_draft(item: Scheduled) -> bool:
    """Whether it decodes, and what it samples next depends on nothing but the logits."""
    request = item.sequence.request
    sampling = request.sampling
    return (
        item.num_tokens == 1
        and item.completes
        and request.constraint is None
        and item.sequence.num_generated >= request.stopping.min_tokens
        and sampling.repetition_penalty == 1
        and sampling.presence_penalty == 0
        and sampling.frequency_penalty == 0
    )
