"""How much a caller may ask for: requests and tokens a minute, and requests at once.

A bucket holds a minute's worth and fills evenly. What a request generates is known only as it is made, so the tokens'
bucket may be overdrawn: whoever has done that waits until it is paid back. Everything here belongs to the event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from weft.errors import QuotaExceeded

IN_FLIGHT_RETRY_S = 1.0
"""When a caller with too many requests at once may try again; nobody knows when one of them ends."""

MANY_QUOTAS = 10_000
"""From so many on, those of callers that have long been away are dropped."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one caller may ask for; None: any number."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_in_flight: int | None = None


class _Bucket:
    """Full at first. level: what is left; below zero, what is owed."""

    def __init__(self, per_minute: int, now_s: float) -> None:
        self._per_minute = per_minute
        self._at_s = now_s
        self._level = float(per_minute)

    def changed(self, per_minute: int, now_s: float) -> _Bucket:
        """The same with another size: what was used of this one is used of that."""
        other = _Bucket(per_minute, now_s)
        other._level = per_minute - (self._per_minute - self.level(now_s))
        return other

    def level(self, now_s: float) -> float:
        rate = self._per_minute / 60
        self._level = min(self._per_minute, self._level + (now_s - self._at_s) * rate)
        self._at_s = now_s
        return self._level

    def take(self, count: float, now_s: float) -> None:
        self._level = self.level(now_s) - count

    def wait_s(self, count: float, now_s: float) -> float:
        """Until there are so many; 0 where there are."""
        return max(0.0, count - self.level(now_s)) * 60 / self._per_minute

    def is_full(self, now_s: float) -> bool:
        return self.level(now_s) >= self._per_minute


class Quota:
    """What one caller has used."""

    def __init__(
        self, caller: str, limits: Limits, clock: Callable[[], float], count_refusal: Callable[[str], None]
    ) -> None:
        """clock: seconds. count_refusal: called with the limit's name for each request that it refuses."""
        self._caller = caller
        self._clock = clock
        self._count_refusal = count_refusal
        self._limits = Limits()
        self._requests: _Bucket | None = None
        self._tokens: _Bucket | None = None
        self._num_in_flight = 0
        self.limit(limits)

    def limit(self, limits: Limits) -> None:
        """Other limits from now on; what was used stays used."""
        if limits != self._limits:
            self._requests = self._resized(self._requests, limits.requests_per_minute)
            self._tokens = self._resized(self._tokens, limits.tokens_per_minute)
            self._limits = limits

    @contextmanager
    def running(self) -> Iterator[None]:
        """One request, from here to the end of the block. Raises QuotaExceeded before anything is counted."""
        most, now_s = self._limits.max_in_flight, self._clock()
        if most is not None and self._num_in_flight >= most:
            raise self._refusal("max_in_flight", f"{most} requests at once", IN_FLIGHT_RETRY_S)
        if self._requests is not None:
            if wait_s := self._requests.wait_s(1, now_s):
                per_minute = self._limits.requests_per_minute
                raise self._refusal("requests_per_minute", f"{per_minute} requests a minute", wait_s)
            self._requests.take(1, now_s)
        self._num_in_flight += 1
        try:
            yield
        finally:
            self._num_in_flight -= 1

    def check_tokens(self) -> None:
        """Raises QuotaExceeded where a minute's tokens are used up."""
        if self._tokens is not None and (wait_s := self._tokens.wait_s(1, self._clock())):
            per_minute = self._limits.tokens_per_minute
            raise self._refusal("tokens_per_minute", f"{per_minute} tokens a minute", wait_s)

    def spend(self, num_tokens: int) -> None:
        """So many tokens were used, of a prompt or an answer."""
        if self._tokens is not None:
            self._tokens.take(num_tokens, self._clock())

    @property
    def is_idle(self) -> bool:
        """Whether a new one would do as well."""
        now_s = self._clock()
        buckets = [bucket for bucket in (self._requests, self._tokens) if bucket is not None]
        return not self._num_in_flight and all(bucket.is_full(now_s) for bucket in buckets)

    def _resized(self, bucket: _Bucket | None, per_minute: int | None) -> _Bucket | None:
        if per_minute is None:
            return None
        now_s = self._clock()
        return _Bucket(per_minute, now_s) if bucket is None else bucket.changed(per_minute, now_s)

    def _refusal(self, limit: str, words: str, wait_s: float) -> QuotaExceeded:
        self._count_refusal(limit)
        return QuotaExceeded(self._caller, f"at most {words} are allowed ({limit})", wait_s)


@dataclass(slots=True)
class Quotas:
    """The quota of each caller, by name: it outlasts its requests and every reload of the rules.

    What is dropped is found again as long as one who knows the caller holds it: nobody may have two.
    """

    clock: Callable[[], float]
    count_refusal: Callable[[str], None]
    _by_caller: dict[str, Quota] = field(default_factory=dict)
    _held: WeakValueDictionary[str, Quota] = field(default_factory=WeakValueDictionary)
    _sweep_at: int = MANY_QUOTAS

    def of(self, caller: str, limits: Limits) -> Quota:
        """The caller's quota, with these limits from now on."""
        quota = self._by_caller.get(caller)
        if quota is None:
            if len(self._by_caller) >= self._sweep_at:
                self._by_caller = {name: kept for name, kept in self._by_caller.items() if not kept.is_idle}
                self._sweep_at = max(MANY_QUOTAS, 2 * len(self._by_caller))
            quota = self._held.get(caller) or Quota(caller, limits, self.clock, self.count_refusal)
            self._by_caller[caller] = self._held[caller] = quota
        quota.limit(limits)
        return quota
