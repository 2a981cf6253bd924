"""The batched gather-matmul in the C library; lora.c describes how it works."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any

import numpy.typing
import torch

from weft.kernels.native import FORMATS, Native
from weft.kernels.plan import PAGE_ROWS, PagedAdapter, Plan, Weighted
from weft.kernels.site import SiteGroup

CHUNK_ROWS = 48
"""Rows with the same pages that one piece of work is for: enough that reading pages costs little beside using them."""


_Array = numpy.typing.NDArray[Any]


class _Group(ctypes.Structure):
    """`struct lora_group`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "a_scale", "b_scale", "d_outs")),
        *((name, ctypes.c_int64) for name in ("sites", "first_site", "pages", "d_in", "format")),
    )


class _Plan(ctypes.Structure):
    """`struct lora_plan`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "first_row", "first_entry", "chunk", "page", "count", "sites")),
        *((name, ctypes.c_void_p) for name in ("scale", "coef", "touched", "coefs")),
        *((name, ctypes.c_int64) for name in ("num_sites", "num_chunks", "num_entries", "num_coefs")),
    )


class NativeLora:
    """A backend; of float32, bfloat16 and int8 pages, and float32 and bfloat16 rows."""

    def __init__(self, native: Native) -> None:
        self._lora = native.call.weft_lora
        self._threads = native.threads

    @staticmethod
    def takes(group: SiteGroup, dtype: torch.dtype) -> bool:
        """Whether it is for pages such as this group's, and rows of a dtype."""
        kinds = (torch.float32, torch.bfloat16)
        return group.a.device.type == "cpu" and dtype in kinds and group.a.dtype in (dtype, torch.int8)

    def __call__(self, y: torch.Tensor, x: torch.Tensor, group: SiteGroup, plan: Plan) -> torch.Tensor:
        """As `reference.add_lora` says; a row of y comes out the same whatever the other rows and the threads are."""
        rows = x if x.dtype == torch.float32 else x.float()
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        assert y.stride(1) == 1, "the columns of y must be adjacent"
        described, layout = group.layout(_describe), plan.layout(_Layout.of)
        if described.num_sites > layout.room or described.stop > layout.covered:
            layout.make_ready(described)
        self._lora(
            described.address,
            layout.address,
            rows.data_ptr(),
            y.data_ptr(),
            rows.stride(0),
            y.stride(0),
            FORMATS[y.dtype],
            self._threads,
        )
        return y


@dataclass(frozen=True, slots=True)
class _Described:
    """A group as the library takes it.

    address: of the struct. stop: the index behind that of its last site. held: what lies at addresses.
    """

    address: int
    num_sites: int
    stop: int
    held: tuple[object, ...]


def _describe(group: SiteGroup) -> _Described:
    d_outs = numpy.array(group.d_outs, dtype=numpy.int64)
    scales = [None if scale is None else scale.data_ptr() for scale in (group.a_scale, group.b_scale)]
    struct = _Group(
        *(group.a.data_ptr(), group.b.data_ptr(), *scales, d_outs.ctypes.data),
        *(len(d_outs), group.sites[0].index, group.a.shape[1], group.d_in, FORMATS[group.a.dtype]),
    )
    return _Described(ctypes.addressof(struct), len(d_outs), group.sites[-1].index + 1, (struct, d_outs))


@dataclass(slots=True)
class _Layout:
    """A plan as the library takes it.

    address: of the struct. sets: what modules its entries are for. arrays: what the struct points to. room: sites whose
    coefficients there is memory for. covered: sites that `touched` tells of.
    """

    struct: _Plan
    sets: tuple[frozenset[int], ...]
    arrays: tuple[_Array, ...]
    address: int
    room: int = 0
    covered: int = 0
    coefs: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    touched: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def of(cls, plan: Plan) -> _Layout:
        """Chunks of rows with the same mix, each with its adapters' pages in the mix's order."""
        chunks = [
            (rows[at : at + CHUNK_ROWS], mix)
            for mix, rows in _rows_by_mix(plan).items()
            for at in range(0, len(rows), CHUNK_ROWS)
        ]
        sets: dict[frozenset[int], int] = {}
        entries: list[tuple[int, int, int, int]] = []
        scales: list[float] = []
        first_entry = [0]
        for number, (_, mix) in enumerate(chunks):
            for adapter, weight in mix:
                of_sites = sets.setdefault(adapter.sites, len(sets))
                pages = _pages_of(adapter)
                entries += [(number, page, count, of_sites) for page, count in pages]
                scales += [adapter.scale * weight] * len(pages)
            first_entry.append(len(entries))
        first_row = list(accumulate((len(rows) for rows, _ in chunks), initial=0))
        coef = list(accumulate((PAGE_ROWS * len(chunks[number][0]) for number, *_ in entries), initial=0))
        columns = numpy.array(entries, dtype=numpy.int32).reshape(-1, 4).T
        rows = numpy.array(list(chain.from_iterable(rows for rows, _ in chunks)), dtype=numpy.int32)
        arrays: tuple[_Array, ...] = (
            *(rows, numpy.array(first_row, dtype=numpy.int32), numpy.array(first_entry, dtype=numpy.int32)),
            *(numpy.ascontiguousarray(column) for column in columns),
            *(numpy.array(scales, dtype=numpy.float32), numpy.array(coef, dtype=numpy.int64)),
        )
        struct = _Plan(*(array.ctypes.data for array in arrays), None, None, 0, len(chunks), len(entries), coef[-1])
        return cls(struct, tuple(sets), arrays, ctypes.addressof(struct))

    def make_ready(self, group: _Described) -> None:
        """Make room for the group's coefficients, and note whom entries touch."""
        if group.num_sites > self.room:
            self.room = group.num_sites
            self.coefs = torch.empty(self.room * self.struct.num_coefs)
            self.struct.coefs = self.coefs.data_ptr()
        if group.stop > self.covered:
            self.covered = max([group.stop, *(max(sites, default=-1) + 1 for sites in self.sets)])
            self.touched = torch.zeros(len(self.sets), self.covered, dtype=torch.uint8)
            for row, sites in zip(self.touched, self.sets, strict=True):
                row[list(sites)] = 1
            self.struct.touched, self.struct.num_sites = self.touched.data_ptr(), self.covered


def _rows_by_mix(plan: Plan) -> dict[Sequence[Weighted], list[int]]:
    """Rows that use the same adapters with the same weights."""
    shared: dict[Sequence[Weighted], list[int]] = {}
    for rows, mix in plan.mixes:
        shared.setdefault(mix, []).extend(rows)
    return shared


def _pages_of(adapter: PagedAdapter) -> list[tuple[int, int]]:
    """Its pages that hold rank rows, and how many each."""
    return [
        (first + at // PAGE_ROWS, min(PAGE_ROWS, rank - at))
        for first, _, rank in adapter.runs_with_ranks
        for at in range(0, rank, PAGE_ROWS)
    ]
