"""Requests that can't meet their deadlines are refused early, with a time to come back, once the rate is known."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from harness import Answer, Harness
from tiny import make_model, save_tokenizer

from weft.errors import DeadlineExceeded, OutOfCapacity
from weft.server.engine.forecast import Forecast, certain_tokens
from weft.server.engine.pacing import Pace
from weft.server.engine.request import Request, Stopping
from weft.server.engine.sequence import Sequence
from weft.server.engine.text import OutputText

PROMPT = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("forecast")
    make_model("llama", root, num_hidden_layers=1)
    save_tokenizer(root)
    return root


class Clock:
    """A second passes with each step."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def ask(max_tokens: int = 5, deadline_s: float | None = None) -> Request:
    stopping = Stopping(max_tokens=max_tokens, ignore_eos=True)
    return Request("r", tuple(range(3, 3 + PROMPT)), stopping=stopping, deadline_s=deadline_s)


def busy(folder: Path) -> tuple[Harness, Clock, list[Answer]]:
    """One request at a time runs, 5 steps of a second each, and has for some time; ten wait."""
    harness, clock = Harness(folder, max_running_requests=1, prefix_cache=False), Clock()
    harness.engine.clock = clock
    forward = harness.engine._model.forward

    def slow(batch):
        clock.now_s += 1.0
        return forward(batch)

    harness.engine._model.forward = slow
    answers = [harness.submit(ask()) for _ in range(14)]
    while sum(answer.ended for answer in answers) < 4:
        harness.step()
    return harness, clock, answers


def test_who_will_be_late_is_told_when_to_come_back_and_nobody_else_notices(folder: Path) -> None:
    harness, clock, answers = busy(folder)
    doomed = harness.submit(replace(ask(), deadline_s=clock() + 20))
    in_time = harness.submit(replace(ask(), deadline_s=clock() + 200))
    harness.step()
    assert isinstance(doomed.error, OutOfCapacity)
    assert "200 prompt tokens that go before it; its deadline is in 20.0 s" in str(doomed.error)
    assert doomed.error.retry_after_s == pytest.approx(50 + 5 - 20, abs=10)
    harness.finish()
    assert in_time.finish is not None
    assert all(len(answer.ids) == 5 for answer in answers)


def test_one_that_waits_is_refused_as_soon_as_it_is_too_late_for_it(folder: Path) -> None:
    harness, clock, _ = busy(folder)
    request = replace(ask(max_tokens=50), deadline_s=clock() + 115)
    answer = harness.submit(request)
    harness.step()
    assert not answer.ended
    harness.engine._meter.forecast.token(1000.0)  # a step hung: who runs gets tokens more slowly now
    harness.step()
    assert isinstance(answer.error, OutOfCapacity)


def test_nothing_is_refused_before_enough_was_measured(folder: Path) -> None:
    harness, clock = Harness(folder, max_running_requests=1), Clock()
    harness.engine.clock = clock
    answers = [harness.submit(replace(ask(), deadline_s=clock() + 1)) for _ in range(20)]
    harness.step()
    assert not any(answer.ended for answer in answers)
    clock.now_s += 1
    harness.step()
    assert all(isinstance(answer.error, DeadlineExceeded) for answer in answers)


def test_an_idle_server_refuses_nobody(folder: Path) -> None:
    harness, clock, _ = busy(folder)
    harness.finish()
    answer = harness.submit(replace(ask(), deadline_s=clock() + 3))
    harness.step()
    assert not answer.ended


def make(prompt: int = 1, **stopping: object) -> Sequence:
    request = Request("r", tuple(range(prompt)), stopping=Stopping(**stopping))  # type: ignore[arg-type]
    return Sequence(request, (), OutputText(lambda ids: ""), random.Random(0), 0.0)


