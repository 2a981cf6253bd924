"""Rank rows in host memory, as pages will hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy
import torch

from weft.kernels.site import to_int8

Halves = tuple[torch.Tensor, torch.Tensor]
"""Rank rows of one module: A [rank, d_in], B [rank, d_out]."""

HeldRows = Mapping[str, tuple[torch.Tensor, ...]]
"""By module: A and B, contiguous; of int8 rows also the scales of A and of B, float32 [rank]."""


@dataclass(frozen=True, slots=True)
class RowForm:
    """How rows are held.

    base: the base's dtype, to which they are rounded first. dtype: the same, or int8. pinned: whether they are
    page-locked, for a CUDA device to fetch.
    """

    base: torch.dtype
    dtype: torch.dtype
    pinned: bool

    def hold(self, rows: Mapping[str, Halves]) -> HeldRows:
        """Copies of rows of the base's dtype."""
        held = self.make_room({name: (tuple(a.shape), tuple(b.shape)) for name, (a, b) in rows.items()})
        for name, halves in rows.items():
            for i, half in enumerate(halves):
                self.put(held[name], i, half)
        return held

    def make_room(self, shapes: Mapping[str, tuple[tuple[int, ...], ...]]) -> HeldRows:
        """For rows of these shapes, in one piece of memory."""
        sizes = [math.prod(shape) for halves in shapes.values() for shape in halves]
        parts = iter(torch.split(self._memory(sum(sizes), self.dtype), sizes))
        held = {name: tuple(next(parts).view(shape) for shape in halves) for name, halves in shapes.items()}
        if self.dtype != torch.int8:
            return held
        ranks = [shape[0] for halves in shapes.values() for shape in halves]
        scales = iter(torch.split(self._memory(sum(ranks), torch.float32), ranks))
        return {name: (*halves, *(next(scales) for _ in halves)) for name, halves in held.items()}

    def put(self, held: tuple[torch.Tensor, ...], index: int, half: torch.Tensor) -> None:
        """Fill A (index 0) or B (1) of a module, and its scales where it has any."""
        if self.dtype != torch.int8:
            held[index].copy_(half)
            return
        steps, scale = to_int8(half.to(self.base))
        held[index].copy_(steps)
        held[2 + index].copy_(scale)

    def _memory(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Numpy's memory where it need not be page-locked: in huge pages, which take a fraction of the time to come."""
        if self.pinned or count == 0:
            return torch.empty(count, dtype=dtype, pin_memory=self.pinned)
        return torch.from_numpy(numpy.empty(count * dtype.itemsize, dtype=numpy.uint8)).view(dtype)


def rounding_error(rows: Mapping[str, Halves], held: HeldRows) -> float:
    """How far int8 rows are from those that they were made of, as a share of a module's delta, at the most.

    ||D' - D|| / ||D|| in Frobenius' norm, where D = B^T A.
    """
    return max((_rounding(*rows[name], held[name]) for name in held), default=0.0)


def _rounding(a: torch.Tensor, b: torch.Tensor, held: tuple[torch.Tensor, ...]) -> float:
    """||B'^T A' - B^T A||^2 is the sum over (i, j) of (A_i . A_j) (B_i . B_j) for the rows of [A', A] and [B', -B]."""
    a_all, b_all = (
        torch.cat([steps.double() * scale.double()[:, None], sign * half.double()])
        for steps, scale, half, sign in zip(held[:2], held[2:], (a, b), (1, -1), strict=True)
    )
    off = ((a_all @ a_all.t()) * (b_all @ b_all.t())).sum().clamp(min=0)
    rank = len(a)
    whole = ((a_all[rank:] @ a_all[rank:].t()) * (b_all[rank:] @ b_all[rank:].t())).sum()
    return float((off / whole).sqrt()) if whole > 0 else 0.0
