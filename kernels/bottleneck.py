"""Bottleneck adapters: a small network beside a sub-layer of a block, on what it gives to the residual stream.

Houlsby et al. 2019, Pfeiffer et al. 2020, He et al. 2021 (parallel); they differ in what the network reads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial

import torch
from torch.nn import functional

from weft.kernels.linear import PackedLinear
from weft.kernels.native import FORMATS, Native
from weft.kernels.patches import Patch, Rows
from weft.kernels.plan import Plan, all_rows

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


_PIECE_ROWS = 12
"""The most that linear.c does side by side."""


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


class _Piece(ctypes.Structure):
    """`struct piece`."""

    _fields_ = (("network", ctypes.c_void_p), ("first", ctypes.c_int64), ("rows", ctypes.c_int64))


@dataclass(frozen=True, slots=True, eq=False)
class NativeBottleneck:
    """The same by the C library, on a CPU for good; a row comes out the same whatever the other rows are.

    network: as the library takes it, of down and up.
    """

    down: PackedLinear
    up: PackedLinear
    network: _Network
    native: Native
    is_sum: bool = False

    @classmethod
    def of(cls, weights: BottleneckWeights, native: Native) -> NativeBottleneck:
        down = PackedLinear(weights.down, weights.down_bias, native)
        up = PackedLinear(weights.up, weights.up_bias, native)
        (down_weight, down_bias), (up_weight, up_bias) = down.tensors, up.tensors
        network = _Network(
            *(tensor.data_ptr() for tensor in (down_weight, up_weight, down_bias, up_bias)),
            *(down.d_in, down.d_out, FORMATS[down_weight.dtype], FORMATS[up_weight.dtype]),
            *(list(NON_LINEARITIES).index(weights.non_linearity), list(Reads).index(weights.reads)),
        )
        return cls(down, up, network, native)

    @property
    def ends(self) -> tuple[torch.Tensor, ...]:
        """As `Bottleneck.ends`, packed."""
        return self.up.tensors

    def apply(self, y: torch.Tensor, inputs: Rows, weight: float) -> torch.Tensor:
        """As `Bottleneck.apply`."""
        made = y.clone()
        Together([(self, range(len(y)))]).add(made, inputs[-1])
        return made

    def to(self, device: torch.device) -> NativeBottleneck:
        return self


class Together:
    """What all bottlenecks behind one module do to a step's rows, in one call of the library."""

    def __init__(self, work: Sequence[tuple[NativeBottleneck, Sequence[int]]]) -> None:
        """work: each with its rows, ascending."""
        cut = [(patch, piece) for patch, rows in work for piece in _pieces(rows)]
        self._held = [patch for patch, _ in work]
        self._pieces = (_Piece * len(cut))(
            *(_Piece(ctypes.addressof(patch.network), piece[0], len(piece)) for patch, piece in cut)
        )
        self._stride = max(patch.network.width + patch.network.rank for patch in self._held)
        self._native = self._held[0].native

    def add(self, y: torch.Tensor, residual: torch.Tensor) -> None:
        """y, residual: all rows of the step, [T, d] with adjacent columns; y is changed in place."""
        scratch = torch.empty(len(y) * self._stride)
        self._native.call.weft_bottleneck(
            *(ctypes.addressof(self._pieces), len(self._pieces)),
            *(y.data_ptr(), residual.data_ptr(), scratch.data_ptr()),
            *(y.stride(0), residual.stride(0), self._stride, FORMATS[y.dtype], self._native.threads),
        )


def _pieces(rows: Sequence[int]) -> Iterator[Sequence[int]]:
    """Adjacent rows, no more than are worth doing in one go."""
    start = 0
    for stop in range(1, len(rows) + 1):
        if stop == len(rows) or stop - start == _PIECE_ROWS or rows[stop] != rows[stop - 1] + 1:
            yield rows[start:stop]
            start = stop


def together_of(plan: Plan) -> Mapping[str, Together]:
    """By the name of the module."""
    found = {
        name: [
            (each.patch, all_rows(each.rows, plan.num_tokens))
            for each in patched
            if isinstance(each.patch, NativeBottleneck)
        ]
        for name, patched in plan.patches.items()
    }
    return {name: Together(work) for name, work in found.items() if work}


def make_bottleneck(weights: BottleneckWeights, dtype: torch.dtype, native: Native | None) -> Patch:
    """The patch for rows of a dtype. native: the C library, where it computes what else there is of the model."""
    down, down_bias, up, up_bias = (tensor.to(dtype) for tensor in weights.tensors.values())
    weights = replace(weights, down=down, down_bias=down_bias, up=up, up_bias=up_bias)
    return Bottleneck(weights) if native is None else NativeBottleneck.of(weights, native)