@pytest.mark.parametrize(
    ("stopping", "tokens"),
    [
        ({"max_tokens": 10}, 0),
        ({"max_tokens": 10, "min_tokens": 4}, 3),
        ({"max_tokens": 10, "ignore_eos": True}, 9),
        ({"max_tokens": 10, "ignore_eos": True, "stop_sequences": ("a",)}, 0),
        ({"max_tokens": 10, "ignore_eos": True, "stop_token_ids": frozenset({1}), "min_tokens": 3}, 2),
        ({"max_tokens": 10, "ignore_eos": True, "time_limit_s": 1.0}, 0),
        ({"max_tokens": 0}, 0),
    ],
)
def test_only_tokens_that_are_sure_to_come_count(stopping: dict[str, object], tokens: int) -> None:
    assert certain_tokens(make(**stopping)) == tokens


def test_the_rate_of_the_queue_fades_into_that_of_now() -> None:
    pace = Pace(0.0, 1)
    forecast = Forecast(pace)
    forecast.step(10, 0.9, 0.9)
    assert forecast.queued_token_s(0.9) is None
    forecast.step(100, 0.2, 1.1)
    assert forecast.queued_token_s(1.1) == pytest.approx(0.01, rel=0.1)
    for i in range(300):
        forecast.step(1, 1.0, 2.1 + i)
    assert forecast.queued_token_s(301.1) == pytest.approx(1.0, rel=0.1)


def test_a_rate_that_was_measured_long_ago_is_not_known() -> None:
    forecast = Forecast(Pace(0.0, 1))
    for i in range(100):
        forecast.step(10, 1.0, float(i))
    assert forecast.queued_token_s(110.0) == pytest.approx(0.1)
    assert forecast.queued_token_s(300.0) is None
    forecast.step(10, 2.0, 302.0)
    assert forecast.queued_token_s(302.0) == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("idle_s", [0.0, 3600.0])
def test_nobody_waits_for_others_where_all_may_begin_at_once(folder: Path, idle_s: float) -> None:
    harness, clock, _ = busy(folder)
    harness.finish()
    clock.now_s += idle_s
    harness.engine._scheduler._max_running = 8
    harness.submit(ask(max_tokens=50))
    harness.step()
    answers = [harness.submit(ask(deadline_s=clock() + 12)) for _ in range(7)]
    harness.finish()
    assert [len(answer.ids) for answer in answers] == [5] * 7


def test_who_was_preempted_is_not_refused_and_counts_for_those_behind(folder: Path) -> None:
    harness, clock, _ = busy(folder)
    request = ask(max_tokens=100, deadline_s=clock() + 1000)
    answer = harness.submit(request)
    while not answer.ids:
        harness.step()
    scheduler = harness.engine._scheduler
    (sequence,) = scheduler.running
    scheduler._preempt(sequence)
    sequence.request = replace(request, deadline_s=clock() + 20)  # it has no chance any more
    behind = make(PROMPT, max_tokens=1)
    behind.request = replace(behind.request, deadline_s=clock() + 4)
    scheduler.waiting.append(behind)
    late = harness.engine._meter.forecast.late(
        scheduler.waiting, scheduler.num_cached, clock() + 1, is_idle=False, is_full=True
    )
    assert [other for other, _ in late] == [behind]
    assert f"after {sequence.num_pending} prompt tokens" in str(late[0][1])


def test_a_finish_is_the_queue_ahead_the_own_prompt_and_the_answer() -> None:
    pace = Pace(0.0, 1)
    forecast = Forecast(pace)
    forecast.step(100, 10.0, 10.0)
    sequence = make(50, max_tokens=11, ignore_eos=True)
    assert forecast.finish_s(sequence, 1000, 10.0) is None
    forecast.token(0.5)
    pace.observe(100, 1.0)
    assert forecast.finish_s(sequence, 1000, 10.0) == pytest.approx(1000 * 0.1 + 50 * 0.01 + 10 * 0.5)
    assert forecast.finish_s(sequence, 1000, 10.0, num_cached=30) == pytest.approx(1000 * 0.1 + 20 * 0.01 + 10 * 0.5)
