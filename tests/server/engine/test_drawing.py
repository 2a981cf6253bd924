"""Truncation against transformers' own warpers, and draws against the distribution that is left."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from weft.server.engine import drawing
from weft.server.engine.drawing import argmax, draw, truncate
from weft.server.engine.request import Sampling

VOCABS = [1, 2, 50, 257, 5000]


def logits(rows: int, vocab: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def distribution(rows: torch.Tensor, params: list[Sampling]) -> torch.Tensor:
    weights = truncate(rows, rows.amax(-1), params)
    assert not weights[:, rows.shape[-1] :].any(), "padding has weight"
    return weights[:, : rows.shape[-1]].double() / weights.sum(-1, keepdim=True, dtype=torch.float64)


def by_transformers(row: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution that its warpers leave, in float64, so that only our own rounding is seen."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    if sampling.typical_p < 1:
        warpers.append(TypicalLogitsWarper(sampling.typical_p))
    return warpers(torch.tensor([[1]]), row[None].double())[0].softmax(-1)


def check(rows: torch.Tensor, params: list[Sampling]) -> None:
    """Equal but for rounding: it may move the cut by a token, or by more that are as likely as rounding is large.

    Or, of a typical set, by tokens that are as typical as each other.
    """
    for mine, row, sampling in zip(distribution(rows, params), rows, params, strict=True):
        theirs = by_transformers(row, sampling)
        differ = (mine > 0) != (theirs > 0)
        left = [each[~differ] / each[~differ].sum() for each in (mine, theirs)]
        assert (left[0] - left[1]).abs().max() < 2e-5
        at_the_cut = torch.maximum(mine, theirs)[differ]
        assert len(at_the_cut) <= 1 or at_the_cut.sum() < 1e-6 or are_as_typical(row, sampling, differ)


def are_as_typical(row: torch.Tensor, sampling: Sampling, tokens: torch.Tensor) -> bool:
    """Whether rounding decides which of these tokens is nearest to the entropy."""
    before = by_transformers(row, replace(sampling, typical_p=1.0))
    surprise = -before.log()
    entropy = (before * surprise).nan_to_num().sum()
    far = (surprise - entropy)[tokens].abs()
    return sampling.typical_p < 1 and bool(far.max() - far.min() < 1e-5)


ALONE = [
    Sampling(temperature=0.3),
    Sampling(temperature=2.0),
    Sampling(temperature=1.5, top_k=1),
    Sampling(temperature=1.5, top_k=5),
    Sampling(temperature=2.0, top_k=10**9),
    Sampling(temperature=2.0, top_p=0.8),
    Sampling(temperature=1.0, top_p=1e-12),
    Sampling(temperature=1.0, top_p=1 - 1e-12),
    Sampling(temperature=2.0, min_p=0.05),
    Sampling(temperature=2.0, min_p=1.0),
    Sampling(temperature=1.7, typical_p=0.7),
    Sampling(temperature=1.0, typical_p=1e-12),
    Sampling(temperature=1.0, typical_p=1 - 1e-12),
    Sampling(temperature=1.0, typical_p=1e-50, top_p=1e-50),
    Sampling(temperature=2.5, top_k=20, top_p=0.9, min_p=0.02, typical_p=0.9),
]


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("sampling", ALONE)
def test_each_warper_leaves_what_transformers_leaves(sampling: Sampling, vocab: int) -> None:
    for seed in range(3):
        check(logits(1, vocab, seed), [sampling])


@pytest.mark.parametrize("vocab", VOCABS)
def test_rows_of_one_batch_are_cut_each_by_its_own(vocab: int) -> None:
    check(logits(len(ALONE), vocab), ALONE)


@pytest.mark.parametrize("top_p", [0.5, 0.99, 0.9999])
def test_a_nucleus_that_is_wider_than_the_candidates_is_found(top_p: float) -> None:
    flat = logits(3, 20_000, spread=0.1)
    params = [Sampling(1.0, top_p=top_p), Sampling(1.0, top_p=top_p, top_k=3000), Sampling(1.0, top_p=1e-3)]
    check(flat, params)
    assert int((distribution(flat, params)[0] > 0).sum()) > drawing._CANDIDATES


sampling = st.builds(
    Sampling,
    temperature=st.floats(0.05, 20),
    top_k=st.sampled_from([0, 0, 1, 2, 7, 40, 299, 10**6]),
    top_p=st.just(1.0) | st.floats(1e-6, 1),
    min_p=st.just(0.0) | st.floats(0, 1),
    typical_p=st.just(1.0) | st.floats(1e-6, 1),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(sampling, min_size=1, max_size=6), st.integers(0, 1000), st.floats(0.1, 10))
@example([Sampling(3.0, top_k=2, typical_p=0.5)], 1, 0.5)  # of two tokens, rounding says which is more typical
@example(
    [*[Sampling(1.0)] * 2, Sampling(12.09375, top_k=299, top_p=0.806640625, typical_p=0.21484375), Sampling(1.0)],
    0,
    0.1,
)
def test_any_mix_of_parameters_leaves_what_transformers_leaves(
    params: list[Sampling], seed: int, spread: float
) -> None:
    check(logits(len(params), 300, seed, spread), params)


@settings(max_examples=60, deadline=None)
@given(st.lists(sampling, min_size=2, max_size=6), st.integers(0, 1000), st.integers(0, 5))
def test_a_row_does_not_depend_on_the_others(params: list[Sampling], seed: int, at: int) -> None:
    rows, at = logits(len(params), 3000, seed), at % len(params)
    uniforms = [random.Random(seed + i).random() for i in range(len(params))]
    together = draw(rows, rows.amax(-1), params, uniforms)
    alone = draw(rows[at : at + 1], rows[at : at + 1].amax(-1), params[at : at + 1], uniforms[at : at + 1])
    assert together[at] == alone[0]


def test_tokens_that_forbidden_logits_leave_are_never_drawn() -> None:
    row = logits(1, 600)
    row[0, 100:] = float("-inf")
    for sampling in (*ALONE, Sampling(temperature=100.0)):
        check(row, [sampling])
        drawn = draw(row.expand(200, -1), row.amax(-1).expand(200), [sampling] * 200, [i / 200 for i in range(200)])
        assert int(drawn.max()) < 100


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(1.0, top_k=10), Sampling(1.0, typical_p=0.9, top_p=0.9)])
def test_draws_are_the_inverse_of_the_cumulative_distribution(sampling: Sampling, vocab: int) -> None:
    row = logits(1, vocab)
    expected = by_transformers(row[0], sampling).cumsum(-1)
    uniforms = [0.0, *((i + 0.5) / 500 for i in range(500)), 1 - 2**-53]
    drawn = draw(row.expand(502, -1), row.amax(-1).expand(502), [sampling] * 502, uniforms)
    upto = expected[drawn]
    before = torch.where(drawn > 0, expected[(drawn - 1).clamp(min=0)], 0.0)
    uniform = torch.tensor(uniforms, dtype=torch.float64)
    assert (before <= uniform + 1e-5).all()
    assert (uniform <= upto + 1e-5).all()
    assert (upto > before).all(), "a token that was cut is drawn"


def test_draws_follow_the_distribution() -> None:
    row, rng = logits(1, 50), random.Random(3)
    drawn = draw(
        row.expand(20_000, -1),
        row.amax(-1).expand(20_000),
        [Sampling(temperature=1.0)] * 20_000,
        [rng.random() for _ in range(20_000)],
    )
    counts = torch.bincount(drawn, minlength=50) / 20_000
    assert (counts - row[0].softmax(-1)).abs().max() < 0.015


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_mean_nothing_do_not_disturb_others(value: float) -> None:
    rows = logits(3, 300)
    uniforms = [0.1, 0.5, 0.9]
    for sampling in ALONE:
        expected = draw(rows, rows.amax(-1), [sampling] * 3, uniforms)
        spoilt = rows.clone()
        spoilt[1] = value
        drawn = draw(spoilt, spoilt.amax(-1), [sampling] * 3, uniforms)
        assert drawn[[0, 2]].tolist() == expected[[0, 2]].tolist()
        assert 0 <= int(drawn[1]) < 300


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-45])
def test_a_tiny_temperature_is_as_good_as_greedy(temperature: float) -> None:
    row = logits(1, 300)
    assert int(draw(row, row.amax(-1), [Sampling(temperature=temperature)], [0.999])) == int(row.argmax())


def test_ties_with_the_last_token_kept_are_kept() -> None:
    row = torch.tensor([[3.0, 2.0, 1.0, 2.0, 0.0]])
    for sampling in (Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.7)):
        assert (truncate(row, row.amax(-1), [sampling])[0, :5] > 0).tolist() == [True, True, False, True, False]


def test_the_first_of_several_largest_is_the_argmax() -> None:
    rows = torch.tensor([[1.0, 3.0, 3.0], [float("nan"), 5.0, 1.0]])
    assert argmax(rows).tolist() == [1, 0] == rows.argmax(-1).tolist()
