"""Norms, rotary embeddings and activations of the C library, against torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from natives import each_build
from torch.nn import functional

from weft.kernels.native import Native
from weft.kernels.pointwise import Activation, ActivationKind, Norm, NormKind, Rotary, RotaryStyle

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
FUNCTIONS: dict[ActivationKind, Callable[[torch.Tensor], torch.Tensor]] = {
    ActivationKind.SILU: functional.silu,
    ActivationKind.GELU: functional.gelu,
    ActivationKind.GELU_TANH: partial(functional.gelu, approximate="tanh"),
}

each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    torch.manual_seed(len(shape) + shape[-1])
    return (torch.randn(shape) * scale).to(dtype)


def assert_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    errors = (ours.double() - theirs.double()).norm(dim=-1) / theirs.double().norm(dim=-1)
    assert errors.max() <= TOLERANCE[ours.dtype]


def plain_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, kind: NormKind
) -> torch.Tensor:
    h = x.float()
    if kind & NormKind.CENTERED:
        h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if kind & NormKind.ROUNDED_FIRST:
        h = h.to(x.dtype).float()
    h = h * (weight.float() + (1 if kind & NormKind.PLUS_ONE else 0))
    return (h if bias is None else h + bias.float()).to(x.dtype)


@each_build
@each_dtype
@pytest.mark.parametrize("kind", [NormKind(bits) for bits in range(8)], ids=repr)
@pytest.mark.parametrize("size", [16, 64, 77, 576])
def test_a_norm_is_its_formula(native: Native, dtype: torch.dtype, kind: NormKind, size: int) -> None:
    weight = draw(size, dtype=dtype)
    bias = draw(size, dtype=dtype, scale=0.1) if kind & NormKind.CENTERED else None
    norm = Norm(weight, bias, 1e-5, kind, native)
    for scale in (1e-3, 1.0, 1e3):
        for x in (draw(1, 5, size, dtype=dtype, scale=scale), draw(1, 5, 3 * size, dtype=dtype, scale=scale)):
            by_group = x.view(1, 5, -1, size)
            assert_near(norm(x).view(by_group.shape), plain_norm(by_group, weight, bias, 1e-5, kind))


@each_build
@each_dtype
def test_columns_of_a_joint_product_are_normed_in_place_of_a_copy(native: Native, dtype: torch.dtype) -> None:
    joint, weight = draw(1, 6, 96, dtype=dtype), draw(16, dtype=dtype)
    norm = Norm(weight, None, 1e-6, NormKind(0), native)
    part = joint[..., 16:64]
    expected = plain_norm(part.unflatten(-1, (3, 16)), weight, None, 1e-6, NormKind(0))
    assert_near(norm(part).unflatten(-1, (3, 16)), expected)
    assert_near(norm(part.unflatten(-1, (3, 16))), expected)


def plain_rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: RotaryStyle) -> torch.Tensor:
    """x: [T, heads, d], cos, sin: [T, d]. As transformers writes it."""
    half = x.shape[-1] // 2
    if style & RotaryStyle.SHARED:
        twice = torch.repeat_interleave if style & RotaryStyle.INTERLEAVED else _one_after_the_other
        cos, sin = (twice(table[..., :half], 2, -1) for table in (cos, sin))
    if style & RotaryStyle.INTERLEAVED:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos[:, None] + turned * sin[:, None]


def _one_after_the_other(table: torch.Tensor, times: int, dim: int) -> torch.Tensor:
    return torch.cat([table] * times, dim)


@each_build
@each_dtype
@pytest.mark.parametrize("style", [RotaryStyle(bits) for bits in range(4)], ids=repr)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (16, 16), (80, 32), (24, 10)])
def test_a_rotation_is_transformers_own(
    native: Native, dtype: torch.dtype, style: RotaryStyle, head_dim: int, rotary_dim: int
) -> None:
    joint = draw(1, 5, 4 * head_dim + 7, dtype=dtype)
    cos, sin = draw(1, 5, rotary_dim, dtype=dtype), draw(1, 5, 1, rotary_dim, dtype=dtype)[:, :, 0]
    before, part = joint.clone(), joint[..., : 3 * head_dim]
    heads = part[0].unflatten(-1, (3, head_dim)).clone()
    heads[..., :rotary_dim] = plain_rotation(heads[..., :rotary_dim], cos[0], sin[0], style)
    Rotary(head_dim, rotary_dim, style, native)(joint, 3, cos, sin)
    assert_near(part[0].unflatten(-1, (3, head_dim)), heads)
    assert torch.equal(joint[..., 3 * head_dim :], before[..., 3 * head_dim :])


@each_build
@each_dtype
@pytest.mark.parametrize("kind", ActivationKind, ids=lambda kind: kind.name)
def test_an_activation_is_torchs(native: Native, dtype: torch.dtype, kind: ActivationKind) -> None:
    for size in (16, 96, 1501):
        x = draw(1, 4, 2 * size + 3, dtype=dtype, scale=4.0)[..., : 2 * size]
        left, right = x[..., :size], x[..., size:]
        act = FUNCTIONS[kind]
        assert_near(Activation(kind, native, gated=True)(x), act(left) * right)
        assert_near(Activation(kind, native, gated=True, gate_first=False)(x), left * act(right))
        assert_near(Activation(kind, native, gated=False)(x), act(x))


@each_build
@pytest.mark.parametrize("kind", ActivationKind, ids=lambda kind: kind.name)
def test_numbers_far_out_and_missing_come_out_as_torchs(native: Native, kind: ActivationKind) -> None:
    x = torch.tensor([[-1e30, -200.0, -88.0, -20.0, -1e-30, 0.0, 1e-30, 20.0, 88.0, 200.0, 1e30, float("nan")]])
    ours, theirs = Activation(kind, native, gated=False)(x), FUNCTIONS[kind](x)
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7, equal_nan=True)


@each_build
@each_dtype
def test_a_row_is_the_same_to_the_bit_whatever_rows_are_beside_it(native: Native, dtype: torch.dtype) -> None:
    x = draw(1, 300, 576, dtype=dtype)
    functions = [
        Norm(draw(576, dtype=dtype), None, 1e-6, NormKind.ROUNDED_FIRST, native),
        Activation(ActivationKind.SILU, native, gated=True),
    ]
    for function in functions:
        whole = function(x)
        assert all(torch.equal(function(x[:, i : i + 1])[0], whole[0, i : i + 1]) for i in range(0, 300, 7))


@each_build
def test_what_a_norm_or_a_rotation_was_not_made_for_is_refused(native: Native) -> None:
    norm = Norm(torch.ones(16), None, 1e-5, NormKind(0), native)
    for x in (draw(2, 16, dtype=torch.bfloat16), draw(2, 24)):
        with pytest.raises(ValueError, match="is not for"):
            norm(x)
    x, narrow, few = draw(1, 5, 64), draw(1, 5, 15), draw(1, 4, 32)
    for style in RotaryStyle(0), RotaryStyle.SHARED:
        rotary = Rotary(32, 32, style, native)
        for cos, sin in ((narrow, narrow), (few, few), (draw(1, 5, 32), narrow)):
            with pytest.raises(ValueError, match="are not for"):
                rotary(x, 2, cos, sin)
