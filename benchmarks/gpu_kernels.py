"""What `benchmarks/gpu.py` times: a copy, the adapters' kernels alone, and others that do the same."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from weft.kernels import triton_lora
from weft.kernels.plan import PAGE_ROWS, build_plan
from weft.kernels.site import SiteGroup
from weft.kernels.work_list import make_work_list
from weft.server.engine.decode_attention import DecodeRows, attend_gathered, attend_in_place
from weft.server.engine.step import AttentionOptions

_CPU = torch.device("cpu")


class Timer:
    """Times work on a device: on CUDA by its events, else by the clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        self.repeats = 5 if self.is_cuda else 1
        self._inner = 10 if self.is_cuda else 1

    def time(self, run: Callable[[], object]) -> float:
        """Milliseconds of one run: the median of the repeats, each the mean of several runs."""
        run()
        return statistics.median(self._once(run) for _ in range(self.repeats))

    def compare(self, first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
        """Of two, turn by turn, so that a change of clocks meets both."""
        first(), second()
        pairs = [(self._once(first), self._once(second)) for _ in range(self.repeats)]
        return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)

    def wall(self, run: Callable[[], object]) -> float:
        """As `time`, by the host's clock; each run waits for the device."""
        run()
        took = []
        for _ in range(self.repeats * self._inner):
            start = time.perf_counter()
            run()
            took.append(time.perf_counter() - start)
        return statistics.median(took) * 1000

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """The same as a CUDA graph, so that launches are not what is timed."""
        if not self.is_cuda:
            return run
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def _once(self, run: Callable[[], object]) -> float:
        if not self.is_cuda:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1000
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        begin.record()  # type: ignore[no-untyped-call]
        for _ in range(self._inner):
            run()
        end.record()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / self._inner  # type: ignore[no-untyped-call]


def copy_bandwidth(timer: Timer) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    num_bytes = 4 << 30 if timer.is_cuda else 1 << 24
    source = torch.empty(num_bytes, dtype=torch.uint8, device=timer.device).fill_(1)
    target = torch.empty_like(source)
    return 2 * num_bytes / (timer.time(lambda: target.copy_(source)) / 1000)


