"""The nearest factors to a matrix, held to Eckart and Young."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.making.low_rank import EXACT_SIZE, Factors, Wanted, approximate

sizes = st.integers(1, 40)
seeds = st.integers(0, 2**31)
LARGE = (EXACT_SIZE + 88, EXACT_SIZE + 188)
"""Of a matrix that is not decomposed whole."""


def draw(rows: int, columns: int, seed: int = 0, decay: float = 0.8) -> torch.Tensor:
    """A float32 matrix whose singular values fall."""
    generator = torch.Generator().manual_seed(seed)
    b, a = (torch.randn(*shape, generator=generator) for shape in ((rows, 60), (60, columns)))
    return (b * decay ** torch.arange(60)) @ a


def tails(matrix: torch.Tensor) -> torch.Tensor:
    """||D - D_r|| / ||D|| for the best D_r of each rank r, from a dense SVD."""
    squares = torch.linalg.svdvals(matrix.double()).square()
    left = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    return (left / squares.sum()).sqrt()


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, seeds, st.data())
def test_no_factors_of_a_rank_are_nearer(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    matrix = draw(rows, columns, seed)
    rank = data.draw(st.integers(1, min(rows, columns)))
    factors = approximate(matrix, Wanted(rank=rank))
    assert factors.a.shape == (rank, columns)
    assert factors.b.shape == (rows, rank)
    assert factors.relative_error(matrix) == pytest.approx(float(tails(matrix)[rank]), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, seeds, st.floats(0.01, 1.0))
def test_an_energy_takes_the_least_rank_that_keeps_it(rows: int, columns: int, seed: int, energy: float) -> None:
    matrix = draw(rows, columns, seed)
    factors = approximate(matrix, Wanted(energy=energy))
    left = tails(matrix).square()
    assert left[factors.rank] <= 1 - energy + 1e-12
    assert factors.rank == 0 or left[factors.rank - 1] > 1 - energy - 1e-12


def test_all_energy_is_the_matrix_at_its_own_rank() -> None:
    matrix = (torch.randn(30, 5).double() @ torch.randn(5, 20).double()) * 1e-3
    factors = approximate(matrix, Wanted(energy=1.0))
    assert factors.rank == 5
    assert factors.relative_error(matrix) < 1e-12


@pytest.mark.parametrize("shape", [LARGE, LARGE[::-1]])
def test_a_large_matrix_is_as_near_as_its_svd(shape: tuple[int, int]) -> None:
    matrix = draw(*shape, decay=0.95)
    best = float(tails(matrix)[24])
    assert best <= approximate(matrix, Wanted(rank=24)).relative_error(matrix) < best * 1.001


def test_a_large_matrix_without_decay_is_nearly_so() -> None:
    matrix = torch.randn(LARGE, generator=torch.Generator().manual_seed(0))
    best = float(tails(matrix)[24])
    assert best <= approximate(matrix, Wanted(rank=24)).relative_error(matrix) < best * 1.005


@pytest.mark.parametrize("energy", [0.5, 0.999])
def test_a_large_matrix_keeps_the_energy(energy: float) -> None:
    matrix = draw(*LARGE, decay=0.9)
    factors = approximate(matrix, Wanted(energy=energy))
    least = int((tails(matrix).square() <= 1 - energy).nonzero()[0])
    assert factors.relative_error(matrix) ** 2 <= (1 - energy) * (1 + 1e-6)
    assert least <= factors.rank <= least + 1


def test_the_same_matrix_gives_the_same_factors() -> None:
    matrix = draw(*LARGE)
    first, second = (approximate(matrix, Wanted(rank=8)) for _ in range(2))
    assert torch.equal(first.a, second.a)
    assert torch.equal(first.b, second.b)


def test_the_error_is_of_what_is_saved() -> None:
    matrix = draw(300, 40)
    rounded = approximate(matrix, Wanted(rank=40)).to(torch.bfloat16)
    exact = float((matrix.double() - rounded.b.double() @ rounded.a.double()).norm() / matrix.double().norm())
    assert rounded.relative_error(matrix) == pytest.approx(exact)
    assert exact > 1e-4


def test_nothing_is_nearest_to_nothing() -> None:
    assert Factors(torch.zeros(1, 3), torch.zeros(2, 1)).relative_error(torch.zeros(2, 3)) == 0
