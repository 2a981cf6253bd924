"""Bottlenecks: PyTorch's and the library's against the specification, and rows that know nothing of the others."""

from __future__ import annotations

import pytest
import torch
from natives import builds

from weft.kernels.bottleneck import NON_LINEARITIES, BottleneckWeights, Reads, make_bottleneck
from weft.kernels.native import FORMATS, Native
from weft.kernels.patches import tensors_of
from weft.kernels.reference import bottleneck

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SHAPES = [(24, 7), (100, 33)]


def make(d: int, r: int, non_linearity: str, reads: Reads) -> BottleneckWeights:
    generator = torch.Generator().manual_seed(d)
    shapes = [(r, d), (r,), (d, r), (d,)]
    down, down_bias, up, up_bias = (torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes)
    return BottleneckWeights(down, down_bias, up, up_bias, non_linearity, reads)


def rows(count: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, d, generator=generator).to(dtype), torch.randn(count, d, generator=generator).to(dtype)


@pytest.mark.parametrize(
    ("native", "dtype"),
    [(native, dtype) for native in (None, *builds()) for dtype in TOLERANCE if native is None or dtype in FORMATS],
    ids=lambda value: value.level if isinstance(value, Native) else str(value),
)
@pytest.mark.parametrize("reads", Reads)
@pytest.mark.parametrize("non_linearity", NON_LINEARITIES)
def test_it_gives_what_is_specified(
    native: Native | None, dtype: torch.dtype, non_linearity: str, reads: Reads
) -> None:
    for d, r in SHAPES:
        weights = make(d, r, non_linearity, reads)
        patch = make_bottleneck(weights, dtype, native)
        for count in (1, 2, 17):
            y, residual = rows(count, d, dtype)
            made = patch.apply(y, [torch.empty(count, 3), residual], 1.0)
            expected = bottleneck(y, residual, weights)
            assert made.dtype == dtype
            assert (made.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.skipif(not builds(), reason="the C library was not built")
@pytest.mark.parametrize("native", builds(), ids=[each.level for each in builds()])
@pytest.mark.parametrize("non_linearity", NON_LINEARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_is_the_same_to_the_bit_in_any_company(native: Native, dtype: torch.dtype, non_linearity: str) -> None:
    for d, r in SHAPES:
        patch = make_bottleneck(make(d, r, non_linearity, Reads.SUM), dtype, native)
        y, residual = rows(23, d, dtype)
        whole = patch.apply(y, [residual], 1.0)
        for first, last in [(0, 1), (3, 10), (22, 23), (7, 23)]:
            assert torch.equal(patch.apply(y[first:last], [residual[first:last]], 1.0), whole[first:last])


@pytest.mark.parametrize("native", [None, *builds()])
def test_it_knows_its_tensors_and_is_no_sum(native: Native | None) -> None:
    patch = make_bottleneck(make(16, 4, "relu", Reads.OUTPUT), torch.float32, native)
    assert len(tensors_of(patch)) == len(tensors_of(patch.to(torch.device("cpu")))) == 4
    assert not patch.is_sum
