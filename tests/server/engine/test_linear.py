"""Frozen products: the same numbers in whatever layout, and no second copy of the weights."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from weft.server.engine.linear import FrozenLinear, _is_packable, freeze, read

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def make(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    module = {"linear": nn.Linear(48, 80), "no bias": nn.Linear(48, 80, bias=False), "conv1d": Conv1D(80, 48)}[kind]
    return module.to(dtype).requires_grad_(requires_grad=False)


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 200])
def test_the_product_is_the_modules_own(kind: str, dtype: torch.dtype, rows: int) -> None:
    module = make(kind, dtype)
    x = torch.randn(1, rows, 48).to(dtype)
    expected = module(x)
    frozen = FrozenLinear(module, "name")
    actual = frozen(x)
    assert (actual.dtype, actual.shape, frozen.weight.dtype) == (dtype, expected.shape, dtype)
    assert (actual - expected).float().norm() / expected.float().norm() < TOLERANCE[dtype]


@pytest.mark.skipif(not _is_packable(make("linear", torch.float32)), reason="no packed product on this processor")
def test_the_modules_own_weight_is_dropped_once_packed() -> None:
    parent = nn.Sequential(make("linear", torch.float32))
    weight = weakref.ref(parent[0].weight)
    freeze(parent, ["0"])
    gc.collect()
    assert isinstance(parent[0], FrozenLinear)
    assert weight() is None


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_frozen_weight_can_be_read_as_it_was(kind: str) -> None:
    module = make(kind, torch.float32)
    weight = module.weight.t().clone() if kind == "conv1d" else module.weight.clone()
    assert torch.equal(read(module, "weight"), weight)
    frozen = FrozenLinear(module, "name")
    assert torch.equal(read(frozen, "weight"), weight)
    assert torch.equal(read(frozen, "bias"), module.bias)
