"""Cuts through rows that are not sorted, against sorting them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.server.engine.selecting import largest, reach, reach_by_digits, reach_by_sorting


@pytest.mark.parametrize("count", [1, 7, 99, 100, 1000])
def test_the_largest_are_those_of_a_sorted_row(count: int) -> None:
    values = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(largest(values, count), values.sort(descending=True).values[:, :count])
    assert torch.equal(largest(values, count), values.topk(min(count, 100)).values)


numbers = st.sampled_from([0.0, 1e-45, 1e-30, 0.5, 1.0, 1.5, 3.0, 1e30, float("inf")]) | st.floats(0, 20, width=32)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 40).flatmap(
        lambda width: st.lists(
            st.tuples(
                st.lists(numbers, min_size=width, max_size=width),
                st.lists(st.integers(0, 4), min_size=width, max_size=width),
                st.floats(1e-3, 1.1),
            ),
            min_size=1,
            max_size=4,
        )
    )
)
def test_the_weight_wanted_is_reached_where_it_is_in_sorted_pairs(rows: list[tuple[list, list, float]]) -> None:
    keys = torch.tensor([row[0] for row in rows])
    weights = torch.tensor([row[1] for row in rows], dtype=torch.float32)
    wanted = torch.tensor([[row[2]] for row in rows], dtype=torch.float64) * weights.sum(-1, keepdim=True)
    found, by_sorting = reach_by_digits(keys, weights, wanted), reach_by_sorting(keys, weights, wanted)
    for key, sorted_key, mine, weight, goal in zip(found, by_sorting, keys, weights, wanted, strict=True):
        assert float(weight[mine <= key].sum()) == float(weight[mine <= sorted_key].sum())
        if float(weight.sum()) >= float(goal) > 0:
            assert float(weight[mine <= key].sum()) >= float(goal) > float(weight[mine < key].sum())
            assert key == sorted_key


def test_large_rows_are_cut_at_the_same_key() -> None:
    for seed in range(4):
        z = torch.randn(3, 50_000, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
        keys = z.amax(-1, keepdim=True) - z
        weights = (-keys).exp()
        wanted = weights.sum(-1, keepdim=True, dtype=torch.float64) * torch.tensor([[0.1], [0.9], [0.999]]).double()
        assert torch.equal(reach(keys, weights, wanted), reach_by_sorting(keys, weights, wanted))
