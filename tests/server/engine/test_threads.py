"""Threads by measurement, with a clock that is told how long each product takes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from weft.kernels.native import Native, find_native
from weft.server.engine.threads import fastest_threads

if find_native(1) is None:
    pytest.skip("the C library was not built", allow_module_level=True)


def choose(seconds: dict[int, float], most: int) -> int:
    """With a clock by which a product on so many threads takes so long."""
    made: list[int] = []

    def find(threads: int) -> Native | None:
        made.append(threads)
        return find_native(threads)

    def ticks() -> Iterator[float]:
        now = 0.0
        while True:
            for threads in made:
                yield now
                now += seconds[threads]
                yield now

    clock = ticks()
    chosen = fastest_threads(find, most, lambda: next(clock))
    assert made == list(seconds)
    return chosen


@pytest.mark.parametrize(
    ("seconds", "most", "chosen"),
    [
        ({1: 1.0}, 1, 1),
        ({1: 1.0, 2: 0.6}, 2, 2),
        ({1: 1.0, 2: 0.97}, 2, 1),
        ({1: 1.0, 2: 15.0}, 2, 1),
        ({1: 1.0, 2: 0.6, 4: 0.4, 6: 0.39}, 6, 4),
        ({1: 1.0, 2: 0.6, 4: 0.59, 8: 0.3}, 8, 2),
    ],
)
def test_more_threads_are_taken_while_they_pay(seconds: dict[int, float], most: int, chosen: int) -> None:
    assert choose(seconds, most) == chosen
