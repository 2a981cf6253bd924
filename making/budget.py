"""Which singular values of which modules are kept: by rank, by energy, or within a number of bytes."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from weft.errors import InvalidConfig
from weft.making.low_rank import Wanted

Ranks = dict[str, int]
"""By module."""


@dataclass(frozen=True, slots=True)
class Values:
    """What is to be weighed of one module. squares: of the singular values of what is added, descending, float64.

    rank: that it has. row_numbers: that one rank takes.
    """

    squares: torch.Tensor
    rank: int
    row_numbers: int


@dataclass(frozen=True, slots=True)
class Adapter:
    """The modules of one, and the rank that each must keep at least."""

    modules: Mapping[str, Values]
    least: int

    @property
    def energy(self) -> float:
        return math.fsum(float(values.squares.sum()) for values in self.modules.values())


def ranks_for(adapters: Sequence[Adapter], wanted: Wanted) -> list[Ranks]:
    """0 where a module adds nothing. Raises InvalidConfig for a rank above that of all modules."""
    highest = max(values.rank for adapter in adapters for values in adapter.modules.values())
    if wanted.rank is not None and wanted.rank > highest:
        raise InvalidConfig(f"--rank is {wanted.rank}, and no module's is above {highest}: give less")
    return [
        {name: max(_count(values.squares, wanted), adapter.least) for name, values in adapter.modules.items()}
        for adapter in adapters
    ]


def _count(squares: torch.Tensor, wanted: Wanted) -> int:
    count = wanted.count(squares, float(squares.sum()))
    num_nonzero = int(squares.count_nonzero())
    return num_nonzero if count is None else min(count, num_nonzero)


def ranks_within(adapters: Sequence[Adapter], budget: int, itemsizes: Sequence[int]) -> list[Ranks]:
    """Ranks whose rows take no more bytes than the budget, and lose as little as can be for that.

    One pool holds the singular values of all modules of all adapters. What keeps most a byte is taken first, counted as
    a share of its adapter's energy, so that an adapter of small numbers is worth what others are. itemsizes: of the
    adapters' numbers, in bytes. Raises InvalidConfig where an adapter would be left with nothing.
    """
    ranks = [dict.fromkeys(adapter.modules, adapter.least) for adapter in adapters]
    energies = [adapter.energy or 1.0 for adapter in adapters]
    pool: list[tuple[float, int, str]] = []

    def cost(index: int, name: str) -> int:
        return adapters[index].modules[name].row_numbers * itemsizes[index]

    def offer(index: int, name: str) -> None:
        squares, rank = adapters[index].modules[name].squares, ranks[index][name]
        if rank < len(squares) and squares[rank] > 0:
            heapq.heappush(pool, (-float(squares[rank]) / energies[index] / cost(index, name), index, name))

    places = [(index, name) for index, adapter in enumerate(adapters) for name in adapter.modules]
    left = budget - sum(ranks[index][name] * cost(index, name) for index, name in places)
    for place in places:
        offer(*place)
    while pool:
        _, index, name = heapq.heappop(pool)
        if cost(index, name) <= left:
            left -= cost(index, name)
            ranks[index][name] += 1
            offer(index, name)
    empty = sum(not any(each.values()) for each in ranks)
    if left < 0 or empty:
        short = f"for {empty} of {len(ranks)} adapters to keep a row" if empty else "for the rows that biases need"
        raise InvalidConfig(f"--bytes leaves {max(budget, 0):,} for rows, too few {short}: give more")
    return ranks
