"""Pages: no two owners, none lost, few runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bases import linear_base
from hypothesis import given
from hypothesis import strategies as st

from weft.adapters.content import LoraModule, LoraWeights
from weft.adapters.pages import PageAllocator, PageConfig, PagePool, Runs
from weft.errors import InvalidAdapter, OutOfCapacity


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


SHAPES = {"one": (6, 4), "two": (5, 3), "three": (2, 2)}


def make_pool(dtype: torch.dtype = torch.float32) -> PagePool:
    return PagePool(linear_base(SHAPES), PageConfig(9, dtype, torch.device("cpu")))


def weights(rank: int, *names: str, scale: float = 2.0, factor: float = 1.0) -> LoraWeights:
    modules = {
        name: LoraModule(torch.randn(rank, SHAPES[name][0]) * factor, torch.randn(SHAPES[name][1], rank), scale)
        for name in names
    }
    return LoraWeights(modules, 2.0, digest="sha256:0")


def rows(pool: PagePool, name: str, runs: Runs) -> tuple[torch.Tensor, torch.Tensor]:
    site = pool.sites[name]
    return tuple(torch.cat([half[first:last].flatten(0, 1) for first, last in runs]) for half in (site.a, site.b))


def test_what_is_written_is_what_was_read_and_nothing_of_former_owners() -> None:
    pool = make_pool()
    for runs in (((1, 2), (4, 6)), ((2, 3), (3, 4), (6, 7))):
        for rank, names in ((24, list(SHAPES)), (12, ["one", "two"]), (1, ["three"])):
            written = weights(rank, *names)
            host = pool.prepare(written, "file:x")
            paged = pool.write(runs, host)
            assert paged.sites == {pool.sites[name].index for name in names}
            for name in SHAPES:
                a, b = rows(pool, name, paged.runs)
                held = rank if name in names else 0
                if held:
                    assert torch.equal(a[:held], written.modules[name].a)
                    assert torch.equal(b[:held], written.modules[name].b.t())
                assert not a[held:].any()
                assert not b[held:].any()
    assert not rows(pool, "one", ((0, 1), (7, 9)))[0].any()


def test_an_adapter_in_host_memory_knows_what_it_takes() -> None:
    pool = make_pool(torch.bfloat16)
    host = pool.prepare(weights(12, "one", "two"), "file:x")
    assert (host.num_pages, host.ranks, host.modules) == (2, (12,), ("one", "two"))
    assert (host.num_bytes, host.disk_bytes) == (12 * 18 * 2, 12 * 18 * 4)
    assert all(half.is_contiguous() and half.dtype is torch.bfloat16 for pair in host.rows.values() for half in pair)


def test_a_scale_of_a_module_s_own_is_folded_into_its_b() -> None:
    pool = make_pool()
    written = weights(4, "one", scale=6.0)
    host = pool.prepare(written, "file:x")
    assert torch.allclose(host.rows["one"][1], written.modules["one"].b.t() * 3)


def test_values_beyond_the_pages_type_are_refused_by_module() -> None:
    with pytest.raises(InvalidAdapter, match="one: has values beyond the range of float16"):
        make_pool(torch.float16).prepare(weights(4, "one", factor=1e6), "file:x")


def test_patches_take_the_place_of_as_many_pages_as_would_hold_them() -> None:
    pool = make_pool()
    rows = weights(8, "one")
    bias = torch.ones(4)
    with_bias = replace(rows, modules={"one": replace(rows.modules["one"], bias=bias)})
    plain, patched = pool.prepare(rows, "file:x"), pool.prepare(with_bias, "file:x")
    assert (plain.num_row_pages, plain.num_pages) == (1, 1)
    assert (patched.num_row_pages, patched.num_pages) == (1, 2)
    assert patched.num_bytes == plain.num_bytes + 2 * bias.nbytes
    assert pool.write(((3, 5),), patched).runs == ((3, 4),)
