"""The scheduler alone, with a model that gives any token: budgets kept, nobody lost, nobody waits for ever."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from weft.server.engine.kv_blocks import BlockPool
from weft.server.engine.pacing import Pace
from weft.server.engine.prefix_cache import PrefixCache
from weft.server.engine.request import Request, Stopping
from weft.server.engine.scheduler import Scheduler
from weft.server.engine.sequence import Sequence
from weft.server.engine.text import OutputText

BLOCK = 4


def make(prompt: int, priority: int = 0, caller: str = "", first: int = 0, max_tokens: int = 256) -> Sequence:
    stopping = Stopping(max_tokens=max_tokens)
    request = Request("r", tuple(range(first, first + prompt)), priority=priority, caller=caller, stopping=stopping)
    return Sequence(request, (), OutputText(lambda ids: ""), random.Random(0), 0.0)


def advance(scheduler: Scheduler) -> list[tuple[Sequence, int]]:
    """One step of a model that gives token 7 to every sequence that is complete."""
    picked = scheduler.schedule()
    scheduler.check()
    complete = [item.sequence for item in picked if item.completes]
    for item in picked:
        item.sequence.num_computed += item.num_tokens
        scheduler.prefixes.publish(item.sequence)
    for sequence in complete:
        sequence.tokens.append(7)
    scheduler.check()
    return [(item.sequence, item.num_tokens) for item in picked]


def test_decodes_come_before_prompts_and_prompts_share_what_is_left() -> None:
    scheduler = Scheduler(BlockPool(100, BLOCK), max_batch_tokens=8, max_running=4)
    one, two, three = make(2), make(11), make(5)
    scheduler.add(one)
    assert advance(scheduler) == [(one, 2)]
    scheduler.add(two)
    scheduler.add(three)
    assert advance(scheduler) == [(one, 1), (two, 7)]
    assert advance(scheduler) == [(one, 1), (two, 4), (three, 3)]
    assert advance(scheduler) == [(one, 1), (two, 1), (three, 2)]
    assert advance(scheduler) == [(one, 1), (two, 1), (three, 1)]


def test_no_more_than_max_running_are_admitted() -> None:
    scheduler = Scheduler(BlockPool(100, BLOCK), max_batch_tokens=8, max_running=2)
    for _ in range(3):
        scheduler.add(make(1))
    assert len(advance(scheduler)) == 2
    scheduler.remove(scheduler.running[0])
    assert len(advance(scheduler)) == 2


def test_the_youngest_gives_way_when_blocks_run_out_and_comes_back_with_its_tokens() -> None:
    scheduler = Scheduler(BlockPool(1 + 4, BLOCK), max_batch_tokens=32, max_running=4)
    old, young = make(7), make(7)
    scheduler.add(old)
    scheduler.add(young)
    for _ in range(2):
        advance(scheduler)
    assert advance(scheduler) == [(old, 1)]
    assert scheduler.num_preemptions == 1
    assert list(scheduler.waiting) == [young]
    assert (young.num_computed, young.blocks, len(young.tokens)) == (0, [], 9)
    scheduler.remove(old)
    assert advance(scheduler) == [(young, 9)]


def test_a_low_priority_gives_way_before_a_young_one() -> None:
    scheduler = Scheduler(BlockPool(1 + 6, BLOCK), max_batch_tokens=32, max_running=4)
    low, old, young = make(7, priority=-1), make(7), make(7, priority=1)
    for sequence in (low, old, young):
        scheduler.add(sequence)
    for _ in range(2):
        advance(scheduler)
    assert advance(scheduler) == [(young, 1), (old, 1)]
    assert list(scheduler.waiting) == [low]


def test_a_priority_is_worth_nothing_against_another_caller() -> None:
    scheduler = Scheduler(BlockPool(1 + 4, BLOCK), max_batch_tokens=32, max_running=4)
    old, young = make(7, caller="a"), make(7, priority=100, caller="b")
    scheduler.add(old)
    scheduler.add(young)
    for _ in range(3):
        advance(scheduler)
    assert list(scheduler.waiting) == [young]


def test_a_low_priority_does_not_give_way_for_ever() -> None:
    scheduler = Scheduler(BlockPool(1 + 9, BLOCK), max_batch_tokens=4, max_running=3)
    low, rivals = make(20, priority=-1), [make(3, priority=1) for _ in range(2)]
    for sequence in (*rivals, low):
        scheduler.add(sequence)
    for _ in range(400):
        advance(scheduler)
        for rival in [rival for rival in rivals if rival.num_generated >= 12]:
            scheduler.remove(rival)
            rivals.remove(rival)
            rivals.append(make(3, priority=1))
            scheduler.add(rivals[-1])
        if low.num_generated >= 10:
            return
    raise AssertionError("it starved")


def test_what_a_preempted_sequence_published_is_not_computed_again() -> None:
    scheduler = Scheduler(BlockPool(1 + 4, BLOCK), max_batch_tokens=32, max_running=4, prefix_cache=True)
    old, young = make(7), make(6, priority=-1)
    scheduler.add(old)
    advance(scheduler)
    scheduler.add(young)
    assert advance(scheduler) == [(old, 1), (young, 2)], "both begin alike"
    while young in scheduler.running:
        advance(scheduler)
    assert (scheduler.num_preemptions, len(young.tokens)) == (1, 9)
    for needed in range(2):
        while needed and len(old.tokens) < 14:  # so that the old one needs another block
            advance(scheduler)
        assert len(scheduler.prefixes.hits(young)) == 2 - needed
    scheduler.remove(old)
    assert advance(scheduler) == [(young, 9 - BLOCK)]


def test_those_that_begin_alike_wait_for_the_first_if_that_saves_them_half() -> None:
    scheduler = Scheduler(BlockPool(100, BLOCK), max_batch_tokens=16, max_running=8, prefix_cache=True)
    first, same, longer, other = make(21), make(21), make(60), make(3)
    for sequence in (first, same, longer, other):
        scheduler.add(sequence)
    assert advance(scheduler) == [(first, 16)]
    assert advance(scheduler) == [(first, 5), (longer, 11)], "it has most to compute by itself"
    assert advance(scheduler) == [(first, 1), (longer, 15)]
    assert advance(scheduler)[2:] == []
    scheduler.remove(longer)
    assert advance(scheduler) == [(first, 1), (same, 1), (other, 3)]


def test_the_one_that_computes_goes_on_in_the_turn_of_who_waits_for_it() -> None:
    scheduler = Scheduler(BlockPool(100, BLOCK), max_batch_tokens=10, max_running=8, prefix_cache=True)
    hot = make(60, caller="hot")
    scheduler.add(hot)
    advance(scheduler)
    for sequence in (waits := make(60, caller="one"), other := make(60, caller="two", first=100)):
        scheduler.add(sequence)
    while not waits.num_generated:
        advance(scheduler)
    assert waits.num_cached == 56
    assert other.num_computed <= 20


def test_a_turn_is_lent_only_while_what_both_need_is_computed() -> None:
    scheduler = Scheduler(BlockPool(200, BLOCK), max_batch_tokens=10, max_running=8, prefix_cache=True)
    scheduler.add(long := make(400, caller="long"))
    advance(scheduler)
    scheduler.add(other := make(100, caller="other", first=1000))
    scheduler.add(short := make(37, caller="short"))
    while not short.num_generated:
        advance(scheduler)
    assert short.num_cached == 36
    assert long.num_computed <= 50, "little more of the long one than it needed"
    while not other.num_generated:
        advance(scheduler)
    assert long.num_computed <= 120, "it takes turns with the other one"


def test_who_waits_lets_all_be_computed_that_both_need() -> None:
    """Although what is left of it is less and less beside its own."""
    scheduler = Scheduler(BlockPool(200, BLOCK), max_batch_tokens=8, max_running=8, prefix_cache=True)
    first, own = make(400), tuple(range(1000, 1030))
    scheduler.add(first)
    request = replace(first.request, prompt=(*range(48), *own), caller="another")
    second = Sequence(request, (), first.text, random.Random(0), 0.0)
    scheduler.add(second)
    while not second.blocks:
        advance(scheduler)
    assert second.num_cached == 48
    assert first.num_computed <= 56


def test_an_audit_and_an_end_need_no_look_up_before_them() -> None:
    pool = BlockPool(100, BLOCK)
    prefixes, sequence = PrefixCache(pool, enabled=True), make(9)
    prefixes.begin(sequence)
    sequence.block_keys.clear()
    sequence.blocks = pool.allocate(3)
    prefixes.check([sequence])
    assert prefixes.comes_from(make(9)) is sequence
    sequence.block_keys.clear()
    prefixes.end(sequence)
    assert prefixes.comes_from(make(9)) is None
    prefixes.check([])


def test_when_the_one_that_computes_ends_early_the_next_computes() -> None:
    scheduler = Scheduler(BlockPool(100, BLOCK), max_batch_tokens=16, max_running=8, prefix_cache=True)
    first, second, third = make(40), make(40), make(40)
    for sequence in (first, second, third):
        scheduler.add(sequence)
    assert advance(scheduler) == [(first, 16)]
    scheduler.remove(first)
    assert advance(scheduler) == [(second, 16)], "after those that the first had published"
    assert advance(scheduler) == [(second, 8)]
    assert advance(scheduler) == [(second, 1), (third, 4)]


def test_a_prompt_waits_for_blocks_without_taking_any_from_a_running_sequence() -> None:
    scheduler = Scheduler(BlockPool(1 + 3, BLOCK), max_batch_tokens=32, max_running=4)
    running, waiting = make(8), make(8)
    scheduler.add(running)
    advance(scheduler)
    scheduler.add(waiting)
    assert advance(scheduler) == [(running, 1)]
    assert waiting.blocks == []


@settings(max_examples=1000, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 20), st.integers(1, 12), st.integers(0, 1)),
        min_size=1,
        max_size=14,
    ),
    cancels=st.sets(st.integers(0, 13), max_size=4),
    blocks=st.integers(8, 20),
    budget=st.integers(4, 24),
    prefix_cache=st.booleans(),
)
def test_every_history_keeps_the_budgets_and_serves_everybody(
    arrivals: list[tuple[int, int, int, int]], cancels: set[int], blocks: int, budget: int, prefix_cache: bool
) -> None:
    scheduler = Scheduler(
        BlockPool(1 + blocks, BLOCK), max_batch_tokens=budget, max_running=4, prefix_cache=prefix_cache
    )
    sequences = {i: make(prompt, priority) for i, (_, prompt, _, priority) in enumerate(arrivals)}
    wanted = {i: tokens for i, (_, _, tokens, _) in enumerate(arrivals)}
    alive: set[int] = set()
    for at in range(2000):
        arrived = {i for i, (step, *_) in enumerate(arrivals) if step == at}
        for i in arrived:
            scheduler.add(sequences[i])
        alive |= arrived
        for i in cancels & alive if at % 7 == 3 else set():
            scheduler.remove(sequences[i])
            alive.discard(i)
        picked = advance(scheduler)
        assert sum(count for _, count in picked) <= budget
        assert len({id(sequence) for sequence, _ in picked}) == len(picked) <= 4
        assert bool(picked) == bool(alive), "a step with work does some"
        for i in [i for i in alive if sequences[i].num_generated >= wanted[i]]:
            scheduler.remove(sequences[i])
            alive.discard(i)
        if not alive and at > 30:
            break
    assert not alive, "somebody waits for ever"
    assert scheduler.pool.num_free == blocks


class Ref:
    """An adapter by name alone."""

    def __init__(self, name: str) -> None:
        self.name = name


def make_for(adapter: str, prompt: int, max_tokens: int = 100) -> Sequence:
    request = Request("r", tuple(range(prompt)), stopping=Stopping(max_tokens=max_tokens))
    return Sequence(request, (Ref(adapter),), OutputText(lambda ids: ""), random.Random(0), 0.0)  # type: ignore[arg-type]


def test_a_prompt_that_has_begun_gives_way_to_one_whose_turn_it_is() -> None:
    scheduler = Scheduler(BlockPool(100, BLOCK), max_batch_tokens=8, max_running=4)
    long, short = make_for("long", 40), make_for("short", 6)
    scheduler.add(long)
    assert advance(scheduler) == [(long, 8)]
    assert advance(scheduler) == [(long, 8)]
    scheduler.add(short)
    scheduler.add(make_for("short", 6))
    assert advance(scheduler) == [(long, 8)], "both have been served as much: who came first goes first"
    assert advance(scheduler)[0] == (short, 6)


def test_a_full_server_gives_a_place_to_who_has_none_but_not_to_who_has_most() -> None:
    scheduler = Scheduler(BlockPool(100, BLOCK), max_batch_tokens=32, max_running=4)
    hot = [make_for("hot", 2) for _ in range(6)]
    for sequence in hot:
        scheduler.add(sequence)
    for _ in range(10):
        advance(scheduler)
    assert scheduler.running == hot[:4]
    assert scheduler.num_preemptions == 0
    cold = make_for("cold", 2)
    scheduler.add(cold)
    for _ in range(3):
        advance(scheduler)
    assert scheduler.running == [*hot[:3], cold]
    assert next(s for s in scheduler.waiting.in_turn() if s.adapter_label == "hot") is hot[3]
    assert len(hot[3].tokens) > 2, "its tokens stay"


def test_nobody_loses_a_place_that_comes_free_soon() -> None:
    scheduler = Scheduler(BlockPool(100, BLOCK), max_batch_tokens=32, max_running=2)
    hot = [make_for("hot", 2, max_tokens=12) for _ in range(2)]
    for sequence in hot:
        scheduler.add(sequence)
    for _ in range(9):
        advance(scheduler)
    scheduler.add(make_for("cold", 2))
    for _ in range(3):
        advance(scheduler)
    assert scheduler.num_preemptions == 0


def crowded() -> tuple[Scheduler, list[Sequence]]:
    """100 blocks, and eight requests of one caller that run."""
    scheduler = Scheduler(BlockPool(1 + 100, BLOCK), max_batch_tokens=64, max_running=16)
    hot = [make(20, caller="hot") for _ in range(8)]
    for sequence in hot:
        scheduler.add(sequence)
    for _ in range(5):
        advance(scheduler)
    return scheduler, hot


def test_nobody_gives_way_to_one_that_would_not_fit_even_then() -> None:
    scheduler, hot = crowded()
    scheduler.add(make(95 * BLOCK, caller="big"))
    for _ in range(5):
        advance(scheduler)
    assert scheduler.running == hot
    assert scheduler.num_preemptions == 0


def test_as_many_give_way_at_once_as_one_needs_to_fit() -> None:
    scheduler, hot = crowded()
    big = make(70 * BLOCK, caller="big")
    scheduler.add(big)
    for _ in range(2):
        advance(scheduler)
    assert scheduler.running == [*hot[:4], big]
    assert scheduler.num_preemptions == 4


def past_a_large_one(passing_tokens: int) -> tuple[Scheduler, Sequence, list[Sequence]]:
    """One long answer, a prompt that fits only when it has ended, and small ones behind that, after some steps."""
    scheduler = Scheduler(BlockPool(1 + 100, BLOCK), max_batch_tokens=64, max_running=16, passing_tokens=passing_tokens)
    scheduler.add(make(8, caller="long"))
    advance(scheduler)
    large, small = make(99 * BLOCK, caller="large"), [make(8, caller=f"{i}", max_tokens=12) for i in range(10)]
    for sequence in (large, *small):
        scheduler.add(sequence)
    for _ in range(5):
        advance(scheduler)
    return scheduler, large, small


def test_small_ones_pass_by_one_that_finds_too_few_blocks() -> None:
    scheduler, large, small = past_a_large_one(1000)
    assert large in scheduler.waiting
    assert all(sequence.num_generated for sequence in small)
    assert scheduler.num_preemptions == 0


def test_no_more_tokens_pass_by_than_are_allowed_and_then_all_wait() -> None:
    scheduler, large, small = past_a_large_one(50)
    assert [sequence in scheduler.running for sequence in small] == [True] * 3 + [False] * 7
    for sequence in tuple(scheduler.running):
        scheduler.remove(sequence)
    assert advance(scheduler) == [(large, 64)]


def test_who_passes_by_must_find_all_blocks_that_it_may_come_to_need() -> None:
    scheduler, large, _ = past_a_large_one(10_000)
    hungry = make(8, caller="hungry", max_tokens=99 * BLOCK)
    scheduler.add(hungry)
    advance(scheduler)
    assert set(scheduler.waiting) == {large, hungry}


def test_a_large_one_is_served_however_many_small_ones_come() -> None:
    scheduler = Scheduler(BlockPool(1 + 20, BLOCK), max_batch_tokens=64, max_running=8, passing_tokens=200)
    large = make(19 * BLOCK, caller="large")
    for at in range(400):
        scheduler.add(make(8, caller=f"{at}", max_tokens=6))
        if at == 10:
            scheduler.add(large)
        advance(scheduler)
        for sequence in [s for s in scheduler.running if s.num_generated >= 6]:
            scheduler.remove(sequence)
        if large.num_generated:
            return
    raise AssertionError("it starved")


def test_chunks_beside_decodes_are_cut_to_the_time_of_a_step() -> None:
    pace = Pace(target_s=0.1, floor_tokens=2)
    scheduler = Scheduler(BlockPool(100, BLOCK), max_batch_tokens=64, max_running=4, pace=pace)
    one, long = make(2), make(60)
    scheduler.add(one)
    advance(scheduler)
    pace.observe(0, 0.02)
    pace.observe(16, 0.18)
    scheduler.add(long)
    assert advance(scheduler) == [(one, 1), (long, 8)]
    scheduler.remove(one)
    assert advance(scheduler) == [(long, 52)], "nobody decodes beside it"
