"""Quotas on a clock that stands still unless it is moved."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from weft.errors import QuotaExceeded
from weft.server.api.access import quotas
from weft.server.api.access.quotas import Limits, Quota, Quotas


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Counted(list[str]):
    """The limits that refused, in order."""


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def counted() -> Counted:
    return Counted()


def quota(clock: Clock, counted: Counted, limits: Limits) -> Quota:
    return Quotas(clock, counted.append).of("team-a", limits)


def ask(quota: Quota) -> None:
    with quota.running():
        pass


def test_without_limits_everything_is_allowed(clock: Clock, counted: Counted) -> None:
    free = quota(clock, counted, Limits())
    for _ in range(1000):
        ask(free)
        free.check_tokens()
        free.spend(1_000_000)
    assert counted == []


def test_a_minutes_requests_may_come_at_once_and_then_evenly(clock: Clock, counted: Counted) -> None:
    limited = quota(clock, counted, Limits(requests_per_minute=3))
    for _ in range(3):
        ask(limited)
    with pytest.raises(QuotaExceeded, match="'team-a' is used up: at most 3 requests a minute") as refused:
        ask(limited)
    assert refused.value.retry_after_s == pytest.approx(20)
    assert counted == ["requests_per_minute"]
    clock.now_s += refused.value.retry_after_s
    ask(limited)
    with pytest.raises(QuotaExceeded):
        ask(limited)
    clock.now_s += 3600
    for _ in range(3):
        ask(limited)
    with pytest.raises(QuotaExceeded):
        ask(limited)


def test_requests_at_once_are_counted_until_they_end(clock: Clock, counted: Counted) -> None:
    limited = quota(clock, counted, Limits(max_in_flight=2))
    with ExitStack() as running:
        running.enter_context(limited.running())
        running.enter_context(limited.running())
        with pytest.raises(QuotaExceeded, match="at most 2 requests at once") as refused:
            ask(limited)
        assert refused.value.retry_after_s > 0
    ask(limited)
    assert counted == ["max_in_flight"]


def test_a_request_that_fails_has_ended_too(clock: Clock, counted: Counted) -> None:
    limited = quota(clock, counted, Limits(max_in_flight=1))
    for _ in range(3):
        with pytest.raises(RuntimeError), limited.running():
            raise RuntimeError
    ask(limited)


def test_a_refused_request_uses_nothing_up(clock: Clock, counted: Counted) -> None:
    limited = quota(clock, counted, Limits(requests_per_minute=2, max_in_flight=1))
    with limited.running():
        for _ in range(5):
            with pytest.raises(QuotaExceeded):
                ask(limited)
    ask(limited)


def test_tokens_that_were_made_are_paid_back_before_more_are(clock: Clock, counted: Counted) -> None:
    limited = quota(clock, counted, Limits(tokens_per_minute=60))
    limited.check_tokens()
    limited.spend(59)
    limited.check_tokens()
    limited.spend(31)
    with pytest.raises(QuotaExceeded, match="at most 60 tokens a minute") as refused:
        limited.check_tokens()
    assert refused.value.retry_after_s == pytest.approx(31)
    clock.now_s += 30
    with pytest.raises(QuotaExceeded):
        limited.check_tokens()
    clock.now_s += 1
    limited.check_tokens()
    assert counted == ["tokens_per_minute"] * 2


def test_no_prompt_is_too_long_for_a_quota_that_is_full(clock: Clock, counted: Counted) -> None:
    limited = quota(clock, counted, Limits(tokens_per_minute=10))
    limited.check_tokens()
    limited.spend(100_000)
    with pytest.raises(QuotaExceeded):
        limited.check_tokens()


def test_new_limits_leave_used_what_was_used(clock: Clock, counted: Counted) -> None:
    every = Quotas(clock, counted.append)
    limited = every.of("team-a", Limits(requests_per_minute=10))
    with limited.running():
        for _ in range(3):
            ask(limited)
        assert every.of("team-a", Limits(requests_per_minute=5, max_in_flight=1)) is limited
        with pytest.raises(QuotaExceeded, match="at once"):
            ask(limited)
    ask(limited)
    with pytest.raises(QuotaExceeded, match="5 requests a minute"):
        ask(limited)
    every.of("team-a", Limits())
    ask(limited)


def test_callers_do_not_share_a_quota(clock: Clock, counted: Counted) -> None:
    every = Quotas(clock, counted.append)
    one, other = (every.of(name, Limits(requests_per_minute=1)) for name in ("one", "other"))
    ask(one)
    ask(other)
    with pytest.raises(QuotaExceeded):
        ask(one)


def test_those_that_were_not_used_for_long_are_dropped(
    clock: Clock, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas, "MANY_QUOTAS", 4)
    every = Quotas(clock, counted.append, _sweep_at=4)
    limits = Limits(requests_per_minute=1)
    busy = every.of("busy", limits)
    with busy.running():
        for index in range(100):
            ask(every.of(f"passing {index}", limits))
            clock.now_s += 60
        assert every.of("busy", limits) is busy
    assert len(every._by_caller) <= 8


def test_one_that_is_still_held_is_nobody_elses_when_its_caller_comes_again(clock: Clock, counted: Counted) -> None:
    every = Quotas(clock, counted.append, _sweep_at=1)
    limits = Limits(requests_per_minute=1)
    held = every.of("team-a", limits)
    every.of("passing", limits)
    assert "team-a" not in every._by_caller
    assert every.of("team-a", limits) is held
