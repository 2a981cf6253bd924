"""Who waits for a turn longer than requests may is told so; who waits for an adapter, or has begun, is not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from harness import Harness
from tiny import make_model, save_tokenizer

from weft.errors import OutOfCapacity
from weft.server.engine.patience import SHORTEST_RETRY_S, Patience
from weft.server.engine.request import Request, Stopping
from weft.server.engine.sequence import Sequence
from weft.server.engine.text import OutputText


def make(arrived_s: float) -> Sequence:
    return Sequence(Request("r", (1,)), (), OutputText(lambda ids: ""), random.Random(0), arrived_s=arrived_s)


def test_those_that_waited_longest_are_told_first_and_only_those_that_waited_too_long() -> None:
    patience, sequences = Patience(2.0), [make(float(second)) for second in range(5)]
    for sequence in sequences:
        patience.add(sequence)
    patience.remove(sequences[1])
    assert [sequence for sequence, _ in patience.over(4.5)] == [sequences[0], sequences[2]]
    (_, error), *_ = patience.over(4.5)
    assert "has not come in 4.5 s; 2 s is as long as requests may wait" in str(error)
    assert error.retry_after_s == 4.5
    assert patience.over(2.0) == []


def test_without_a_bound_nobody_is_told_and_nothing_is_kept() -> None:
    patience = Patience(0.0)
    patience.add(make(0.0))
    assert patience.over(1e9) == []
    assert not patience._waiting


def test_one_may_come_back_no_sooner_than_after_a_moment() -> None:
    patience = Patience(0.001)
    patience.add(make(0.0))
    ((_, error),) = patience.over(0.002)
    assert error.retry_after_s == SHORTEST_RETRY_S


class Clock:
    """Moves by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    make_model("llama", tmp_path, num_hidden_layers=1)
    save_tokenizer(tmp_path)
    harness = Harness(tmp_path, max_running_requests=1)
    harness.engine.clock, harness.engine._patience = Clock(), Patience(2.0)
    return harness


def ask(start: int) -> Request:
    return Request("r", (start, start + 1), stopping=Stopping(max_tokens=4, ignore_eos=True))


def test_where_there_is_no_room_who_waited_too_long_is_refused_and_who_runs_goes_on(harness: Harness) -> None:
    running, waiting = harness.submit(ask(3)), harness.submit(ask(5))
    harness.step()
    harness.engine.clock.now_s += 3.0
    late = harness.submit(ask(7))
    harness.finish()
    assert isinstance(waiting.error, OutOfCapacity)
    assert [len(answer.tokens) for answer in (running, late)] == [4, 4]
    harness.engine.check_pools()


def test_where_there_is_room_nobody_is_refused(harness: Harness) -> None:
    early = harness.submit(ask(3))
    harness.engine.clock.now_s += 3.0
    harness.finish()
    assert len(early.tokens) == 4
