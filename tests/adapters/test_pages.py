"""Pages: no two owners, none lost, few runs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.adapters.pages import PageAllocator, Runs
from weft.errors import OutOfCapacity


def count(runs: Runs) -> int:
    return sum(last - first for first, last in runs)


def test_the_first_run_that_fits_is_taken_whole() -> None:
    pages = PageAllocator(17)
    held = [pages.allocate(n) for n in (2, 4, 1, 8)]
    assert held == [((1, 3),), ((3, 7),), ((7, 8),), ((8, 16),)]
    pages.free(held[1])
    assert pages.allocate(3) == ((3, 6),)


def test_scattered_pages_are_used_longest_run_first() -> None:
    pages = PageAllocator(11)
    held = [pages.allocate(n) for n in (1, 1, 3, 1, 2, 1, 1)]
    for index in (1, 4, 2):
        pages.free(held[index])
    pages.free(held[6])
    assert pages.allocate(7) == ((2, 6), (7, 9), (10, 11))


def test_too_many_are_refused_with_the_numbers_and_nothing_is_taken() -> None:
    pages = PageAllocator(5)
    pages.allocate(2)
    with pytest.raises(OutOfCapacity, match="needs 3 pages and 2 of 4 are free"):
        pages.allocate(3)
    assert pages.num_free == 2


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=60))
def test_any_history_audits_clean(history: list[tuple[bool, int]]) -> None:
    pages, held = PageAllocator(33), []
    for give_back, size in history:
        if give_back and held:
            pages.free(held.pop(size % len(held)))
        elif size <= pages.num_free:
            held.append(pages.allocate(size))
            assert count(held[-1]) == size
        pages.check(held)
    assert pages.num_used == sum(map(count, held))
