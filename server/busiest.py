"""Which adapters have a label of their own in the metrics. A leaf, like `metrics.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

BASE = "base"
"""The label of requests without an adapter."""

OTHER = "other"
"""The label of the adapters that are not among the busiest."""


class Busiest:
    """Which adapters have a label of their own: the `limit` busiest, by requests ended; the rest share `other`.

    The first ones seen get a label each. Later, one that is outside and clearly busier (more than twice the requests,
    and some) than the least busy label takes its place, and that one's series end: added to `other`, they would look
    like traffic of that moment. Counts are halved every `_WINDOW` requests, so old glory fades; no more than `limit` +
    `_WINDOW` names are ever held. An adapter that is itself called `base` or `other` never gets a label, so that no
    series mixes two meanings.
    """

    _WINDOW = 1024
    _MARGIN = 8

    def __init__(self, limit: int, drop: Callable[[str], None]) -> None:
        """drop(label) ends the series of a label."""
        self._limit = limit
        self._drop = drop
        self._counts: dict[str, int] = {}
        self._outside: Counter[str] = Counter()
        self._num_counted = 0

    def label(self, adapter: str) -> str:
        if not adapter:
            return BASE
        if adapter in self._counts:
            return adapter
        if len(self._counts) >= self._limit or adapter in (BASE, OTHER):
            return OTHER
        self._counts[adapter] = 0
        return adapter

    def count(self, adapter: str) -> None:
        """One more request of this adapter ended."""
        if adapter in self._counts:
            self._counts[adapter] += 1
        elif adapter not in ("", BASE, OTHER) and self._counts:
            self._outside[adapter] += 1
            self._challenge(adapter)
        self._num_counted += 1
        if self._num_counted % self._WINDOW == 0:
            self._counts = {name: count // 2 for name, count in self._counts.items()}
            self._outside.clear()

    def _challenge(self, adapter: str) -> None:
        least = min(self._counts, key=lambda name: self._counts[name])
        if self._outside[adapter] > 2 * self._counts[least] + self._MARGIN:
            del self._counts[least]
            self._drop(least)
            self._counts[adapter] = self._outside.pop(adapter)
