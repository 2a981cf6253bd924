"""Cutting b a by its core alone, and spending bytes where they keep most."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import InvalidConfig
from weft.making.budget import Adapter, Values, ranks_for, ranks_within
from weft.making.compression import Spectrum, compress
from weft.making.low_rank import Wanted
from weft.making.peft_folder import Lora, PeftFolder

sides = st.integers(1, 30)
seeds = st.integers(0, 2**31)


def draw(d_out: int, d_in: int, rank: int, seed: int = 0, scale: float = 2.0) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*shape, generator=generator) for shape in ((rank, d_in), (d_out, rank)))
    return Lora(a, b, scale)


def dense(lora: Lora) -> torch.Tensor:
    return lora.scale * (lora.b.double() @ lora.a.double())


def alone(lora: Lora) -> PeftFolder:
    return PeftFolder("it", {}, {"m": lora}, {})


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.integers(1, 40), seeds, st.sampled_from([2.0, -0.3, 1e-3]), st.data())
def test_the_error_is_the_tail_of_the_dense_svd(
    d_out: int, d_in: int, rank: int, seed: int, scale: float, data: st.DataObject
) -> None:
    """Also where there are more rank rows than the matrix has."""
    lora = draw(d_out, d_in, rank, seed, scale)
    kept = data.draw(st.integers(1, min(d_out, d_in, rank)))
    made, report = compress(alone(lora), {"m": kept}, torch.float64)
    exact = dense(lora)
    s = torch.linalg.svdvals(exact)
    tail = float((s[kept:].square().sum() / s.square().sum()).sqrt())
    assert report.error == pytest.approx(tail, abs=1e-9)
    assert float((dense(made.modules["m"]) - exact).norm() / exact.norm()) == pytest.approx(tail, abs=1e-9)
    assert report.modules[0].norm == pytest.approx(float(exact.norm()))


def test_the_error_counts_the_rounding_of_what_is_saved() -> None:
    lora = draw(40, 30, 8)
    made, report = compress(alone(lora), {"m": 8}, torch.bfloat16)
    exact = dense(lora)
    assert report.error == pytest.approx(float((dense(made.modules["m"]) - exact).norm() / exact.norm()))
    assert report.error > 1e-4


def test_what_is_of_lower_rank_than_it_says_is_seen() -> None:
    """Rows twice, or of zeros."""
    lora = draw(20, 10, 3)
    padded = Lora(torch.cat([lora.a, lora.a, torch.zeros(2, 10)]), torch.cat([lora.b, lora.b, lora.b[:, :2]], 1), 1.0)
    values = Spectrum.of(padded).values
    assert ranks_for([Adapter({"m": values}, 0)], Wanted(energy=1.0)) == [{"m": 3}]


def values(squares: list[float], row_numbers: int) -> Values:
    return Values(torch.tensor(squares, dtype=torch.float64), len(squares), row_numbers)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(0.1, 100), min_size=1, max_size=4), min_size=1, max_size=3), st.integers(1, 14))
def test_no_other_ranks_of_the_same_bytes_lose_less(modules: list[list[float]], rows: int) -> None:
    """Of modules whose rows cost the same, where there is an exact answer to compare with."""
    adapter = Adapter({str(i): values(sorted(each, reverse=True), 5) for i, each in enumerate(modules)}, 0)
    (ranks,) = ranks_within([adapter], rows * 5 * 4, [4])

    def kept(ranks: tuple[int, ...]) -> float:
        return sum(sum(sorted(each, reverse=True)[:rank]) for each, rank in zip(modules, ranks, strict=True))

    every = itertools.product(*(range(len(each) + 1) for each in modules))
    best = max(kept(ranks) for ranks in every if sum(ranks) <= rows)
    assert sum(ranks.values()) <= rows
    assert kept(tuple(ranks.values())) == pytest.approx(best)


def test_a_cheap_row_comes_before_a_dear_one_that_keeps_less_a_byte() -> None:
    adapter = Adapter({"wide": values([3.3], 30), "narrow": values([2.0, 1.0], 10)}, 0)
    assert ranks_within([adapter], 20, [1]) == [{"wide": 0, "narrow": 2}]
    assert ranks_within([adapter], 40, [1]) == [{"wide": 1, "narrow": 1}]


def test_adapters_count_by_their_own_energy() -> None:
    """One whose numbers are a thousandth of another's loses no more for that."""
    adapters = [Adapter({"m": values([factor * n for n in (4.0, 2.0, 1.0)], 10)}, 0) for factor in (1.0, 1e-6)]
    assert ranks_within(adapters, 4 * 10 * 2, [2, 2]) == [{"m": 2}, {"m": 2}]


def test_a_budget_that_keeps_nothing() -> None:
    adapter = Adapter({"m": values([1.0], 10)}, 0)
    with pytest.raises(InvalidConfig, match="leaves 19 for rows, too few for 2 of 3 adapters to keep a row"):
        ranks_within([adapter] * 3, 19, [1] * 3)
    with pytest.raises(InvalidConfig, match="leaves 0 for rows, too few for the rows that biases need"):
        ranks_within([Adapter(adapter.modules, 1)], -5, [1])
