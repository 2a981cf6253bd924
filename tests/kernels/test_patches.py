"""Patches, each against its own equation, on rows of one adapter."""

from __future__ import annotations

import pytest
import torch

from weft.kernels.patches import Affine, EmbeddingLowRank, LowRank, Own, Patch, TokenColumns, TokenRows, tensors_of
from weft.kernels.plan import PagedAdapter, build_plan

D_IN, D_OUT, ROWS = 6, 5, 4
X, Y = torch.randn(ROWS, D_IN), torch.randn(ROWS, D_OUT)
IDS = torch.tensor([3, 0, 9, 3])
CPU = torch.device("cpu")


def test_affine() -> None:
    gain, shift = torch.randn(D_OUT), torch.randn(D_OUT)
    assert torch.allclose(Affine(gain, shift).apply(Y, [X], 1.0), Y * (1 + gain) + shift)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_affine_keeps_the_dtype_of_the_rows(dtype: torch.dtype) -> None:
    assert Affine(torch.ones(D_OUT), torch.ones(D_OUT)).apply(Y.to(dtype), [X], 1.0).dtype == dtype


def test_low_rank() -> None:
    a, b = torch.randn(3, D_IN), torch.randn(3, D_OUT)
    assert torch.allclose(LowRank(a, b, 0.5).apply(Y, [X], -2.0), Y - X @ a.T @ b, atol=1e-6)


def test_embedding_low_rank() -> None:
    a, b = torch.randn(10, 3), torch.randn(3, D_OUT)
    assert torch.allclose(EmbeddingLowRank(a, b, 0.5).apply(Y, [IDS], 4.0), Y + 2 * a[IDS] @ b, atol=1e-6)


def test_token_rows_replace_those_of_their_tokens_alone() -> None:
    rows = torch.randn(2, D_OUT)
    made = TokenRows(torch.tensor([3, 7]), rows).apply(Y, [IDS], 1.0)
    assert torch.equal(made, torch.stack([rows[0], Y[1], Y[2], rows[0]]))


def test_token_columns_replace_the_logits_of_their_tokens_alone() -> None:
    rows = torch.randn(2, D_IN)
    made = TokenColumns(torch.tensor([1, 4]), rows).apply(Y, [X], 1.0)
    assert torch.allclose(made[:, [1, 4]], X @ rows.T)
    assert torch.equal(made[:, [0, 2, 3]], Y[:, [0, 2, 3]])


def test_own_runs_what_it_was_given() -> None:
    own = Own(lambda parameters: lambda x: x * parameters["weight"], {"weight": torch.full((D_IN,), 3.0)})
    assert torch.equal(own.apply(Y, [X], 1.0), X * 3)


@pytest.mark.parametrize(
    ("patch", "is_sum"),
    [
        (Affine(torch.ones(2), torch.ones(2)), False),
        (LowRank(torch.ones(1, 2), torch.ones(1, 2), 1.0), True),
        (EmbeddingLowRank(torch.ones(1, 2), torch.ones(1, 2), 1.0), True),
        (TokenRows(torch.ones(2), torch.ones(2, 2)), False),
        (TokenColumns(torch.ones(2), torch.ones(2, 2)), False),
        (Own(lambda parameters: torch.neg, {"a": torch.ones(2), "b": torch.ones(2)}), False),
    ],
)
def test_a_patch_knows_its_tensors_and_whether_it_is_a_sum(patch: Patch, is_sum: bool) -> None:
    assert len(tensors_of(patch)) == 2
    assert patch.is_sum is is_sum
    assert len(tensors_of(patch.to(CPU))) == 2


def test_a_plan_has_each_adapters_patches_on_its_own_rows() -> None:
    patch = LowRank(torch.ones(1, 2), torch.ones(1, 2), 1.0)
    one = PagedAdapter(((1, 2),), 1.0, frozenset(), {"head": (patch,), "norm": (patch, patch)})
    two = PagedAdapter(((2, 3),), 1.0, frozenset(), {"head": (patch,)})
    plan = build_plan([(2, [(one, 1.0)]), (0, [(two, 1.0)]), (1, []), (3, [(two, 0.5), (one, 2.0)])], CPU)
    assert plan is not None
    assert {name: len(patched) for name, patched in plan.patches.items()} == {"head": 3, "norm": 4}
    assert [(p.rows, p.weight) for p in plan.patches["head"]] == [
        (slice(0, 2), 1.0),
        (slice(3, 6), 0.5),
        (slice(3, 6), 2.0),
    ]
