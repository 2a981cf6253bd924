"""When requests end at the latest: who is due costs nothing to find out while nobody is, however many there are."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from weft.server.engine.sequence import Sequence

_SPARE = 64
"""Ends of those that have ended already which are kept, and one for each that has not."""


class Deadlines:
    """The ends, by deadline or time limit, of requests that are added, until they are removed."""

    def __init__(self) -> None:
        self._ends: list[tuple[float, int, Sequence]] = []
        """A heap. The number keeps the order of those that end at once; some are of sequences that were removed."""
        self._num_added = 0
        self._num_ends: dict[Sequence, int] = {}
        self._num_live = 0

    def add(self, sequence: Sequence) -> None:
        ends_s = sequence.ends_s
        self._num_ends[sequence] = len(ends_s)
        self._num_live += len(ends_s)
        for end_s in ends_s:
            self._num_added += 1
            heappush(self._ends, (end_s, self._num_added, sequence))

    def remove(self, sequence: Sequence) -> None:
        self._num_live -= self._num_ends.pop(sequence)
        if len(self._ends) > 2 * self._num_live + _SPARE:
            self._ends = [end for end in self._ends if end[2] in self._num_ends]
            heapify(self._ends)

    @property
    def next_s(self) -> float | None:
        """When the next is due; None: nobody will be."""
        while self._ends and self._ends[0][2] not in self._num_ends:
            heappop(self._ends)
        return self._ends[0][0] if self._ends else None

    def due(self, now_s: float) -> list[Sequence]:
        """Who has come to an end by now, each once; theirs is to be removed."""
        found: dict[Sequence, None] = {}
        while (next_s := self.next_s) is not None and next_s <= now_s:
            sequence = heappop(self._ends)[2]
            self._num_ends[sequence] -= 1
            self._num_live -= 1
            found[sequence] = None
        return list(found)
