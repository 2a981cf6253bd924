"""Frozen products: the same numbers in whatever layout, and no second copy of the weights."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from natives import builds
from torch import nn
from transformers.pytorch_utils import Conv1D

from weft.kernels.native import Native
from weft.server.engine.attention import WholePrompt
from weft.server.engine.linear import FrozenLinear, Joint, _is_packable, freeze, read
from weft.server.engine.step import running

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}


NATIVES = [None, *builds()]
each_native = pytest.mark.parametrize(
    "native", NATIVES, ids=[f"{n.level} on {n.threads}" if n else "torch" for n in NATIVES]
)


def frozen_of(module: nn.Module, native: Native | None) -> FrozenLinear:
    return FrozenLinear(module, Joint(["name"], [module], native), 0)


def make(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    module = {"linear": nn.Linear(48, 80), "no bias": nn.Linear(48, 80, bias=False), "conv1d": Conv1D(80, 48)}[kind]
    return module.to(dtype).requires_grad_(requires_grad=False)


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 200])
@each_native
def test_the_product_is_the_modules_own(kind: str, dtype: torch.dtype, rows: int, native: Native | None) -> None:
    module = make(kind, dtype)
    x = torch.randn(1, rows, 48).to(dtype)
    expected = module(x)
    frozen = frozen_of(module, native)
    actual = frozen(x)
    assert (actual.dtype, actual.shape, frozen.weight.dtype) == (dtype, expected.shape, dtype)
    assert (actual - expected).float().norm() / expected.float().norm() < TOLERANCE[dtype]


@pytest.mark.skipif(not _is_packable(torch.zeros(4, 4)), reason="no packed product on this processor")
@each_native
def test_the_modules_own_weight_is_dropped_once_packed(native: Native | None) -> None:
    parent = nn.Sequential(make("linear", torch.float32))
    weight = weakref.ref(parent[0].weight)
    freeze(parent, [["0"]], native)
    gc.collect()
    assert isinstance(parent[0], FrozenLinear)
    assert weight() is None


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_native
def test_a_frozen_weight_can_be_read_as_it_was(kind: str, dtype: torch.dtype, native: Native | None) -> None:
    module = make(kind, dtype)
    weight = module.weight.t().clone() if kind == "conv1d" else module.weight.clone()
    assert torch.equal(read(module, "weight"), weight)
    frozen = frozen_of(module, native)
    assert torch.equal(read(frozen, "weight"), weight)
    assert torch.equal(read(frozen, "bias"), module.bias)


@each_native
def test_modules_that_read_the_same_share_one_product(native: Native | None) -> None:
    parent = nn.ModuleList([make("linear", torch.float32), make("no bias", torch.float32)])
    x, other = torch.randn(2, 1, 5, 48)
    expected = [[module(rows) for module in parent] for rows in (x, other)]
    freeze(parent, [["0", "1"]], native)
    step = WholePrompt()
    with running(step):
        for rows, outputs in ((x, expected[0]), (other, expected[1])):
            assert all(torch.allclose(part(rows), y, atol=1e-5) for part, y in zip(parent, outputs, strict=True))
        parent[0](x)
        assert torch.allclose(parent[1](other), expected[1][1], atol=1e-5), "another x is not what was kept"
    assert not step.shared
    assert torch.allclose(parent[1](x), expected[0][1], atol=1e-5), "outside of a step"
