"""How many threads a step computes with, by measurement: cores may be shared, and memory is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from weft.kernels.linear import PackedLinear
from weft.kernels.native import Native

_ROWS, _D_IN, _D_OUT = 4, 2048, 4096
"""A product like a decode step's: its 32 MB of weights come from memory."""

_ROUNDS = 7
_WORTH = 0.95
"""More threads are taken where they bring the time down to this share."""


def fastest_threads(
    find: Callable[[int], Native | None], most: int, clock: Callable[[], float] = time.perf_counter
) -> int:
    """1, 2, 4, ... up to `most`: the first after which doubling does not pay. Takes some tens of milliseconds."""
    counts = [count for count in (1 << i for i in range(most.bit_length())) if count < most] + [most]
    weight, x = torch.ones(_D_OUT, _D_IN).mul_(1 / 3), torch.ones(_ROWS, _D_IN)
    products = {count: PackedLinear(weight, None, native) for count in counts if (native := find(count)) is not None}
    seconds: dict[int, list[float]] = {count: [] for count in products}
    for _ in range(_ROUNDS):
        for count, product in products.items():
            started = clock()
            product(x)
            seconds[count].append(clock() - started)
    best = 1
    for count, times in seconds.items():
        if count == best:
            continue
        if statistics.median(times) > _WORTH * statistics.median(seconds[best]):
            break
        best = count
    return best
