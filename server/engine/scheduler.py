"""Which tokens the next step computes. Plain Python: it knows counts, not tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from weft.server.engine.kv_blocks import BlockPool
from weft.server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A sequence's share of one step: its next `num_tokens` pending tokens."""

    sequence: Sequence
    num_tokens: int

    @property
    def completes(self) -> bool:
        """Whether nothing is pending after this step, so that a token is sampled."""
        return self.num_tokens == self.sequence.num_pending


class Scheduler:
    """Continuous batching under three budgets: tokens a step, running requests, KV blocks.

    Decodes come first, then the prompts already begun, then new arrivals in order. A prompt gets all its blocks when it
    is admitted and is computed in chunks of what the decodes leave of the token budget. When a decode finds no free
    block, the youngest running sequence gives up its own and is computed again later: its tokens stay, so its answer
    does too.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_batch_tokens: int,
        max_running: int,
        scrub: Callable[[list[int]], None] = lambda blocks: None,
    ) -> None:
        """scrub wipes the content of blocks that are given up in mid-computation."""
        self.pool = pool
        self._scrub = scrub
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._max_batch_tokens = max_batch_tokens
        self._max_running = max_running

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def sequences(self) -> Iterator[Sequence]:
        """Every sequence that is running or waiting."""
        yield from self.running
        yield from self.waiting

    def schedule(self) -> list[Scheduled]:
        """Pick the next step; empty only when nothing is running or waiting."""
        picked = self._decodes()
        budget = self._max_batch_tokens - len(picked)
        for sequence in self.running:
            if sequence.num_pending > 1 and budget > 0:
                budget -= self._pick(picked, sequence, budget)
        while budget > 0 and self._can_admit():
            budget -= self._pick(picked, self._admit(), budget)
        return picked

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out and free its blocks: the one exit."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release_blocks(sequence)

    def check(self) -> None:
        """Audit the block pool against the sequences. Raises AssertionError."""
        self.pool.check(sequence.blocks for sequence in self.sequences())
        assert all(not sequence.blocks for sequence in self.waiting), "a waiting sequence holds blocks"

    def _decodes(self) -> list[Scheduled]:
        picked: list[Scheduled] = []
        for sequence in list(self.running):
            holds_blocks = bool(sequence.blocks)  # not preempted a moment ago, for one before it
            if holds_blocks and sequence.num_pending == 1 and self._make_room(sequence):
                picked.append(Scheduled(sequence, 1))
        return picked

    def _make_room(self, sequence: Sequence) -> bool:
        """Give a decode its block, preempting from the youngest on; False where it was itself preempted."""
        missing = self.pool.blocks_for(len(sequence.tokens)) - len(sequence.blocks)
        while not self.pool.can_allocate(missing):
            if self._preempt(self.running[-1]) is sequence:
                return False
        sequence.blocks += self.pool.allocate(missing)
        return True

    def _preempt(self, sequence: Sequence) -> Sequence:
        self.running.remove(sequence)
        self._scrub(sequence.blocks)
        self._release_blocks(sequence)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1
        return sequence

    def _can_admit(self) -> bool:
        if not self.waiting or len(self.running) >= self._max_running:
            return False
        return self.pool.can_allocate(self.pool.blocks_for(len(self.waiting[0].tokens)))

    def _admit(self) -> Sequence:
        sequence = self.waiting.popleft()
        sequence.blocks = self.pool.allocate(self.pool.blocks_for(len(sequence.tokens)))
        self.running.append(sequence)
        return sequence

    @staticmethod
    def _pick(picked: list[Scheduled], sequence: Sequence, budget: int) -> int:
        num_tokens = min(sequence.num_pending, budget)
        picked.append(Scheduled(sequence, num_tokens))
        return num_tokens

    def _release_blocks(self, sequence: Sequence) -> None:
        self.pool.free(sequence.blocks)
        sequence.blocks = []
