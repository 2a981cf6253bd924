"""Packed products: what they give, what they take, and that a row knows nothing of the others."""

from __future__ import annotations

import pytest
import torch
from natives import builds, each_build
from torch.nn import functional

from weft.kernels.linear import PackedLinear
from weft.kernels.native import Native

if not builds():
    pytest.skip("the C library was not built", allow_module_level=True)

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


def make(d_out: int, d_in: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(d_out)
    return torch.randn(d_out, d_in, generator=generator).to(dtype), torch.randn(d_out, generator=generator).to(dtype)


@each_build
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("d_out", "d_in"), [(1, 1), (7, 5), (16, 8), (33, 64), (100, 31), (1, 300)])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 6, 7, 13, 40])
def test_a_product_is_torchs(native: Native, dtype: torch.dtype, d_out: int, d_in: int, rows: int) -> None:
    weight, bias = make(d_out, d_in, dtype)
    x = torch.randn(rows, d_in + 3, generator=torch.Generator().manual_seed(rows)).to(dtype)[:, :d_in]
    for added in (None, bias):
        actual = PackedLinear(weight, added, native)(x)
        expected = functional.linear(x.double(), weight.double(), None if added is None else added.double())
        assert (actual.dtype, actual.shape) == (dtype, expected.shape)
        assert (actual.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@each_build
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_row_is_the_same_to_the_bit_in_any_company(native: Native, dtype: torch.dtype) -> None:
    product = PackedLinear(*make(70, 300, dtype), native)
    x = torch.randn(50, 300).to(dtype)
    whole = product(x)
    assert all(torch.equal(product(x[first:last]), whole[first:last]) for first, last in [(0, 1), (3, 10), (7, 50)])


def test_float32_weights_that_bfloat16_holds_take_half_the_memory_and_give_the_same_to_the_bit() -> None:
    halves, _ = make(64, 128, torch.bfloat16)
    weight = halves.float()
    odd = weight.clone()
    odd[0, 0] += 1e-3
    half, whole = PackedLinear(weight, None, builds()[0]), PackedLinear(odd, None, builds()[0])
    assert (half.nbytes, whole.nbytes) == (weight.nbytes // 2, weight.nbytes)
    x = torch.randn(9, 128)
    assert torch.equal(half(x)[:, 1:], whole(x)[:, 1:])
    assert half.weight().dtype == torch.float32


@each_build
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_weight_can_be_read_again(native: Native, dtype: torch.dtype) -> None:
    weight, _ = make(33, 20, dtype)
    assert torch.equal(PackedLinear(weight, None, native).weight(), weight)


@each_build
def test_what_is_not_finite_stays_in_its_row_and_column(native: Native) -> None:
    weight, _ = make(40, 16, torch.float32)
    x = torch.randn(3, 16)
    x[1, 2] = float("nan")
    y = PackedLinear(weight, None, native)(x)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()
    weight[5, 3] = float("inf")
    y = PackedLinear(weight, None, native)(torch.ones(2, 16))
    assert y[:, 5].isinf().all()
    assert y[:, 6:].isfinite().all()


@each_build
def test_an_x_of_another_dtype_or_width_is_refused(native: Native) -> None:
    product = PackedLinear(*make(33, 20, torch.float32), native)
    for x in (torch.ones(2, 20, dtype=torch.bfloat16), torch.ones(2, 10)):
        with pytest.raises(ValueError, match="is not for"):
            product(x)
