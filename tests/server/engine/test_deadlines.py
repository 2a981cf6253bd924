"""Who is due: all that are, in order, each once, and nothing is kept of those that have ended."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from weft.server.engine.deadlines import _SPARE, Deadlines
from weft.server.engine.request import Request, Stopping
from weft.server.engine.sequence import Sequence
from weft.server.engine.text import OutputText


def make(deadline_s: float | None = None, limit_s: float | None = None) -> Sequence:
    request = Request("r", (1,), stopping=Stopping(time_limit_s=limit_s), deadline_s=deadline_s)
    return Sequence(request, (), OutputText(lambda ids: ""), random.Random(0), arrived_s=100.0)


def test_the_earlier_of_deadline_and_time_limit_counts() -> None:
    deadlines = Deadlines()
    first, second, never = make(deadline_s=140.0, limit_s=10.0), make(deadline_s=120.0, limit_s=30.0), make()
    for sequence in (first, second, never):
        deadlines.add(sequence)
    assert deadlines.next_s == 110.0
    assert deadlines.due(109.0) == []
    assert deadlines.due(125.0) == [first, second]


def test_one_that_is_due_twice_is_told_once() -> None:
    deadlines, sequence = Deadlines(), make(deadline_s=101.0, limit_s=2.0)
    deadlines.add(sequence)
    assert deadlines.due(200.0) == [sequence]
    deadlines.remove(sequence)
    assert deadlines.next_s is None


def test_those_that_ended_are_not_kept() -> None:
    deadlines = Deadlines()
    for _ in range(1000):
        sequence = make(deadline_s=1e9)
        deadlines.add(sequence)
        deadlines.remove(sequence)
        assert len(deadlines._ends) <= _SPARE
    assert deadlines.next_s is None


@given(st.lists(st.tuples(st.integers(0, 20), st.one_of(st.none(), st.integers(0, 9)), st.booleans()), max_size=200))
def test_it_is_as_looking_at_all_of_them(steps: list[tuple[int, int | None, bool]]) -> None:
    deadlines, there, now_s = Deadlines(), list[Sequence](), 100.0
    for deadline, limit, leaves in steps:
        sequence = make(100.0 + deadline if deadline else None, limit)
        deadlines.add(sequence)
        there.append(sequence)
        if leaves:
            deadlines.remove(there.pop(0))
        now_s += 0.5
        due = {other for other in there if other.ends_s and min(other.ends_s) <= now_s}
        assert set(deadlines.due(now_s)) == due
        for other in due:
            deadlines.remove(other)
            there.remove(other)
        assert deadlines.next_s == min((end_s for other in there for end_s in other.ends_s), default=None)
