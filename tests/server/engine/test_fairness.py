"""Whose turn it is: even shares by caller, weighted ones by adapter, priorities with an end, and bounded memory."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.server.engine.fairness import MAX_IDLE, OUTPUT_COST, PRIORITY_TOKENS, PROMPT_COST, FairQueue
from weft.server.engine.request import Request
from weft.server.engine.sequence import Sequence
from weft.server.engine.text import OutputText


class Ref:
    """An adapter by name alone."""

    def __init__(self, name: str) -> None:
        self.name = name


def make(adapter: str = "", prompt: int = 10, caller: str = "", priority: int = 0) -> Sequence:
    request = Request("r", tuple(range(prompt)), caller=caller, priority=priority)
    adapters = tuple(Ref(name) for name in adapter.split("+") if name)
    return Sequence(request, adapters, OutputText(lambda ids: ""), random.Random(0), 0.0)  # type: ignore[arg-type]


def fill(queue: FairQueue, *sequences: Sequence) -> None:
    for sequence in sequences:
        queue.append(sequence)


def serve(queue: FairQueue) -> Sequence:
    """The next one, its prompt computed at once; it ends without an answer."""
    sequence = next(queue.in_turn())
    queue.remove(sequence)
    queue.charge(sequence, sequence.num_pending)
    queue.leave(sequence)
    queue.check()
    return sequence


def served(queue: FairQueue, count: int) -> list[str]:
    """Callers and adapters of the next ones, in order."""
    return [f"{s.request.caller}/{s.adapter_label}" for s in (serve(queue) for _ in range(count))]


def test_requests_to_one_adapter_go_in_order_of_arrival() -> None:
    queue = FairQueue()
    waiting = [make(prompt=1 + i % 7) for i in range(20)]
    fill(queue, *waiting)
    assert list(queue.in_turn()) == waiting
    assert [serve(queue) for _ in waiting] == waiting
    assert len(queue) == 0


def test_adapters_take_turns_however_many_requests_each_has() -> None:
    queue = FairQueue()
    fill(queue, *(make("hot") for _ in range(50)), make("cold"), make("cold"), make())
    assert served(queue, 6) == ["/hot", "/cold", "/", "/hot", "/cold", "/hot"]


def test_shares_are_counted_in_tokens_not_in_requests() -> None:
    queue = FairQueue()
    fill(queue, *(make("long", 100) for _ in range(50)), *(make("short", 10) for _ in range(50)))
    assert Counter(served(queue, 44)) == {"/long": 4, "/short": 40}


def test_callers_share_evenly_before_their_adapters_do() -> None:
    queue = FairQueue()
    fill(queue, *(make(f"a{i}", caller="many") for i in range(10) for _ in range(10)))
    fill(queue, *(make("b", caller="few") for _ in range(10)))
    order = served(queue, 20)
    assert Counter(name.split("/")[0] for name in order) == {"many": 10, "few": 10}
    assert Counter(order)["many/a0"] == 1


def test_an_adapter_of_weight_three_gets_three_times_the_tokens() -> None:
    queue = FairQueue({"gold": 3.0})
    fill(queue, *(make(name) for _ in range(50) for name in ("gold", "plain", "gold+plain")))
    assert Counter(served(queue, 50)) == {"/gold": 30, "/plain": 10, "/gold+plain": 10}


def test_generated_tokens_count_twice_and_nothing_counts_again() -> None:
    queue = FairQueue()
    one, other = make("one"), make("other", 10)
    fill(queue, one, other)
    flow = queue._places[one].flow
    queue.remove(one)
    one.num_computed = 4  # found in a cache
    queue.charge(one, 6)
    assert flow.served == 6 * PROMPT_COST
    one.num_computed = 10
    one.tokens += [1, 2]
    queue.charge(one, 1)
    assert flow.served == 6 * PROMPT_COST + 2 * OUTPUT_COST
    one.num_computed = 0  # it gave up its blocks
    queue.put_back(one)
    assert next(queue.in_turn()) is other
    queue.remove(one)
    queue.charge(one, 12)
    assert flow.served == 6 * PROMPT_COST + 2 * OUTPUT_COST
    one.tokens.append(3)
    queue.leave(one)
    assert flow.served == 6 * PROMPT_COST + 3 * OUTPUT_COST
    queue.check()


def test_who_comes_back_has_saved_up_nothing() -> None:
    queue = FairQueue()
    fill(queue, *(make("busy") for _ in range(100)))
    served(queue, 50)
    fill(queue, *(make("new") for _ in range(20)))
    assert Counter(served(queue, 20)) == {"/busy": 10, "/new": 10}


def test_who_was_ahead_is_remembered_while_others_are_busy() -> None:
    queue = FairQueue()
    fill(queue, *(make("other", 10) for _ in range(100)), make("hot", 200))
    assert "/hot" in served(queue, 2)
    fill(queue, make("hot"))
    assert "/hot" not in served(queue, 15)
    assert "/hot" in served(queue, 6)


def test_an_idle_queue_remembers_nobody() -> None:
    queue = FairQueue()
    for i in range(100):
        fill(queue, make(f"a{i}", caller=f"c{i}"))
        serve(queue)
    assert queue._callers.num_known == 0


def test_memory_is_bounded_however_many_come_and_go() -> None:
    queue = FairQueue()
    waiting = make("patient", caller="patient")
    fill(queue, waiting)
    for i in range(3 * MAX_IDLE):
        passing = make(f"a{i}", caller=f"c{i}")
        fill(queue, passing)
        queue.remove(passing)
        queue.charge(passing, 10)
        queue.leave(passing)
        assert queue._callers.num_known <= MAX_IDLE + 1
    assert list(queue) == [waiting]


def run(queue: FairQueue, sequence: Sequence, num_tokens: int) -> Sequence:
    """It leaves the queue, and so many tokens of it are computed."""
    queue.remove(sequence)
    queue.charge(sequence, num_tokens)
    queue.check()
    return sequence


@pytest.mark.parametrize("by", ["adapter", "caller"])
def test_one_that_merely_runs_gives_newcomers_no_lead_over_who_is_busy(by: str) -> None:
    queue = FairQueue()
    fill(queue, runs := make(**{by: "runs"}), *(make(**{by: "busy"}) for _ in range(100)))
    run(queue, runs, 1)
    served(queue, 50)
    fill(queue, *(make(**{by: "new"}) for _ in range(20)))
    assert set(Counter(served(queue, 20)).values()) == {10}


@pytest.mark.parametrize("by", ["adapter", "caller"])
def test_one_whose_adapter_is_not_there_gives_newcomers_no_lead_over_who_is_busy(by: str) -> None:
    queue = FairQueue()
    fill(queue, *(make(**{by: "busy"}) for _ in range(100)), waits := make(**{by: "waits"}))
    for _ in range(50):
        sequence = next(sequence for sequence in queue.in_turn() if sequence is not waits)
        queue.leave(run(queue, sequence, 10))
    queue.hold_up([waits])
    fill(queue, *(make(**{by: "new"}) for _ in range(20)))
    queue.hold_up([])
    assert serve(queue) is waits, "it has lost nothing"
    assert set(Counter(served(queue, 20)).values()) == {10}


@pytest.mark.parametrize("by", ["adapter", "caller"])
def test_where_nobody_waits_a_newcomer_begins_beside_who_left_the_queue_last(by: str) -> None:
    queue = FairQueue()
    fill(queue, old := make(**{by: "old"}))
    run(queue, old, 1)
    for _ in range(5):
        fill(queue, last := make(**{by: "busy"}, prompt=100))
        run(queue, last, 100)
    fill(queue, *(make(**{by: name}) for _ in range(20) for name in ("new", "busy")))
    assert set(Counter(served(queue, 20)).values()) == {10}


def test_who_ran_alone_has_saved_up_nothing_for_its_next_request() -> None:
    queue = FairQueue()
    fill(queue, long := make("long"), *(make("busy") for _ in range(100)))
    run(queue, long, 1)
    served(queue, 50)
    fill(queue, *(make("long") for _ in range(20)))
    assert Counter(served(queue, 20)) == {"/busy": 10, "/long": 10}


def test_a_preempted_request_is_the_first_of_its_flow_but_not_of_others() -> None:
    queue = FairQueue()
    first, second, third, other = make("a"), make("a"), make("a"), make("b")
    fill(queue, first, second, third, other)
    for sequence in (first, second):
        queue.remove(sequence)
        queue.charge(sequence, 10)
    queue.put_back(second)
    queue.put_back(first)
    assert list(queue.in_turn()) == [other, first, second, third]


def test_a_preempted_request_keeps_its_priority() -> None:
    queue = FairQueue()
    low, other = make("a", priority=-5), make("b")
    fill(queue, low)
    run(queue, low, 10)
    fill(queue, other, urgent := make("a", priority=1))
    queue.put_back(low)
    assert list(queue.in_turn()) == [urgent, other, low]


def test_a_preempted_request_goes_before_those_that_came_later() -> None:
    queue = FairQueue()
    fill(queue, first := make())
    run(queue, first, 10)
    tokens = 0
    fill(queue, make(priority=1))
    queue.put_back(first)
    while (sequence := serve(queue)) is not first:
        tokens += len(sequence.request.prompt)
        fill(queue, make(), make(priority=1))
    assert tokens <= PRIORITY_TOKENS + 20


def test_a_flow_stands_where_its_highest_priority_puts_it() -> None:
    queue = FairQueue()
    fill(queue, low := make("a", priority=-1))
    for _ in range(100):  # so much that one of a higher priority does not pass the first by
        fill(queue, sequence := make("a", priority=5))
        run(queue, sequence, 100)
        queue.leave(sequence)
    fill(queue, urgent := make("a", priority=5))
    fill(queue, other := make("b"))
    assert list(queue.in_turn()) == [low, urgent, other]


def test_a_priority_is_a_head_start_among_the_requests_of_one_caller() -> None:
    queue = FairQueue()
    fill(queue, plain := make(), urgent := make(priority=1), adapter := make("a", priority=2))
    assert [serve(queue) for _ in range(3)] == [adapter, urgent, plain]


def test_a_priority_gains_nothing_over_another_caller() -> None:
    queue = FairQueue()
    fill(queue, *(make(caller="loud", priority=100) for _ in range(20)), *(make(caller="calm") for _ in range(20)))
    assert Counter(served(queue, 20)) == {"loud/": 10, "calm/": 10}


@pytest.mark.parametrize("adapter", ["", "other"])
def test_high_priorities_hold_up_a_low_one_for_so_many_tokens_only(adapter: str) -> None:
    queue = FairQueue()
    patient, tokens = make(adapter), 0
    fill(queue, patient, make(priority=3))
    while (sequence := serve(queue)) is not patient:
        tokens += len(sequence.request.prompt)
        fill(queue, make(priority=3))
    assert 3 * PRIORITY_TOKENS <= tokens <= 3 * PRIORITY_TOKENS + 20


def test_a_forecast_is_what_happens_when_every_prompt_fits() -> None:
    rng = random.Random(1)
    queue = FairQueue({"a": 2.0})
    names = ["", "a", "b", "a+b"]
    fill(queue, *(make(rng.choice(names), rng.randint(1, 50), rng.choice("xy"), rng.randint(0, 1)) for _ in range(80)))
    expected = list(queue.forecast())
    assert list(queue.forecast()) == expected
    order = []
    for _ in range(80):  # they stay, so that nobody is lifted
        sequence = next(queue.in_turn())
        queue.remove(sequence)
        queue.charge(sequence, sequence.num_pending)
        order.append(sequence)
    assert order == expected


def test_one_that_is_passed_by_stays_and_the_next_comes() -> None:
    queue = FairQueue()
    waiting = [make(name) for name in ("a", "b", "a", "c")]
    fill(queue, *waiting)
    assert list(queue.in_turn()) == waiting
    taken = []
    for sequence in queue.in_turn():
        if sequence.adapter_label != "a":
            queue.remove(sequence)
            queue.charge(sequence, 10)
            taken.append(sequence)
    assert taken == [waiting[1], waiting[3]]
    assert list(queue.in_turn()) == [waiting[0], waiting[2]]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["x", "y"]), st.sampled_from(["", "a", "b", "c"]), st.integers(1, 40)),
        min_size=30,
        max_size=120,
    ),
    st.randoms(use_true_random=False),
)
def test_backlogged_flows_are_never_further_apart_than_the_largest_request(
    requests: list[tuple[str, str, int]], rng: random.Random
) -> None:
    """Theorem 4.4 of the paper for requests that are served at once: the bound is the largest one of either."""
    queue = FairQueue()
    fill(queue, *(make(adapter, prompt, caller) for caller, adapter, prompt in requests))
    left = Counter((caller, adapter) for caller, adapter, _ in requests)
    got: Counter[tuple[str, str]] = Counter()
    while len(queue):
        sequence = next(queue.in_turn())
        queue.remove(sequence)
        queue.charge(sequence, sequence.num_pending)
        flow = (sequence.request.caller, sequence.adapter_label)
        left[flow] -= 1
        got[flow] += len(sequence.request.prompt)
        for caller in "xy":
            backlogged = [got[caller, name] for name in ("", "a", "b", "c") if left[caller, name]]
            assert not backlogged or max(backlogged) - min(backlogged) <= 40
        by_caller = [
            sum(got[caller, name] for name in ("", "a", "b", "c"))
            for caller in "xy"
            if any(left[caller, name] for name in ("", "a", "b", "c"))
        ]
        assert not by_caller or max(by_caller) - min(by_caller) <= 40
        if rng.random() < 0.2:
            queue.check()
