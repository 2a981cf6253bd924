"""Output heads: torch's own linear function, each row as if it were alone."""

from __future__ import annotations

import pytest
import torch

from weft.kernels.heads import Head


@pytest.mark.parametrize("bias", [None, torch.tensor([0.5, -2.0, 1.0])])
def test_a_row_comes_out_the_same_to_the_bit_alone_and_among_others(bias: torch.Tensor | None) -> None:
    torch.manual_seed(0)
    head, rows = Head(torch.randn(3, 576), bias), torch.randn(33, 576)
    together = head(rows)
    assert torch.allclose(together, torch.nn.functional.linear(rows, head.weight, bias), atol=1e-5)
    assert all(torch.equal(head(row[None])[0], made) for row, made in zip(rows, together, strict=True))