@torch.inference_mode()
def compare_kernels(bench: Any, timer: Timer, bandwidth: float) -> Iterator[dict[str, Any]]:
    """The adapters' part of a whole step, distinct adapters: Weft's kernels, gather and bmm, and grouped_mm."""
    groups = list(bench.pages.groups.values())
    device, dtype = bench.device, bench.shape.dtype
    for rank in bench.shape.ranks:
        for rows in bench.shape.batches:
            plan = build_plan([(1, [(bench.adapter(row, rank), 1.0)]) for row in range(rows)], _CPU)
            assert plan is not None
            made = make_work_list(plan)
            work = triton_lora.DeviceWork(made.room, device)
            work.load(made)
            x = {group.d_in: torch.randn(rows, group.d_in, device=device).to(dtype) for group in groups}
            y = {group.d_out: torch.zeros(rows, group.d_out, device=device, dtype=dtype) for group in groups}
            pages = -(-rank // PAGE_ROWS)
            ways: dict[str, Callable[[SiteGroup], object]] = {
                "weft_ms": lambda g: triton_lora.run(y[g.d_out], x[g.d_in], g, work),  # noqa: B023
                "gather_bmm_ms": _gather_bmm(x, y, rows, pages),
                "grouped_mm_ms": _grouped_mm(x, y, rows, pages),
            }
            row: dict[str, Any] = {"rows": rows, "rank": rank}
            for name, way in ways.items():
                row[name] = _time_all(timer, way, groups)
            row["of_bandwidth"] = rows * bench.adapter_bytes(rank) / bandwidth * 1000 / row["weft_ms"]
            yield row


def _time_all(timer: Timer, way: Callable[[SiteGroup], object], groups: list[SiteGroup]) -> float | None:
    """None where this PyTorch or this device has no such way, or no memory for it."""

    def run() -> None:
        for group in groups:
            way(group)

    return _time_or_none(timer, run)


def _time_or_none(timer: Timer, run: Callable[[], object]) -> float | None:
    try:
        run()
        return timer.time(timer.capture(run))
    except (RuntimeError, AttributeError, ValueError, TypeError, ImportError) as error:
        print("   not measured:", str(error).splitlines()[0][:120])
        return None


Rows = dict[int, torch.Tensor]


def _gather_bmm(x: Rows, y: Rows, rows: int, pages: int) -> Callable[[SiteGroup], object]:
    """Copy each row's adapter together, then two batched products: padded to one rank, as S-LoRA's baseline."""
    index = torch.arange(1, 1 + rows * pages, device=next(iter(x.values())).device)

    def run(group: SiteGroup) -> None:
        out = y[group.d_out]
        at = 0
        for site in group.sites:
            a = site.a.index_select(0, index).view(rows, pages * PAGE_ROWS, -1)
            b = site.b.index_select(0, index).view(rows, pages * PAGE_ROWS, -1)
            shrunk = torch.bmm(x[group.d_in][:, None], a.transpose(1, 2))
            out[:, at : at + b.shape[2]] += torch.bmm(shrunk, b)[:, 0] * 2.0
            at += b.shape[2]

    return run


def _grouped_mm(x: Rows, y: Rows, rows: int, pages: int) -> Callable[[SiteGroup], object]:
    """PyTorch's grouped product over adapters that lie side by side, without a copy."""
    ends = torch.arange(1, rows + 1, dtype=torch.int32, device=next(iter(x.values())).device)

    def run(group: SiteGroup) -> None:
        out = y[group.d_out]
        at = 0
        for site in group.sites:
            a = site.a[1 : 1 + rows * pages].view(rows, pages * PAGE_ROWS, -1)
            b = site.b[1 : 1 + rows * pages].view(rows, pages * PAGE_ROWS, -1)
            shrunk = functional.grouped_mm(x[group.d_in], a.transpose(1, 2), offs=ends)  # type: ignore[attr-defined]
            out[:, at : at + b.shape[2]] += functional.grouped_mm(shrunk, b, offs=ends) * 2.0  # type: ignore[attr-defined]
            at += b.shape[2]

    return run


@torch.inference_mode()
def compare_attention(bench: Any, timer: Timer, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Decode rows over a paged cache, one layer: in place, over a gathered copy, and by PyTorch's varlen_attn."""
    device, dtype, config = bench.device, bench.shape.dtype, bench.shape.config
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config["hidden_size"] // heads
    block_tokens = 16
    for rows, context in ((8, 1024), (64, 1024), (8, 8192)) if timer.is_cuda else ((2, 40),):
        width = -(-context // block_tokens)
        keys, values = (
            torch.randn(rows * width * block_tokens, kv_heads, dim, device=device).to(dtype) for _ in range(2)
        )
        query = torch.randn(heads, rows, dim, device=device).to(dtype)
        tables = torch.randperm(rows * width, device=device).view(width, rows).int()
        contexts = torch.full((rows,), context, dtype=torch.int32, device=device)
        where, options = DecodeRows(tables, contexts, block_tokens), AttentionOptions(None, None, None, None)
        row: dict[str, Any] = {"rows": rows, "context": context}
        ways: dict[str, Callable[[], object]] = {
            "in_place_ms": partial(attend_in_place, query, keys, values, where, options),
            "gathered_ms": partial(attend_gathered, query, keys, values, where, options),
            "varlen_ms": partial(_varlen, query, keys, values, where, context),
        }
        for name, way in ways.items():
            row[name] = _time_or_none(timer, way)
        row["of_bandwidth"] = (keys.nbytes + values.nbytes) / bandwidth * 1000 / row["in_place_ms"]
        yield row


def _varlen(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: DecodeRows, context: int
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - not in every PyTorch

    count = query.shape[1]
    starts = torch.arange(count + 1, dtype=torch.int32, device=query.device)
    paged = (cache.view(-1, rows.block_tokens, *cache.shape[1:]) for cache in (keys, values))
    made = varlen_attn(
        query.transpose(0, 1).contiguous(),
        *paged,
        starts,
        None,
        1,
        context,
        enable_gqa=True,
        seqused_k=rows.contexts,
        block_table=rows.tables.t().contiguous(),
    )
    assert isinstance(made, torch.Tensor)
    return made
