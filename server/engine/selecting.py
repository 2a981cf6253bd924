"""Where to cut a row of numbers, without putting the row in order.

On a CPU numpy's partition and sort are ten times faster than torch's, where the processor has AVX-512 or AVX2;
elsewhere torch sorts.
"""

from __future__ import annotations

from typing import Any

import numpy
import torch
from numpy.typing import NDArray

Array = NDArray[Any]

_FIRST_BITS, _LATER_BITS = 13, 9
"""The 31 bits of a number that is not negative, looked at in three digits: 13, 9 and 9."""

_INFINITY = 0x7F800000
"""Its bits."""


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` largest of each row, or all, from the largest down."""
    count = min(count, values.shape[-1])
    if values.device.type != "cpu":
        return values.topk(count, dim=-1).values
    rest = values.shape[-1] - count
    found = numpy.partition(values.numpy(), rest, axis=-1)[:, rest:] if rest else values.numpy().copy()
    found.sort(axis=-1)
    return torch.from_numpy(found[:, ::-1].copy())


def reach(keys: torch.Tensor, weights: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """For each row the smallest key such that all tokens up to it together have the weight that is wanted.

    keys, weights: float32 [n, m], none negative; wanted: float64 [n, 1], above 0. Returns float32 [n, 1]; where
    the whole row has not as much, no less than its largest key.
    """
    return (reach_by_digits if keys.device.type == "cpu" else reach_by_sorting)(keys, weights, wanted)


def reach_by_sorting(keys: torch.Tensor, weights: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """`reach` by sorting pairs of a key and its weight, whose bits are in the numbers' own order."""
    pairs = ((keys.view(torch.int32).long() << 32) | weights.view(torch.int32).long()).sort(dim=-1).values
    upto = pairs.int().view(torch.float32).cumsum(-1, dtype=torch.float64)
    last = (upto < wanted).sum(-1, keepdim=True).clamp_(max=keys.shape[-1] - 1)
    return (pairs >> 32).int().view(torch.float32).gather(-1, last)


def reach_by_digits(keys: torch.Tensor, weights: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """`reach` by the keys' bits: weights are summed up by digit, and those of the digit that reaches it by the next."""
    bits, mass, goal = keys.numpy().view(numpy.int32), weights.numpy(), wanted.numpy()
    digits = bits >> (31 - _FIRST_BITS)
    offsets = numpy.arange(len(bits), dtype=numpy.int64)[:, None] << _FIRST_BITS
    at, reached = _find(digits + offsets, mass, _FIRST_BITS, goal, numpy.zeros_like(goal))
    found = at
    keep = numpy.flatnonzero(digits == at)
    rows, bits, mass = keep // bits.shape[-1], bits.ravel()[keep], mass.ravel()[keep]
    for shift in (_LATER_BITS, 0):
        digits = (bits >> shift) & ((1 << _LATER_BITS) - 1)
        at, reached = _find((rows << _LATER_BITS) + digits, mass, _LATER_BITS, goal, reached)
        found = (found << _LATER_BITS) | at
        keep = numpy.flatnonzero(digits == at.ravel()[rows])
        rows, bits, mass = rows[keep], bits[keep], mass[keep]
    return torch.from_numpy(numpy.minimum(found, _INFINITY).astype(numpy.int32).view(numpy.float32))


def _find(index: Array, mass: Array, width: int, goal: Array, reached: Array) -> tuple[Array, Array]:
    """Of each row the digit at which the goal is reached, int64 [n, 1], and what is reached before it.

    index: for each entry of mass, its row's number and its digit of `width` bits.
    """
    sums = numpy.bincount(index.ravel(), weights=mass.ravel(), minlength=len(goal) << width).reshape(len(goal), -1)
    upto = sums.cumsum(-1) + reached
    at = numpy.minimum((upto < goal).sum(-1, keepdims=True), (1 << width) - 1)
    return at, numpy.take_along_axis(upto - sums, at, -1)
