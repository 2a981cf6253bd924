"""How long requests wait for their turn before they are told that it does not come soon enough."""

from __future__ import annotations

from weft.errors import OutOfCapacity
from weft.server.engine.sequence import Sequence

SHORTEST_RETRY_S = 0.1


class Patience:
    """The requests that have not begun, in order of arrival, from `add` to `remove`."""

    def __init__(self, longest_s: float) -> None:
        """longest_s: that one may wait; 0: for ever."""
        self._longest_s = longest_s
        self._waiting: dict[Sequence, None] = {}

    def add(self, sequence: Sequence) -> None:
        if self._longest_s:
            self._waiting[sequence] = None

    def remove(self, sequence: Sequence) -> None:
        """It has begun or ended; no matter if that is known already."""
        self._waiting.pop(sequence, None)

    def over(self, now_s: float) -> list[tuple[Sequence, OutOfCapacity]]:
        """Who has waited too long, and what to tell them."""
        found = []
        for sequence in self._waiting:
            waited_s = now_s - sequence.arrived_s
            if waited_s <= self._longest_s:
                break
            message = (
                f"its turn has not come in {waited_s:.2g} s; {self._longest_s:g} s is as long as requests may wait"
            )
            found.append((sequence, OutOfCapacity(message, max(waited_s, SHORTEST_RETRY_S))))
        return found
