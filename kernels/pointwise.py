"""What is done to each row by itself between the products, in the C library: norms, rotary embeddings, activations.

pointwise.c rounds where transformers' own modules do. Tensors are float32 or bfloat16, on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum, IntFlag
from typing import Protocol

import torch

from weft.kernels.native import FORMATS, Native


class NormKind(IntFlag):
    """CENTERED: the mean is taken off first. PLUS_ONE: weights are kept less one. ROUNDED_FIRST: before the weight."""

    CENTERED = 1
    PLUS_ONE = 2
    ROUNDED_FIRST = 4


class RotaryStyle(IntFlag):
    """SHARED: both numbers of a pair have one cosine and sine. INTERLEAVED: a pair is beside each other."""

    SHARED = 1
    INTERLEAVED = 2


class ActivationKind(IntEnum):
    """As torch.nn.functional has them; GELU_TANH is gelu with approximate="tanh"."""

    SILU = 0
    GELU = 1
    GELU_TANH = 2


Rowwise = Callable[[torch.Tensor], torch.Tensor]
"""A norm or an activation: x [..., n] -> y."""

Rotate = Callable[[torch.Tensor, int, torch.Tensor, torch.Tensor], None]
"""A rotary embedding: see `Rotary`."""


class Pointwise(Protocol):
    """Makes what is done to rows, in one way. dtypes: of the rows that it is for."""

    @property
    def dtypes(self) -> frozenset[torch.dtype]: ...

    def norm(self, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, kind: NormKind) -> Rowwise: ...

    def rotary(self, head_dim: int, rotary_dim: int, style: RotaryStyle) -> Rotate: ...

    def activation(self, kind: ActivationKind, *, gated: bool, gate_first: bool = True) -> Rowwise: ...


class NativePointwise:
    """Makes them by the C library."""

    dtypes = frozenset(FORMATS)

    def __init__(self, native: Native) -> None:
        self._native = native

    def norm(self, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, kind: NormKind) -> Norm:
        return Norm(weight, bias, eps, kind, self._native)

    def rotary(self, head_dim: int, rotary_dim: int, style: RotaryStyle) -> Rotary:
        return Rotary(head_dim, rotary_dim, style, self._native)

    def activation(self, kind: ActivationKind, *, gated: bool, gate_first: bool = True) -> Activation:
        return Activation(kind, self._native, gated=gated, gate_first=gate_first)


class Norm:
    """y = x / sqrt(mean(x^2) + eps) * weight + bias, for each run of len(weight) numbers."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, kind: NormKind, native: Native
    ) -> None:
        self.size = len(weight)
        self._dtype = weight.dtype
        self._weight, self._bias = weight.detach().contiguous(), None if bias is None else bias.detach().contiguous()
        self._parameters = self._weight.data_ptr(), None if self._bias is None else self._bias.data_ptr()
        self._how = eps, int(kind), FORMATS[weight.dtype], native.threads
        self._norm = native.call.weft_norm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., n * size] of the weight's dtype -> the same shape. Raises ValueError for another x."""
        if x.dtype != self._dtype or x.shape[-1] % self.size:
            raise ValueError(f"a norm of {self.size} numbers in {self._dtype} is not for {tuple(x.shape)} in {x.dtype}")
        x, rows, stride = by_rows(x)
        width = x.shape[-1]
        y = x.new_empty(x.shape)
        self._norm(
            x.data_ptr(),
            *self._parameters,
            y.data_ptr(),
            rows,
            width // self.size,
            self.size,
            stride,
            width,
            *self._how,
        )
        return y


class Rotary:
    """Turns pairs of numbers of each head; rotate_half(x) is (-second, first).

    x cos + rotate_half(x) sin, over the first numbers of each head; the rest of it stays as it is.
    """

    def __init__(self, head_dim: int, rotary_dim: int, style: RotaryStyle, native: Native) -> None:
        self._head_dim, self._rotary_dim, self._style = head_dim, rotary_dim, int(style)
        self._table_dim = rotary_dim // 2 if style & RotaryStyle.SHARED else rotary_dim
        self._rotate, self._threads = native.call.weft_rotate, native.threads

    def __call__(self, x: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """In place. x: [..., n], its first numbers those of the heads; cos, sin: [..., d]; all dense, of one dtype.

        Raises ValueError for tables that are too narrow, or not for as many rows.
        """
        rows = x.numel() // x.shape[-1]
        if cos.shape != sin.shape or cos.shape[-1] < self._table_dim or cos.numel() != rows * cos.shape[-1]:
            raise ValueError(f"tables {tuple(cos.shape)}, {tuple(sin.shape)} are not for {rows} rows")
        self._rotate(
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            rows,
            heads,
            self._head_dim,
            self._rotary_dim,
            x.shape[-1],
            cos.shape[-1],
            self._style,
            FORMATS[x.dtype],
            self._threads,
        )


class Activation:
    """act(gate) * up, where one product gave both; else act(x)."""

    def __init__(self, kind: ActivationKind, native: Native, *, gated: bool, gate_first: bool = True) -> None:
        self._kind, self._gated, self._gate_first = int(kind), gated, gate_first
        self._act, self._threads = native.call.weft_act, native.threads

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., 2 * size] -> [..., size]; not gated, [..., size] -> [..., size]."""
        x, rows, stride = by_rows(x)
        size = x.shape[-1] // 2 if self._gated else x.shape[-1]
        y = x.new_empty((*x.shape[:-1], size))
        first = x.data_ptr()
        second = first + size * x.itemsize if self._gated else None
        gate, up = (first, second) if self._gate_first else (second, first)
        self._act(gate, up, y.data_ptr(), rows, size, stride, size, self._kind, FORMATS[x.dtype], self._threads)
        return y


def by_rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """x [..., n] with its rows evenly apart and whole, a copy where they are not; how many; numbers between them."""
    width = x.shape[-1]
    rows = x.numel() // width
    if x.is_contiguous():
        return x, rows, width
    if x.stride(-1) == 1 and x.shape[-2] == rows:
        return x, rows, x.stride(-2)
    return x.contiguous(), rows, width
