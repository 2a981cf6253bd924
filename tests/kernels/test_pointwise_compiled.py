"""What is handed to PyTorch's compiler is what the C library computes; compiled it is in `test_compiling.py`."""

from __future__ import annotations

import pytest
import torch
from natives import each_build

from weft.kernels.native import Native
from weft.kernels.pointwise import ActivationKind, NativePointwise, NormKind, RotaryStyle
from weft.kernels.pointwise_compiled import CompiledPointwise

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}

each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(len(shape) + shape[-1])
    return torch.randn(shape).to(dtype)


def assert_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    errors = (ours.double() - theirs.double()).norm(dim=-1) / theirs.double().norm(dim=-1)
    assert errors.max() <= TOLERANCE[ours.dtype]


@each_build
@each_dtype
@pytest.mark.parametrize("kind", [NormKind(bits) for bits in range(8)], ids=repr)
def test_norms(native: Native, dtype: torch.dtype, kind: NormKind) -> None:
    x, weight, bias = draw(1, 5, 3, 24, dtype=dtype), draw(24, dtype=dtype), draw(1, 24, dtype=dtype)[0]
    ours, theirs = (
        made_by.norm(weight, bias, 1e-5, kind)(x) for made_by in (CompiledPointwise(), NativePointwise(native))
    )
    assert_near(ours, theirs)


@each_build
@each_dtype
@pytest.mark.parametrize("style", [RotaryStyle(bits) for bits in range(4)], ids=repr)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (24, 10)])
def test_rotary_embeddings(
    native: Native, dtype: torch.dtype, style: RotaryStyle, head_dim: int, rotary_dim: int
) -> None:
    cos, sin = draw(1, 5, rotary_dim, dtype=dtype), draw(1, 5, 1, rotary_dim, dtype=dtype)[:, :, 0]
    ours, theirs = (draw(1, 5, 4 * head_dim + 7, dtype=dtype) for _ in range(2))
    CompiledPointwise().rotary(head_dim, rotary_dim, style)(ours, 3, cos, sin)
    NativePointwise(native).rotary(head_dim, rotary_dim, style)(theirs, 3, cos, sin)
    assert_near(ours, theirs)


@each_build
@each_dtype
@pytest.mark.parametrize("kind", ActivationKind, ids=lambda kind: kind.name)
@pytest.mark.parametrize("how", [{"gated": True}, {"gated": True, "gate_first": False}, {"gated": False}], ids=str)
def test_activations(native: Native, dtype: torch.dtype, kind: ActivationKind, how: dict[str, bool]) -> None:
    x = draw(1, 4, 96, dtype=dtype)
    ours, theirs = (made_by.activation(kind, **how)(x) for made_by in (CompiledPointwise(), NativePointwise(native)))
    assert_near(ours, theirs)


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="a norm of 16 numbers is not for"):
        CompiledPointwise().norm(torch.ones(16), None, 1e-5, NormKind(0))(torch.ones(1, 2, 24))
    with pytest.raises(ValueError, match="too narrow"):
        CompiledPointwise().rotary(16, 16, RotaryStyle(0))(torch.ones(1, 2, 64), 3, *torch.ones(2, 1, 2, 8))
