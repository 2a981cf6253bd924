"""Bottleneck adapters: a small network beside one sub-layer of a block, on what it gives to the residual stream.

Houlsby et al. 2019, Pfeiffer et al. 2020, He et al. 2021 (parallel); they differ in what the network reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial

import torch
from torch.nn import functional

from weft.kernels.linear import PackedLinear
from weft.kernels.native import FORMATS, Native
from weft.kernels.patches import Rows
from weft.kernels.pointwise import ActivationKind, NativePointwise, Rowwise

NON_LINEARITIES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "leakyrelu": functional.leaky_relu,
    "relu": functional.relu,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "tanh": torch.tanh,
}
"""By their names in transformers and in AdapterHub's library."""

_IN_LIBRARY = {
    "gelu": ActivationKind.GELU,
    "gelu_new": ActivationKind.GELU_TANH,
    "silu": ActivationKind.SILU,
}
_WHOLE_VECTORS = 64
"""PyTorch computes the numbers at the end of a tensor, where they fill no vector, by another function."""


class Reads(StrEnum):
    """What goes into the network: the sub-layer's output, the residual stream before the sub-layer, or their sum."""

    OUTPUT = "output"
    RESIDUAL = "residual"
    SUM = "sum"

    def of(self, y: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        match self:
            case Reads.OUTPUT:
                return y
            case Reads.RESIDUAL:
                return residual
            case Reads.SUM:
                return y + residual


@dataclass(frozen=True, slots=True)
class BottleneckWeights:
    """down: [r, d], down_bias: [r], up: [d, r], up_bias: [d]; non_linearity: one of `NON_LINEARITIES`."""

    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor
    non_linearity: str
    reads: Reads

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"down": self.down, "down.bias": self.down_bias, "up": self.up, "up.bias": self.up_bias}


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """x W^T + b in PyTorch; weight: [d_out, d_in], bias: [d_out]."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.weight, self.bias

    def to(self, device: torch.device) -> Dense:
        return Dense(self.weight.to(device), self.bias.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class Bottleneck:
    """A patch: `reference.bottleneck`, by the C library where that computes: a row is then the same in any company."""

    down: Dense | PackedLinear
    non_linearity: Rowwise
    up: Dense | PackedLinear
    reads: Reads
    is_sum: bool = False

    def apply(self, y: torch.Tensor, inputs: Rows, weight: float) -> torch.Tensor:
        """inputs: of the module, then the residual stream."""
        return y + self.up(self.non_linearity(self.down(self.reads.of(y, inputs[-1]))))

    def to(self, device: torch.device) -> Bottleneck:
        return replace(self, down=self.down.to(device), up=self.up.to(device))


def make_bottleneck(weights: BottleneckWeights, dtype: torch.dtype, native: Native | None) -> Bottleneck:
    """The patch for rows of a dtype. native: the C library, where rows are on a CPU that it computes on."""
    halves = [(weights.down, weights.down_bias), (weights.up, weights.up_bias)]
    down, up = ((weight.to(dtype), bias.to(dtype)) for weight, bias in halves)
    if native is None or dtype not in FORMATS:
        return Bottleneck(Dense(*down), NON_LINEARITIES[weights.non_linearity], Dense(*up), weights.reads)
    act = _in_any_company(weights.non_linearity, native)
    return Bottleneck(PackedLinear(*down, native), act, PackedLinear(*up, native), weights.reads)


def _in_any_company(non_linearity: str, native: Native) -> Rowwise:
    if non_linearity in _IN_LIBRARY:
        return NativePointwise(native).activation(_IN_LIBRARY[non_linearity], gated=False)
    function = NON_LINEARITIES[non_linearity]

    def act(x: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1]
        return function(functional.pad(x, (0, -width % _WHOLE_VECTORS)))[..., :width]

    return act
