"""Bottleneck adapters: a small network beside a sub-layer of a block, on what it gives to the residual stream.

Houlsby et al. 2019, Pfeiffer et al. 2020, He et al. 2021 (parallel); they differ in what the network reads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial

import torch
from torch.nn import functional

from weft.kernels.linear import PackedLinear
from weft.kernels.native import FORMATS, Native
from weft.kernels.patches import Patch, Rows

NON_LINEARITIES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "leakyrelu": functional.leaky_relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
"""By their names in transformers and in AdapterHub's library, in the order in which activations.h numbers them."""


class Reads(StrEnum):
    """What goes into the network: the sub-layer's output, the residual stream before the sub-layer, or their sum.

    In the order in which bottleneck.c numbers them.
    """

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
class Bottleneck:
    """A patch: `reference.bottleneck` in PyTorch."""

    weights: BottleneckWeights
    is_sum: bool = False

    @property
    def ends(self) -> tuple[torch.Tensor, ...]:
        """Of which all that it adds is made: the up-projection's weight and bias."""
        return self.weights.up, self.weights.up_bias

    def apply(self, y: torch.Tensor, inputs: Rows, weight: float) -> torch.Tensor:
        """inputs: of the module, then the residual stream."""
        own = self.weights
        down = functional.linear(own.reads.of(y, inputs[-1]), own.down, own.down_bias)
        return y + functional.linear(NON_LINEARITIES[own.non_linearity](down), own.up, own.up_bias)

    def to(self, device: torch.device) -> Bottleneck:
        own = self.weights
        down, down_bias, up, up_bias = (tensor.to(device) for tensor in own.tensors.values())
        return Bottleneck(replace(own, down=down, down_bias=down_bias, up=up, up_bias=up_bias))


class _Network(ctypes.Structure):
    """`struct bottleneck`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("down", "up", "down_bias", "up_bias")),
        *((name, ctypes.c_int64) for name in ("width", "rank")),
        *((name, ctypes.c_int) for name in ("down_format", "up_format", "activation", "reads")),
    )


@dataclass(frozen=True, slots=True, eq=False)
class NativeBottleneck:
    """The same by the C library, on a CPU for good; a row comes out the same whatever the other rows are.

    run: of y and the residual stream, [n, d] with adjacent columns; down, up, network: what it reads.
    """

    down: PackedLinear
    up: PackedLinear
    network: _Network
    run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    is_sum: bool = False

    @property
    def ends(self) -> tuple[torch.Tensor, ...]:
        """As `Bottleneck.ends`, packed."""
        return self.up.tensors

    def apply(self, y: torch.Tensor, inputs: Rows, weight: float) -> torch.Tensor:
        """As `Bottleneck.apply`."""
        return self.run(y, inputs[-1])

    def to(self, device: torch.device) -> NativeBottleneck:
        return self


def _pack(weights: BottleneckWeights, native: Native) -> NativeBottleneck:
    down = PackedLinear(weights.down, weights.down_bias, native)
    up = PackedLinear(weights.up, weights.up_bias, native)
    (down_weight, down_bias), (up_weight, up_bias) = down.tensors, up.tensors
    network = _Network(
        *(tensor.data_ptr() for tensor in (down_weight, up_weight, down_bias, up_bias)),
        *(down.d_in, down.d_out, FORMATS[down_weight.dtype], FORMATS[up_weight.dtype]),
        *(list(NON_LINEARITIES).index(weights.non_linearity), list(Reads).index(weights.reads)),
    )
    width, numbers, how = down.d_in, down.d_in + down.d_out, (FORMATS[down.dtype], native.threads)
    call, address = native.call.weft_bottleneck, ctypes.addressof(network)

    def run(y: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        rows = len(y)
        made = y.new_empty(rows, width)
        scratch = torch.empty(rows * numbers)
        call(
            address,
            *(y.data_ptr(), residual.data_ptr(), made.data_ptr(), scratch.data_ptr()),
            *(rows, y.stride(0), residual.stride(0), *how),
        )
        return made

    return NativeBottleneck(down, up, network, run)


def make_bottleneck(weights: BottleneckWeights, dtype: torch.dtype, native: Native | None) -> Patch:
    """The patch for rows of a dtype. native: the C library, where it computes what else there is of the model."""
    down, down_bias, up, up_bias = (tensor.to(dtype) for tensor in weights.tensors.values())
    weights = replace(weights, down=down, down_bias=down_bias, up=up, up_bias=up_bias)
    return Bottleneck(weights) if native is None else _pack(weights, native)
