"""Which tokens the next step computes. Plain Python: it knows counts, not tensors."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from weft.adapters.residency import AdapterRef
from weft.errors import WeftError
from weft.server.engine.fairness import FairQueue
from weft.server.engine.kv_blocks import BlockPool
from weft.server.engine.pacing import Pace
from weft.server.engine.prefix_cache import PrefixCache
from weft.server.engine.sequence import Sequence

PREFETCHED = 32
"""Waiting requests whose adapters are looked after although no more requests can be admitted in this step."""

PATIENCE = 4
"""Steps that a request which finds no room waits for one that will surely end by then, before it takes another's."""


PASSING_TOKENS = 8192
"""Prompts and answers, at their longest, that smaller requests may bring past one that finds no blocks.

As much as eight steps of priority would put it back: a few dozen short requests get on beside a long answer that holds
it up, and then all wait for it, so that it waits for hardly more than those that run.
"""


class Round(Protocol):
    """One step's look at the adapters of the requests that wait, in their order. See `adapters/residency.py`."""

    def ready(self, refs: Seq[AdapterRef]) -> bool:
        """Whether all are on the device and may be used; if not, they will be. Raises what ends the request."""

    def hold(self, refs: Seq[AdapterRef]) -> None:
        """Keep them there, each, until `let_go`."""


class Residency(Protocol):
    """Where the adapters of requests are, and who may use them."""

    def round(self) -> AbstractContextManager[Round]: ...

    def let_go(self, refs: Seq[AdapterRef]) -> None: ...


