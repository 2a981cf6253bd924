"""Any history of a scheduler with a fake model: budgets kept, nobody lost, turns kept, and a bounded wait for all."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from weft.errors import Unavailable
from weft.server.engine.fairness import OUTPUT_COST, PROMPT_COST, FairQueue
from weft.server.engine.kv_blocks import BlockPool
from weft.server.engine.pacing import Pace
from weft.server.engine.request import Request, Stopping
from weft.server.engine.scheduler import Scheduled, Scheduler
from weft.server.engine.sequence import Sequence
from weft.server.engine.text import OutputText

BLOCK = 4
NUM_BLOCKS = 24
MAX_BATCH = 16
MAX_RUNNING = 4
LONGEST_PROMPT = 28
LONGEST_ANSWER = 12
PRIORITY_TOKENS = 16
PASSING_TOKENS = 60

NAMES = ["", "a", "b", "c"]
CALLERS = ["x", "y"]
WEIGHTS = {"a": 2.0}


Flow = tuple[str, str]
"""A caller, and the adapter that it asks for."""


class Paged:
    invocation: tuple[int, ...] = ()


@dataclass(eq=False)
class Version:
    """What a name stood for when a request came. is_broken: it failed to load."""

    digest: str
    is_loaded: bool = True
    is_broken: bool = False
    paged: Paged = field(default_factory=Paged)


@dataclass(eq=False)
class Ref:
    name: str
    version: Version


@dataclass
class Loads:
    """Adapters that are there or not: what the scheduler asks, and an account of who holds them."""

    held: list[Ref] = field(default_factory=list)

    @contextmanager
    def round(self) -> Iterator[Loads]:
        yield self

    def ready(self, refs: tuple[Ref, ...]) -> bool:
        if any(ref.version.is_broken for ref in refs):
            raise Unavailable("broken")
        return all(ref.version.is_loaded for ref in refs)

    def hold(self, refs: tuple[Ref, ...]) -> None:
        assert self.ready(refs)
        self.held += refs

    def let_go(self, refs: tuple[Ref, ...]) -> None:
        for ref in refs:
            self.held.remove(ref)


@dataclass
class Asked:
    """A request that came, and what it has seen since it was served last: what others got, and whose they were."""

    flow: Flow
    cost: float = 0.0
    flows: set[Flow] = field(default_factory=set)
    num_charged: int = 0


class History(RuleBasedStateMachine):
    """blocked_cost: what was served while somebody's adapter was not there, so that a flow could fall behind."""

    def __init__(self) -> None:
        super().__init__()
        self.blocked_cost = 0.0
        self.num_versions = 0
        self.versions = {name: self.make_version() for name in NAMES if name}
        self.loads = Loads()
        self.asked: dict[Sequence, Asked] = {}

    @initialize(target_s=st.sampled_from([0.0, 0.05]), prefix_cache=st.booleans())
    def start(self, target_s: float, prefix_cache: bool) -> None:
        self.pool = BlockPool(1 + NUM_BLOCKS, BLOCK)
        self.pace = Pace(target_s, BLOCK)
        self.scheduler = Scheduler(
            self.pool,
            MAX_BATCH,
            MAX_RUNNING,
            residency=self.loads,
            queue=FairQueue(WEIGHTS, PRIORITY_TOKENS),
            pace=self.pace,
            prefix_cache=prefix_cache,
            passing_tokens=PASSING_TOKENS,
        )

    @rule(
        name=st.sampled_from(NAMES),
        caller=st.sampled_from(CALLERS),
        prompt=st.integers(1, LONGEST_PROMPT),
        answer=st.integers(1, LONGEST_ANSWER),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        count=st.sampled_from([1, 1, 1, 8]),
    )
    def arrive(self, name: str, caller: str, prompt: int, answer: int, priority: int, count: int) -> None:
        for _ in range(count):
            request = Request(
                "r",
                tuple(range(prompt)),
                stopping=Stopping(max_tokens=answer, ignore_eos=True),
                adapters=((name, 1.0),) if name else (),
                caller=caller,
                priority=priority,
            )
            refs = (Ref(name, self.versions[name]),) if name else ()
            sequence = Sequence(request, refs, OutputText(lambda ids: ""), random.Random(0), 0.0)  # type: ignore[arg-type]
            self.scheduler.add(sequence)
            self.asked[sequence] = Asked((caller, name))

    @precondition(lambda self: self.asked)
    @rule(index=st.integers(0, 100))
    def end(self, index: int) -> None:
        """A cancel, or a deadline: of one that waits or runs."""
        self.remove(list(self.asked)[index % len(self.asked)])

    @rule(name=st.sampled_from(NAMES[1:]), is_loaded=st.booleans())
    def update(self, name: str, is_loaded: bool) -> None:
        """The name stands for another version now; requests keep theirs."""
        self.versions[name] = self.make_version(is_loaded)

    def make_version(self, is_loaded: bool = True) -> Version:
        self.num_versions += 1
        return Version(str(self.num_versions), is_loaded)

    @rule(index=st.integers(0, 100), broken=st.sampled_from([False, False, False, True]))
    def load(self, index: int, broken: bool) -> None:
        """Some version that somebody waits for comes, or fails."""
        waiting = [ref.version for s in self.asked for ref in s.adapters if not ref.version.is_loaded]
        if waiting:
            version = waiting[index % len(waiting)]
            version.is_loaded, version.is_broken = not broken, broken

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.advance()

    @rule(name=st.sampled_from(NAMES), caller=st.sampled_from(CALLERS), priority=st.integers(0, 1))
    def flood(self, name: str, caller: str, priority: int) -> None:
        """One flow asks for more than there is, for long."""
        for _ in range(100):
            if sum(asked.flow == (caller, name) for asked in self.asked.values()) < 6:
                self.arrive(name, caller, LONGEST_PROMPT, LONGEST_ANSWER, priority, 2)
            self.advance()

    def advance(self) -> None:
        picked = self.scheduler.schedule()
        self.scheduler.check()
        for sequence, _ in self.scheduler.hopeless:
            assert any(ref.version.is_broken for ref in sequence.adapters)
            self.remove(sequence)
        self.check_step(picked)
        self.measure(picked)
        if not picked:
            assert all(not self.loads.ready(s.adapters) for s in self.asked), "a step with work does some"
        complete = [item.sequence for item in picked if item.completes]
        for item in picked:
            item.sequence.num_computed += item.num_tokens
            self.scheduler.prefixes.publish(item.sequence)
        for sequence in complete:
            sequence.tokens.append(7)
            if sequence.num_generated >= sequence.request.stopping.max_tokens:
                self.remove(sequence)

    def check_step(self, picked: list[Scheduled]) -> None:
        assert sum(item.num_tokens for item in picked) <= MAX_BATCH
        assert len({item.sequence for item in picked}) == len(picked) <= MAX_RUNNING
        assert {item.sequence for item in picked} <= set(self.scheduler.running)
        assert sorted(map(id, self.loads.held)) == sorted(
            id(ref) for sequence in self.scheduler.running for ref in sequence.adapters
        )
        for item in picked:
            assert 0 < item.num_tokens <= item.sequence.num_pending
            needed = self.pool.blocks_for(item.sequence.num_computed + item.num_tokens)
            assert len(item.sequence.blocks) >= needed, "it has no room for what it computes"

    def measure(self, picked: list[Scheduled]) -> None:
        """A model with fixed times, and what each request that is ready and waits has seen others get."""
        num_decodes = sum(item.sequence.num_generated > 0 and item.num_tokens == 1 for item in picked)
        num_prompt = sum(item.num_tokens for item in picked) - num_decodes
        if picked:
            self.pace.observe(num_prompt, 0.01 + 0.002 * num_decodes + 0.005 * num_prompt)
        cost = sum(self.charge(item) for item in picked)
        served = {item.sequence for item in picked}
        flows = Counter(asked.flow for asked in self.asked.values())
        ready = {sequence for sequence in self.asked if self.loads.ready(sequence.adapters)}
        if len(ready) < len(self.asked):
            self.blocked_cost += cost
        for sequence, asked in self.asked.items():
            if sequence in served:
                asked.cost, asked.flows = 0.0, set()
            elif sequence in ready:
                asked.cost += cost
                asked.flows |= flows.keys()
                assert asked.cost <= self.longest_wait(asked, flows[asked.flow]), "it is starved"

    def charge(self, item: Scheduled) -> float:
        """What a step gives to a sequence for the first time, in virtual tokens."""
        sequence, asked = item.sequence, self.asked[item.sequence]
        reach = sequence.num_computed + item.num_tokens
        length = len(sequence.request.prompt)
        new = range(max(asked.num_charged, sequence.num_computed), reach)
        asked.num_charged = max(asked.num_charged, reach)
        return sum(PROMPT_COST if at < length else OUTPUT_COST for at in new)

    def longest_wait(self, asked: Asked, num_own: int) -> float:
        """What may be served before a request that could run gets on, in virtual tokens.

        All of its own flow that may go before it, and as much and the largest requests that run for each other flow,
        times its weight; priorities put flows two steps apart, and a flow whose adapter comes late catches up. Smaller
        ones may pass by it, the last of them with all its tokens.
        """
        largest = PROMPT_COST * LONGEST_PROMPT + OUTPUT_COST * LONGEST_ANSWER
        weights = sum(WEIGHTS.get(name, 1.0) for _, name in asked.flows)
        each = (num_own + MAX_RUNNING) * largest + 2 * PRIORITY_TOKENS
        passing = OUTPUT_COST * PASSING_TOKENS + largest
        return len(CALLERS) * weights * each + self.blocked_cost + passing

    def remove(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        del self.asked[sequence]
        assert sequence.blocks == []
        self.scheduler.check()

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()
            assert set(self.scheduler.sequences()) == set(self.asked)
            assert len(self.scheduler.waiting) + len(self.scheduler.running) == len(self.asked)
            assert sorted(map(id, self.scheduler.waiting.in_turn())) == sorted(map(id, self.scheduler.waiting))

    def teardown(self) -> None:
        """Everything comes, and everybody ends."""
        if not hasattr(self, "scheduler"):
            return
        for sequence in self.asked:
            for ref in sequence.adapters:
                ref.version.is_loaded = ref.version.is_loaded or not ref.version.is_broken
        for _ in range(200 * (1 + len(self.asked))):
            if not self.asked:
                break
            self.advance()
        assert not self.asked, "somebody waits for ever"
        assert self.pool.num_free == NUM_BLOCKS
        assert not self.loads.held


def test_any_history_keeps_the_invariants_and_starves_nobody() -> None:
    run_state_machine_as_test(
        History,
        settings=settings(
            max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
