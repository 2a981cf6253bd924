"""How long each backend takes, over shapes of steps and of modules: what `find_backend("auto", ...)` goes by."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from weft.kernels.lora import Backend, Measurement
from weft.kernels.plan import PAGE_ROWS, PagedAdapter, Plan, build_plan
from weft.kernels.site import SiteGroup

_RESERVE_BYTES = 64 << 20
"""Of pages that calls go through in turn, so that none finds its own in the cache: a step has other layers' between."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is measured. steps: (rows, distinct adapters). widths: (d_in, d_out). repeats: of which the best counts."""

    steps: Sequence[tuple[int, int]] = ((1, 1), (16, 1), (16, 4), (16, 16), (64, 16), (256, 1))
    ranks: Sequence[int] = (8, 32)
    widths: Sequence[tuple[int, int]] = (
        (576, 960),
        (576, 3072),
        (1536, 576),
        (2048, 2560),
        (2048, 11264),
        (5632, 2048),
    )
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.int8)
    repeats: int = 5

    @property
    def num_measurements(self) -> int:
        return len(self.steps) * len(self.ranks) * len(self.widths) * len(self.dtypes)


def measure(sweep: Sweep, backends: Sequence[Backend], device: torch.device) -> Iterator[Measurement]:
    """One shape after another, each by all backends that take it, in turns."""
    for dtype, (d_in, d_out), rank in itertools.product(sweep.dtypes, sweep.widths, sweep.ranks):
        kind = _row_dtype(dtype, device)
        num_pages = 1 + max(distinct for _, distinct in sweep.steps) * -(-rank // PAGE_ROWS)
        groups = _groups(d_in, d_out, num_pages, dtype, device)
        able = [backend for backend in backends if backend.takes(groups[0], kind)]
        for rows, distinct in sweep.steps:
            plan = _plan(rows, distinct, rank, device)
            x, y = (torch.randn(rows, width, device=device).to(kind) for width in (d_in, d_out))
            ms = {backend.name: float("inf") for backend in able}
            for turn, backend in itertools.product(range(sweep.repeats + 1), able):
                call = functools.partial(backend.add_lora, y, x, groups[turn % len(groups)], plan)
                ms[backend.name] = min(ms[backend.name], _time_ms(call, device))
            name = str(dtype).removeprefix("torch.")
            yield Measurement(device.type, name, rows, distinct, rank, d_in, d_out, ms)


def _row_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of rows that meet int8 pages: what a model is in on such a device."""
    if dtype != torch.int8:
        return dtype
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _groups(d_in: int, d_out: int, num_pages: int, dtype: torch.dtype, device: torch.device) -> list[SiteGroup]:
    num_bytes = num_pages * PAGE_ROWS * (d_in + d_out) * dtype.itemsize
    groups = [
        SiteGroup(0, d_in, [d_out], num_pages, dtype, device) for _ in range(2 + _RESERVE_BYTES // max(num_bytes, 1))
    ]
    for group in groups:
        for pool in (group.a, group.b):
            if dtype == torch.int8:
                pool.random_(-127, 128)
            else:
                pool.normal_()
    return groups


def _plan(rows: int, distinct: int, rank: int, device: torch.device) -> Plan:
    pages = -(-rank // PAGE_ROWS)
    adapters = [
        PagedAdapter(((1 + i * pages, 1 + (i + 1) * pages),), 1.0, frozenset({0}), rank=rank) for i in range(distinct)
    ]
    plan = build_plan([(1, [(adapters[t % distinct], 1.0)]) for t in range(rows)], device)
    assert plan is not None, "every row has an adapter"
    return plan


def _time_ms(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started_s = time.perf_counter()
        call()
        return (time.perf_counter() - started_s) * 1000
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
