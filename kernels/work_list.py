"""A step's plan as the Triton kernels read it: tiles of rows, and entries of two pages each, in one array of int32.

Rows that use the same adapters share tiles of `TILE` rows. A tile has an entry for each two pages of its adapters; an
odd page is paired with page 0, which is all zeros. The array's places are `kernels.triton_kernels`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy
from numpy.typing import NDArray

from weft.kernels.plan import PagedAdapter, Plan

HEADER = 4
TILE = 16
ROWS_AT = 4
SCALES_AT = 20
SITES_AT = 36
TILE_RECORD = 18

Ints = NDArray[numpy.int32]


@dataclass(frozen=True, slots=True)
class Room:
    """How many entries and tiles an array has room for, and how many sites there are."""

    entries: int
    tiles: int
    sites: int

    @property
    def record(self) -> int:
        """Numbers an entry takes."""
        return SITES_AT + -(-self.sites // 32)

    @property
    def entries_at(self) -> int:
        """Where the entries begin, behind the tiles."""
        return HEADER + self.tiles * TILE_RECORD

    @property
    def size(self) -> int:
        return self.entries_at + self.entries * self.record

    def holds(self, other: Room) -> bool:
        return self.entries >= other.entries and self.tiles >= other.tiles and self.sites >= other.sites


@dataclass(frozen=True, slots=True)
class WorkList:
    """What a plan comes to: rows [tiles, TILE], -1 for none; bounds [tiles + 1] of each tile's entries.

    Of each entry: tile [entries], pages [entries, 2], scales [entries, TILE] float32, and sites it adds to.
    """

    rows: Ints
    bounds: Ints
    tile: Ints
    pages: Ints
    scales: NDArray[numpy.float32]
    sites: Sequence[frozenset[int]]

    @property
    def room(self) -> Room:
        """What it needs."""
        return Room(len(self.tile), len(self.rows), 1 + max((max(each, default=0) for each in self.sites), default=0))

    def write(self, into: Ints, room: Room) -> int:
        """Lay it out in an array of `room.size`; returns how much of that it takes, from the beginning."""
        num_entries, num_tiles = len(self.tile), len(self.rows)
        into[:2] = num_entries, num_tiles
        end = room.entries_at + num_entries * room.record
        entries = into[room.entries_at : end].reshape(num_entries, room.record)
        entries[:, 0] = self.tile
        entries[:, 1:3] = self.pages
        entries[:, 3] = 0
        entries[:, ROWS_AT:SCALES_AT] = self.rows[self.tile]
        entries[:, SCALES_AT:SITES_AT] = self.scales.view(numpy.int32)
        words = room.record - SITES_AT
        if num_entries:
            entries[:, SITES_AT:] = [_bits(each, words) for each in self.sites]
        tiles = into[HEADER : HEADER + num_tiles * TILE_RECORD].reshape(num_tiles, TILE_RECORD)
        tiles[:, 0] = self.bounds[:-1]
        tiles[:, 1] = self.bounds[1:]
        tiles[:, 2:] = self.rows
        return end


def make_work_list(plan: Plan) -> WorkList:
    """The tiles and entries of a plan, in an order that follows from its rows."""
    alike: dict[tuple[PagedAdapter, ...], list[tuple[range, tuple[float, ...]]]] = {}
    for rows, mix in plan.mixes:
        alike.setdefault(tuple(adapter for adapter, _ in mix), []).append((rows, tuple(weight for _, weight in mix)))
    made = _Lists()
    for adapters, spans in alike.items():
        made.add(adapters, spans)
    return WorkList(
        rows=numpy.array(made.rows, numpy.int32).reshape(-1, TILE),
        bounds=numpy.array(made.bounds, numpy.int32),
        tile=numpy.array(made.tile, numpy.int32),
        pages=numpy.array(made.pages, numpy.int32).reshape(-1, 2),
        scales=numpy.array(made.scales, numpy.float32).reshape(-1, TILE)[numpy.array(made.scale_tile, numpy.int64)],
        sites=made.sites,
    )


class _Lists:
    """A work list as it grows; scale_tile: of each entry, which of the scales' rows of TILE numbers it takes."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.bounds: list[int] = [0]
        self.tile: list[int] = []
        self.pages: list[tuple[int, int]] = []
        self.scales: list[float] = []
        self.scale_tile: list[int] = []
        self.sites: list[frozenset[int]] = []

    def add(self, adapters: Sequence[PagedAdapter], spans: Sequence[tuple[range, tuple[float, ...]]]) -> None:
        """Rows that use these adapters; spans: which, and the weight of each adapter there."""
        first_tile = len(self.rows) // TILE
        for rows, _ in spans:
            self.rows += rows
        padding = -len(self.rows) % TILE
        self.rows += [-1] * padding
        num_tiles = len(self.rows) // TILE - first_tile
        first_scales = len(self.scales) // TILE
        for i, adapter in enumerate(adapters):
            for rows, weights in spans:
                self.scales += [adapter.scale * weights[i]] * len(rows)
            self.scales += [0.0] * padding
        for tile in range(num_tiles):
            for i, adapter in enumerate(adapters):
                pairs = _pairs(adapter.runs)
                self.tile += [first_tile + tile] * len(pairs)
                self.pages += pairs
                self.scale_tile += [first_scales + i * num_tiles + tile] * len(pairs)
                self.sites += [adapter.sites] * len(pairs)
            self.bounds.append(len(self.tile))


@lru_cache(maxsize=4096)
def _pairs(runs: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    pages = [page for first, last in runs for page in range(first, last)]
    pages += [0] * (len(pages) % 2)
    return [pair for i, pair in enumerate(pairwise(pages)) if i % 2 == 0]


@lru_cache(maxsize=4096)
def _bits(sites: frozenset[int], words: int) -> Ints:
    """One bit a site, the lowest first, in so many words."""
    bits = numpy.zeros(words, numpy.uint32)
    for site in sites:
        bits[site // 32] |= numpy.uint32(1 << site % 32)
    return bits.view(numpy.int32)
