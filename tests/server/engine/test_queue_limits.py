"""What may wait: by requests, tokens, adapter and time, each refused with its numbers and a time to come back."""

from __future__ import annotations

import pytest

from weft.errors import OutOfCapacity
from weft.server.engine.queue_limits import LONGEST_RETRY_S, UNKNOWN_RETRY_S, QueueGate, QueueLimits
from weft.server.engine.request import Request


def ask(prompt: int = 10, adapter: str = "", caller: str = "") -> Request:
    return Request("r", tuple(range(prompt)), ((adapter, 1.0),) if adapter else (), caller=caller)


class Gate:
    """A gate, and a way through it."""

    def __init__(self, limits: QueueLimits, token_s: float | None = None, *, is_full: bool = False) -> None:
        self.gate = QueueGate(limits, lambda: token_s, lambda: is_full)

    def submit(self, *requests: Request) -> None:
        for request in requests:
            self.gate.check(request)
            self.gate.enter(request)

    def run(self, *requests: Request) -> None:
        self.submit(*requests)
        for request in requests:
            self.gate.begin(request)

    def refuses(self, request: Request, words: str, retry_after_s: float = UNKNOWN_RETRY_S) -> None:
        with pytest.raises(OutOfCapacity, match=words) as raised:
            self.gate.check(request)
        assert raised.value.retry_after_s == pytest.approx(retry_after_s)


def test_so_many_requests_may_wait_beside_those_that_run() -> None:
    gate = Gate(QueueLimits(max_running=2, max_requests=1))
    running = [ask(), ask()]
    gate.run(*running)
    gate.submit(ask())
    gate.refuses(ask(), "3 requests are queued or running, as many as are allowed")
    gate.gate.leave(running[0])
    gate.submit(ask())


def test_so_many_prompt_tokens_may_wait() -> None:
    gate = Gate(QueueLimits(1, 100, max_tokens=100), token_s=0.5)
    gate.run(ask(1000))
    waiting = [ask(60), ask(40)]
    gate.submit(*waiting)
    gate.refuses(ask(7), "100 prompt tokens are queued, and with this request's 7 .* the 100 that are allowed", 3.5)
    gate.gate.begin(waiting[0])
    gate.submit(ask(60))


def test_a_prompt_longer_than_what_may_wait_waits_alone() -> None:
    gate = Gate(QueueLimits(1, 100, max_tokens=10))
    gate.run(ask())
    gate.submit(ask(50))
    gate.refuses(ask(1), "50 prompt tokens are queued")


def test_so_many_requests_may_wait_for_one_adapter_and_for_the_base() -> None:
    gate = Gate(QueueLimits(1, 100, max_per_adapter=2), token_s=0.1)
    gate.run(ask())
    gate.submit(ask(10, "a"), ask(20, "a@sha256:00"), ask(10, "b"), ask(10), ask(10))
    gate.refuses(ask(10, "a"), "2 requests to adapter 'a' are queued, as many as are allowed for one", 1.2)
    gate.refuses(ask(10), "2 requests to the base model are queued", 1.2)
    gate.submit(ask(10, "b"))


def test_nothing_is_refused_that_will_not_have_to_wait() -> None:
    gate = Gate(QueueLimits(4, 100, max_tokens=5, max_per_adapter=1))
    gate.submit(*(ask(10, "a") for _ in range(4)))
    gate.refuses(ask(10, "a"), "40 prompt tokens are queued")


def test_one_that_ends_before_it_began_leaves_its_place() -> None:
    gate = Gate(QueueLimits(1, 1))
    first, second = ask(), ask()
    gate.submit(first, second)
    gate.gate.leave(second)
    gate.gate.begin(second)
    gate.submit(ask())
    gate.refuses(ask(), "2 requests")


def test_nobody_is_told_to_wait_for_ever() -> None:
    gate = Gate(QueueLimits(0, 1), token_s=1e6)
    gate.submit(ask())
    gate.refuses(ask(), "1 requests", LONGEST_RETRY_S)


def test_who_would_wait_too_long_is_refused_at_once_and_told_when_it_would_not() -> None:
    gate = Gate(QueueLimits(1, 100, max_wait_s=2.0), token_s=0.1)
    gate.run(ask(1000))
    waiting = [ask(10), ask(10), ask(10)]
    gate.submit(*waiting)
    words = "it would wait 3 s for the 30 prompt tokens before it, and 2 s is as long as requests may"
    gate.refuses(ask(10), words, retry_after_s=1.0)
    gate.gate.begin(waiting[0])
    gate.submit(ask(500))
    gate.refuses(ask(1), "it would wait 52 s", retry_after_s=50.0)


def test_nobody_is_refused_for_its_wait_before_the_rate_is_known() -> None:
    gate = Gate(QueueLimits(1, 100, max_wait_s=2.0))
    gate.submit(*(ask(1000) for _ in range(100)))


def test_nobody_is_refused_for_its_wait_while_there_is_room_for_all() -> None:
    limits = QueueLimits(10, 100, max_wait_s=2.0)
    Gate(limits, token_s=1.0).submit(*(ask(10) for _ in range(10)))
    full = Gate(limits, token_s=1.0, is_full=True)  # of blocks, say
    full.submit(ask(10))
    full.refuses(ask(10), "it would wait 10 s", retry_after_s=8.0)


def test_a_caller_and_an_adapter_with_nothing_waiting_are_next_however_much_others_have() -> None:
    gate = Gate(QueueLimits(1, 1000, max_wait_s=5.0), token_s=0.1)
    gate.run(ask())
    gate.submit(*(ask(10, "a", "crowd") for _ in range(6)))
    gate.refuses(ask(10, "a", "crowd"), "the 60 prompt tokens before it")
    assert gate.gate.tokens_ahead(ask(10, "b", "crowd")) == 0
    assert gate.gate.tokens_ahead(ask(10, "a", "one")) == 0
    gate.submit(ask(10, "b", "crowd"))
    assert gate.gate.tokens_ahead(ask(10, "b", "crowd")) == 20, "its own, and as many of the other adapter's"
    gate.submit(ask(10, "a", "one"))
    assert gate.gate.tokens_ahead(ask(10, "a", "one")) == 20, "its own, and as many of the other caller's"
    assert gate.gate.tokens_ahead(ask(10, "b", "crowd")) == 40
    assert gate.gate.tokens_ahead(ask(10, "a", "crowd")) == 80, "never more than wait in all"