class AlwaysResident:
    """Every adapter is always there."""

    def round(self) -> AbstractContextManager[Round]:
        return nullcontext(self)

    def ready(self, refs: Seq[AdapterRef]) -> bool:
        return True

    def hold(self, refs: Seq[AdapterRef]) -> None:
        pass

    def let_go(self, refs: Seq[AdapterRef]) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A sequence's share of one step: its next `num_tokens` pending tokens, and after the last of them `drafts`.

    Drafts are guesses of what is sampled next: where they are right, one step gives several tokens.
    """

    sequence: Sequence
    num_tokens: int
    drafts: tuple[int, ...] = ()

    @property
    def completes(self) -> bool:
        """Whether nothing is pending after this step, so that a token is sampled."""
        return self.num_tokens == self.sequence.num_pending


class Scheduler:
    """Continuous batching under four budgets: tokens a step, running requests, KV blocks, adapters on the device.

    Decodes come first, then prompts in fair turns (see `fairness.py`), those already begun before those that wait, but
    that those whose adapters are not there yet are passed by, and those that begin as a running one does which is about
    to publish it. A prompt gets all its blocks when it is admitted and is computed in chunks of what the decodes leave
    of the token budget, and of the step's time (see `pacing.py`). When a decode finds no free block, the youngest
    running sequence, or its caller's of the lowest priority, gives up its own and is computed again later: its tokens
    stay, so its answer does too, and what it has published is found again if nobody needed the blocks meanwhile. So
    do those of the shares that hold the most, when another's turn finds no room and that would make it. One that needs
    more blocks than are free lets smaller ones pass, so many tokens of them and no more. Nothing is swapped out: on a
    CPU the cache is host memory already, and more of it serves better.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_batch_tokens: int,
        max_running: int,
        scrub: Callable[[list[int]], None] = lambda blocks: None,
        residency: Residency | None = None,
        queue: FairQueue | None = None,
        pace: Pace | None = None,
        *,
        prefix_cache: bool = False,
        max_reported: int = 1 << 30,
        passing_tokens: int = PASSING_TOKENS,
        whole_prompts: bool = False,
    ) -> None:
        """scrub wipes the content of blocks that are given up in mid-computation. pace None: chunks as large as fit.

        max_reported: the most tokens of prompts that a step reports on, since each takes a row of logits.
        passing_tokens: see PASSING_TOKENS. whole_prompts: never cut one; no longer ones may be added than a step takes.
        """
        self.pool = pool
        self.prefixes = PrefixCache(pool, enabled=prefix_cache)
        self._scrub = scrub
        self._residency = residency or AlwaysResident()
        self.waiting = FairQueue() if queue is None else queue
        self.pace = pace or Pace(0.0, 1)
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.hopeless: list[tuple[Sequence, WeftError]] = []
        """Who can't be run, found while picking the last step, and why: theirs is to be removed."""
        self.is_full = False
        """Whether the last step had no room for all who were ready to run."""
        self._max_batch_tokens = max_batch_tokens
        self._max_running = max_running
        self._max_reported = max_reported
        self._num_reported = 0
        self._num_again = 0
        """Steps since the last look at those that wait."""
        self._passing_tokens = passing_tokens
        self.whole_prompts = whole_prompts
        self._turned_away: list[Sequence] = []
        """Who found no room in the last step, in turn."""
        self._passed: dict[Sequence, int] = {}
        """Tokens that were let past each that has been turned away since it waits."""
        self._awaited: dict[Sequence, tuple[float, float]] = {}
        """Turns of those that wait for what a running one computes; it goes on in theirs if that is earlier."""

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def num_cached(self, sequence: Sequence) -> int:
        """Tokens of one that waits which would not have to be computed if it began now."""
        return len(self.prefixes.hits(sequence)) * self.pool.block_tokens

    def sequences(self) -> Iterator[Sequence]:
        """Every sequence that is running or waiting."""
        yield from self.running
        yield from self.waiting

    def schedule(self) -> list[Scheduled]:
        """Pick the next step; empty only when nothing is running, and all that wait, wait for adapters."""
        self._num_reported = 0
        self._num_again = 0
        self.is_full = False
        self._make_way()
        picked = self._decodes()
        budget = self._max_batch_tokens - len(picked)
        paced = self.pace.prompt_tokens(len(picked))
        if paced is not None:
            budget = min(budget, paced)
        begun = deque(sorted((s for s in self.running if s.num_pending > 1), key=self._turn_of))
        self.hopeless = []
        if self.waiting:
            budget = self._admit_waiting(picked, begun, budget)
        else:
            self._awaited = {}
        while begun and budget > 0:
            budget -= self._pick(picked, begun.popleft(), budget)
        return picked

    def again(self, sequences: Seq[Sequence]) -> list[Scheduled] | None:
        """Pick a step of one token of each of these and of nobody else; None where another step may be right.

        All others that run must be about to end. Those that wait are not looked at: they wait a few steps more where
        all places are taken.
        """
        if self.waiting and (len(self.running) < self._max_running or self._num_again == PATIENCE):
            return None
        missing = [max(0, self._missing(sequence)) for sequence in sequences]
        if not self.pool.can_allocate(sum(missing)):
            return None
        self._num_again += 1
        picked: list[Scheduled] = []
        for sequence, count in zip(sequences, missing, strict=True):
            sequence.blocks += self.pool.allocate(count)
            self._pick(picked, sequence, 1)
        return picked

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out and free its blocks: the one exit."""
        if sequence in self.running:
            self._stop_running(sequence)
        self.waiting.leave(sequence)
        self._release_blocks(sequence)
        self._passed.pop(sequence, None)
        if sequence in self._turned_away:
            self._turned_away.remove(sequence)

    def check(self) -> None:
        """Audit the block pool and the prefix cache against the sequences. Raises AssertionError."""
        self.pool.check(sequence.blocks for sequence in self.sequences())
        self.waiting.check()
        self.prefixes.check(self.running)
        assert all(not sequence.blocks for sequence in self.waiting), "a waiting sequence holds blocks"

    def _make_way(self) -> None:
        """Preempt of the shares that hold the most for the first that found no room, if that gives it enough."""
        turned_away, self._turned_away = self._turned_away, []
        if not turned_away or any(_steps_left(sequence) <= PATIENCE for sequence in self.running):
            return
        waits = turned_away[0]
        victims = list(self.waiting.crowding_out(waits, self.running))
        if not self._would_fit(waits, victims):
            return
        enough = bisect_left(range(len(victims)), True, key=lambda count: self._would_fit(waits, victims[:count]))
        for victim in victims[:enough]:
            self._preempt(victim)

    def _would_fit(self, sequence: Sequence, victims: Seq[Sequence]) -> bool:
        """Whether one that waits fits once these have given way and the decodes of the others have their blocks."""
        gone = set(victims)
        staying = (other for other in self.running if other not in gone)
        return self._fits(sequence, sum(self._missing(other) for other in staying), victims)

    def _decodes(self) -> list[Scheduled]:
        picked: list[Scheduled] = []
        ranked = self._ranked()
        for sequence in tuple(ranked):
            holds_blocks = bool(sequence.blocks)  # not preempted a moment ago, for one before it
            if holds_blocks and sequence.num_pending == 1 and self._make_room(sequence, ranked):
                self._pick(picked, sequence, 1)
        return picked

    def _ranked(self) -> list[Sequence]:
        """Who runs, in the order in which they keep their blocks: the last gives way first.

        The youngest of all decides whose request gives way (age counts from the last admission), so that a priority is
        worth nothing against other callers. Of that caller it is the one of the lowest priority, and of several the
        youngest; then the next youngest of all decides, and so on. Having given way counts as a step of priority each
        time, so that nobody does for ever.
        """
        by_caller: dict[str, list[Sequence]] = {}
        for sequence in self.running:
            by_caller.setdefault(sequence.request.caller, []).append(sequence)
        ranks = {
            caller: iter(sorted(own, key=lambda sequence: -sequence.request.priority - sequence.num_preemptions))
            for caller, own in by_caller.items()
        }
        return [next(ranks[sequence.request.caller]) for sequence in self.running]

    def _make_room(self, sequence: Sequence, ranked: list[Sequence]) -> bool:
        """Give a decode its block, preempting from the last in rank on; False where it was itself preempted."""
        missing = self._missing(sequence)
        while not self.pool.can_allocate(missing):
            if self._preempt(ranked.pop()) is sequence:
                return False
        sequence.blocks += self.pool.allocate(missing)
        return True

    def _missing(self, sequence: Sequence) -> int:
        """Blocks that it needs for the tokens that it has."""
        return self.pool.blocks_for(len(sequence.tokens)) - len(sequence.blocks)

    def _preempt(self, sequence: Sequence) -> Sequence:
        self._stop_running(sequence)
        self._scrub(self.pool.unpublished(sequence.blocks))
        self._release_blocks(sequence)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.waiting.put_back(sequence)
        self.num_preemptions += 1
        return sequence

    def _stop_running(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._residency.let_go(sequence.adapters)

    def _admit_waiting(self, picked: list[Scheduled], begun: deque[Sequence], budget: int) -> int:
        """Admit in turn who is ready, until one does not fit; then of some more those that may pass it by.

        Of the others of these it looks after the adapters. begun: prompts in turn that go on before those whose turn is
        later. Returns what is left of the budget.
        """
        is_full, num_prefetched = False, 0
        awaited: dict[Sequence, tuple[float, float]] = {}
        held_up: list[Sequence] = []
        with self._residency.round() as adapters:
            for sequence in self.waiting.in_turn():
                is_over = is_full or bool(self._turned_away)
                if is_over and num_prefetched == PREFETCHED:
                    break
                num_prefetched += is_over
                try:
                    ready = adapters.ready(sequence.adapters)
                except WeftError as error:
                    self.hopeless.append((sequence, error))
                    continue
                if not ready:
                    held_up.append(sequence)
                ready = ready and not is_full
                if ready and (first := self.prefixes.comes_from(sequence)) is not None:
                    awaited.setdefault(first, self.waiting.turn_of(sequence))
                    ready = False
                while begun and budget > 0 and self._turn_of(begun[0]) <= self.waiting.turn_of(sequence):
                    budget -= self._pick(picked, begun.popleft(), budget)
                if ready and budget > 0 and not self._fits(sequence, self._to_spare(sequence)):
                    self._turned_away.append(sequence)
                    ready = False
                is_full = is_full or budget < (self._least(sequence) if ready else 1) or not self._lets_pass()
                if ready and not is_full:
                    adapters.hold(sequence.adapters)
                    budget -= self._pick(picked, self._admit(sequence), budget)
        self._awaited = awaited
        self.waiting.hold_up(held_up)
        self.is_full = is_full
        return budget

    def _least(self, sequence: Sequence) -> int:
        """Tokens of one that waits which a step has to compute if it is to begin with it."""
        return sequence.num_pending if self.whole_prompts else 1

    def _turn_of(self, sequence: Sequence) -> tuple[float, float]:
        """Of a prompt that was begun: its own turn, or the earliest of those that wait for it."""
        turn = self.waiting.turn_of(sequence)
        return min(turn, self._awaited.get(sequence, turn))

    def _fits(self, sequence: Sequence, num_spare: int = 0, without: Seq[Sequence] = ()) -> bool:
        """Whether there is room for one that waits and so many more blocks, once those of `without` have given way."""
        if len(self.running) - len(without) >= self._max_running:
            return False
        hits = self.prefixes.hits(sequence)
        needed = self.pool.blocks_for(len(sequence.tokens)) - len(hits) + num_spare
        return self.pool.can_allocate(needed, beside=hits, without=[victim.blocks for victim in without])

    def _to_spare(self, sequence: Sequence) -> int:
        """Blocks that must be left: for one that passes others by, all that it may come to need.

        Else it would soon take them from who runs, or give up its own.
        """
        if not self._turned_away:
            return 0
        num_tokens = len(sequence.tokens)
        return self.pool.blocks_for(num_tokens + _steps_left(sequence)) - self.pool.blocks_for(num_tokens)

    def _lets_pass(self) -> bool:
        """Whether others may be admitted although some that were turned away have earlier turns."""
        if not self._turned_away:
            return True
        farthest = max(self._passed.get(sequence, 0) for sequence in self._turned_away)
        return len(self.running) < self._max_running and farthest < self._passing_tokens

    def _admit(self, sequence: Sequence) -> Sequence:
        for passed in self._turned_away:
            num_tokens = len(sequence.tokens) + _steps_left(sequence)
            self._passed[passed] = self._passed.get(passed, 0) + num_tokens
        self._passed.pop(sequence, None)
        self.waiting.remove(sequence)
        self.prefixes.begin(sequence)
        sequence.blocks += self.pool.allocate(self.pool.blocks_for(len(sequence.tokens)) - len(sequence.blocks))
        self.running.append(sequence)
        return sequence

    def _pick(self, picked: list[Scheduled], sequence: Sequence, budget: int) -> int:
        num_tokens = self._within_reports(sequence, min(sequence.num_pending, budget))
        if num_tokens:
            self.waiting.charge(sequence, num_tokens)
            picked.append(Scheduled(sequence, num_tokens))
        return num_tokens

    def _within_reports(self, sequence: Sequence, num_tokens: int) -> int:
        """As many of the tokens as there is room to report on."""
        start = sequence.num_computed
        wanted = sequence.unreported(range(start, start + num_tokens))
        fitting = wanted[: self._max_reported - self._num_reported]
        self._num_reported += len(fitting)
        return num_tokens if len(fitting) == len(wanted) else fitting.stop - start

    def _release_blocks(self, sequence: Sequence) -> None:
        self.prefixes.end(sequence)
        self.pool.free(sequence.blocks)
        sequence.blocks = []


def _steps_left(sequence: Sequence) -> int:
    """After so many more tokens it ends at the latest."""
    return sequence.request.stopping.max_tokens - sequence.num_generated
