"""The stacked A and B rows of every resident adapter at the model's sites."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import numpy
import torch

from weft.kernels.plan import PAGE_ROWS

_L = TypeVar("_L")


def lazy_zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that, on a CPU, take no memory until they are written: torch.zeros would touch every page."""
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(numpy.zeros(num_bytes, dtype=numpy.uint8)).view(dtype).view(*shape)


def to_int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [n, d] to the nearest of 255 steps, and float32 [n] of how much a step is: rows ~ int8 * scale."""
    scale = rows.abs().amax(dim=1).float() / 127 if rows.shape[1] else rows.new_zeros(len(rows), dtype=torch.float32)
    tiny = torch.finfo(torch.float32).tiny
    steps = rows.float() / scale.clamp(min=tiny)[:, None]
    return steps.round().to(torch.int8), scale.where(scale >= tiny, 0.0)  # such a row is nothing


def bytes_of_page(d_in: int, d_out: int, dtype: torch.dtype) -> int:
    """Of one page at a module of this shape."""
    scales = 2 * torch.float32.itemsize if dtype == torch.int8 else 0
    return PAGE_ROWS * ((d_in + d_out) * dtype.itemsize + scales)


Scales = tuple[torch.Tensor, torch.Tensor]
"""Of the rows of A and of B, float32, where these are int8."""


class Site:
    """Page storage for one adapted module: its share of its group's.

    a: [pages, PAGE_ROWS, d_in], b: [pages, PAGE_ROWS, d_out], both contiguous. B is rank-major, so that any rank reads
    whole contiguous rows. scales: of int8 rows, float32 [pages, PAGE_ROWS] each. first_column: where the module's
    output begins in the group's.
    """

    def __init__(
        self, index: int, a: torch.Tensor, b: torch.Tensor, first_column: int, scales: Scales | None = None
    ) -> None:
        self.index = index
        self.a = a
        self.b = b
        self.scales = scales
        self.first_column = first_column
        self._views: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def pools(self) -> tuple[torch.Tensor, ...]:
        """All that pages are made of, each [pages, PAGE_ROWS, ...]."""
        return (self.a, self.b, *(self.scales or ()))

    @property
    def columns(self) -> slice:
        """The module's part of its group's output."""
        return slice(self.first_column, self.first_column + self.b.shape[2])

    def rows(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views (Aᵀ: [d_in, rank rows], B: [rank rows, d_out]) of pages [first, last).

        Kept, because making them costs as much as a small product; they stay valid since the storage never moves.
        """
        views = self._views.get((first, last))
        if views is None:
            views = (self.a[first:last].flatten(0, 1).t(), self.b[first:last].flatten(0, 1))
            self._views[first, last] = views
        return views

    def write(self, runs: tuple[tuple[int, int], ...], a: torch.Tensor | None, b: torch.Tensor | None) -> None:
        """Fill pages with one adapter's rows; a: [r, d_in], b: [r, d_out]; None where it does not touch this site.

        Every row of the pages is written: what a former owner left there never survives.
        """
        row = 0
        halves: list[torch.Tensor | None] = [a, b]
        if self.scales is not None:
            pairs = [(None, None) if half is None else to_int8(half) for half in (a, b)]
            halves = [pair[i] for i in range(2) for pair in pairs]
        for first, last in runs:
            for pool, values in zip(self.pools, halves, strict=True):
                pages = pool[first:last].flatten(0, 1)
                part = values[row : row + len(pages)] if values is not None else pages[:0]
                pages[: len(part)].copy_(part)
                pages[len(part) :].zero_()
            row += (last - first) * PAGE_ROWS


class SiteGroup:
    """Sites whose modules read the same x, so that one call serves all: q, k and v, or gate and up, or one alone.

    a: [sites, pages, PAGE_ROWS, d_in]; b: flat, the sites' own [pages, PAGE_ROWS, d_out] one after the other. Both are
    zero-filled; on a CPU the operating system commits the memory of a page only when it is first written.
    a_scale, b_scale: of int8 rows, what each is multiplied by: float32 [sites, pages, PAGE_ROWS]; else None.
    sites: in the order of their columns in the group's output.
    """

    def __init__(
        self,
        first_index: int,
        d_in: int,
        d_outs: Sequence[int],
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.d_in = d_in
        self.d_outs = tuple(d_outs)
        self.a = lazy_zeros(len(d_outs), num_pages, PAGE_ROWS, d_in, dtype=dtype, device=device)
        self.b = lazy_zeros(num_pages * PAGE_ROWS * sum(d_outs), dtype=dtype, device=device)
        self.a_scale, self.b_scale = (
            lazy_zeros(len(d_outs), num_pages, PAGE_ROWS, dtype=torch.float32, device=device)
            if dtype == torch.int8
            else None
            for _ in range(2)
        )
        self._layouts: dict[object, object] = {}
        parts = torch.split(self.b, [num_pages * PAGE_ROWS * d_out for d_out in d_outs])
        self.sites = tuple(
            Site(
                first_index + i,
                self.a[i],
                part.view(num_pages, PAGE_ROWS, d_out),
                sum(self.d_outs[:i]),
                None if self.a_scale is None or self.b_scale is None else (self.a_scale[i], self.b_scale[i]),
            )
            for i, (part, d_out) in enumerate(zip(parts, d_outs, strict=True))
        )

    @property
    def d_out(self) -> int:
        """Columns of the group's output."""
        return sum(self.d_outs)

    def layout(self, make: Callable[[SiteGroup], _L]) -> _L:
        """What a backend makes of the group, made once."""
        if make not in self._layouts:
            self._layouts[make] = make(self)
        return cast("_L", self._layouts[make])
