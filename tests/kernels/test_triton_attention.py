"""Attention over a paged cache in place, against PyTorch's over what the blocks hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from weft.server.engine.gathering import attend
from weft.server.engine.step import AttentionOptions

pytest.importorskip("triton")
from weft.kernels.triton_attention import attend_paged

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK_TOKENS, WIDTH = 16, 20
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def run(
    contexts: list[int], heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, **options: Any
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What the kernel gives for rows of these contexts, and what PyTorch gives for each."""
    generator = torch.Generator().manual_seed(3)
    num_rows, slots = len(contexts), len(contexts) * WIDTH * BLOCK_TOKENS
    query = torch.randn(num_rows, heads[0], dims[0], generator=generator).to(DEVICE, dtype).transpose(0, 1)
    keys, values = (torch.randn(slots, heads[1], dim, generator=generator).to(DEVICE, dtype) for dim in dims)
    tables = torch.randperm(num_rows * WIDTH, generator=generator).view(WIDTH, num_rows).int()
    lengths = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    scaling = dims[0] ** -0.5
    made = attend_paged(query, keys, values, tables.to(DEVICE), lengths, BLOCK_TOKENS, scaling=scaling, **options)
    plain = AttentionOptions(scaling, None, options.get("softcap"), options.get("sinks"))
    expected = []
    for row, context in enumerate(contexts):
        slots_of_row = (tables[:, row].long()[:, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)).flatten()[:context]
        seen = slots_of_row[-(options.get("window") or context) :].to(DEVICE)
        key, value = (cache[seen].float().transpose(0, 1)[None] for cache in (keys, values))
        expected.append(attend(query[:, row].float()[None, :, None], key, value, None, plain)[0, :, 0])
    return made, expected


@pytest.mark.parametrize(
    ("heads", "dims", "dtype", "options"),
    [
        ((4, 2), (16, 16), torch.float32, {}),
        ((6, 2), (24, 16), torch.bfloat16, {}),
        ((2, 2), (32, 40), torch.float16, {"window": 37}),
        ((4, 1), (16, 16), torch.float32, {"softcap": 5.0}),
        ((4, 2), (16, 16), torch.float32, {"sinks": torch.linspace(-1, 2, 4).to(DEVICE)}),
        ((4, 2), (16, 16), torch.float32, {"sinks": torch.linspace(-1, 2, 4).to(DEVICE), "window": 9}),
    ],
)
def test_rows_of_any_context(
    heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    contexts = [1, 33, 300]
    made, expected = run(contexts, heads, dims, dtype, **options)
    for row, wanted in enumerate(expected):
        assert (made[row].float() - wanted).norm() / wanted.norm() < TOLERANCE[dtype]


def test_a_row_depends_on_nothing_but_itself() -> None:
    together, _ = run([130, 5, 64], (4, 2), (16, 16), torch.float32)
    again, _ = run([130, 5, 64], (4, 2), (16, 16), torch.float32)
    shorter, _ = run([130, 1, 0], (4, 2), (16, 16), torch.float32)
    assert torch.equal(together, again)
    assert torch.equal(together[0], shorter[0])


def test_a_row_without_a_context_is_zero() -> None:
    made, _ = run([0, 3], (4, 2), (16, 16), torch.float32)
    assert not made[0].any()
    assert made[1].any()
