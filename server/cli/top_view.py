"""What `weft top` shows: one frame, as a dictionary for scripts and as a screen for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from weft.server.cli.adapter_tables import state_name
from weft.server.cli.scraping import Interval, Scrape
from weft.v1 import adapter_pb2, server_pb2

_LATENCIES = {
    "time_to_first_token_s": "weft_time_to_first_token_seconds",
    "inter_token_s": "weft_inter_token_latency_seconds",
    "queue_s": "weft_request_queue_seconds",
    "end_to_end_s": "weft_e2e_request_latency_seconds",
}
_QUANTILES = {"p50": 0.5, "p95": 0.95}
_NAMES = {
    "time_to_first_token_s": "first token",
    "inter_token_s": "inter-token",
    "queue_s": "queue",
    "end_to_end_s": "end to end",
}

Frame = dict[str, Any]


def to_frame(
    info: server_pb2.GetServerInfoResponse, adapters: Iterable[adapter_pb2.Adapter], interval: Interval
) -> Frame:
    """All numbers of one interval: rates are a second, shares from 0 to 1, None where nothing happened."""
    now = interval.after
    steps = interval.rate("weft_step_seconds_count")
    return {
        "server": {
            "version": info.version,
            "model": info.model,
            "dtype": info.dtype,
            "device": info.device,
            "ready": bool(now.value("weft_ready")),
        },
        "interval_s": interval.seconds,
        "requests": {
            "running": int(now.value("weft_requests_running")),
            "running_limit": info.limits.max_running_requests,
            "waiting": int(now.value("weft_requests_waiting")),
            "waiting_limit": info.limits.max_queued_requests,
            "ended": interval.rates("weft_requests_total", "outcome"),
            "refused": interval.rates("weft_refused_requests_total", "code"),
        },
        "tokens": {
            "in": interval.rate("weft_prompt_tokens_total"),
            "out": interval.rate("weft_generation_tokens_total"),
        },
        "latency": {
            key: {name: interval.quantile(metric, q) for name, q in _QUANTILES.items()}
            for key, metric in _LATENCIES.items()
        },
        "steps": {
            "rate": steps,
            "seconds": interval.share("weft_step_seconds_sum", "weft_step_seconds_count"),
            "requests": interval.share("weft_step_requests_sum", "weft_step_requests_count"),
            "preemptions": interval.rate("weft_preemptions_total"),
        },
        "kv": _used(now, "weft_kv_blocks"),
        "pages": _used(now, "weft_adapter_pages"),
        "prefix_cache_hits": interval.share("weft_prefix_cache_hits_total", "weft_prefix_cache_queries_total"),
        "adapters": {
            "states": {labels["state"]: int(value) for labels, value in now.series("weft_adapters")},
            "evictions": interval.rates("weft_adapter_evictions_total", "tier"),
            "busy": _busy(adapters, interval),
        },
    }


def _used(now: Scrape, name: str) -> dict[str, int]:
    return {"used": int(now.value(f"{name}_used")), "total": int(now.value(name))}


def _busy(adapters: Iterable[adapter_pb2.Adapter], interval: Interval) -> list[Frame]:
    """Those that run, wait or were asked for, the busiest first."""
    known = {adapter.name: adapter for adapter in adapters}
    running, waiting = _named(interval.after, "running"), _named(interval.after, "waiting")
    requests = interval.rates("weft_requests_total", "adapter")
    tokens = interval.rates("weft_generation_tokens_total", "adapter")
    names = {*running, *waiting, *requests, *tokens, *(name for name in known if known[name].requests_in_flight)}
    rows = [
        {
            "name": name,
            "state": state_name(known[name].state) if name in known else "",
            "in_flight": known[name].requests_in_flight if name in known else None,
            "running": name in running,
            "waiting": name in waiting,
            "requests": requests.get(name, 0.0),
            "tokens": tokens.get(name, 0.0),
        }
        for name in names
    ]
    return sorted(rows, key=lambda row: (-row["tokens"], -(row["in_flight"] or 0), row["name"]))


def _named(now: Scrape, what: str) -> set[str]:
    named = [labels[f"{what}_lora_adapters"] for labels, _ in now.series("vllm:lora_requests_info")]
    return {name for text in named for name in text.split(",") if name}


def to_screen(frame: Frame, address: str, max_rows: int) -> RenderableType:
    """max_rows: of adapters, the rest are counted."""
    numbers = Table.grid(padding=(0, 2))
    for is_latency in (False, True, False):  # a latency that is cut short says nothing; the others can wrap
        numbers.add_column(no_wrap=is_latency)
    numbers.add_row(_requests(frame), _latency(frame), _memory(frame))
    server = frame["server"]
    words = f"{server['model']} in {server['dtype']} on {server['device']}, weft {server['version']}"
    state = "" if server["ready"] else "  NOT READY"
    return Group(
        Text(f"{address}  {words}{state}", overflow="ellipsis", no_wrap=True),
        Panel(numbers, title=f"over {frame['interval_s']:.1f} s", title_align="left", expand=False),
        _adapters(frame["adapters"], max_rows),
    )


def _requests(frame: Frame) -> RenderableType:
    requests, tokens = frame["requests"], frame["tokens"]
    return _pairs(
        {
            "running": f"{requests['running']} of {requests['running_limit']}",
            "waiting": f"{requests['waiting']} of {requests['waiting_limit']}",
            "ended/s": _rates(requests["ended"]),
            "refused/s": _rates(requests["refused"]),
            "tokens/s in": f"{tokens['in']:,.1f}",
            "tokens/s out": f"{tokens['out']:,.1f}",
        }
    )


def _latency(frame: Frame) -> RenderableType:
    table = Table(box=None, pad_edge=False)
    for heading in ("", *_QUANTILES):
        table.add_column(heading, no_wrap=True)
    for key, name in _NAMES.items():
        table.add_row(name, *(_seconds(frame["latency"][key][quantile]) for quantile in _QUANTILES))
    steps = frame["steps"]
    table.add_row("mean step", _seconds(steps["seconds"]))
    return table


def _memory(frame: Frame) -> RenderableType:
    return _pairs(
        {
            "KV blocks": _of(frame["kv"]),
            "pages": _of(frame["pages"]),
            "batch": f"{frame['steps']['requests'] or 0:.1f}",
            "prefix hits": _share(frame["prefix_cache_hits"]),
            "preempted/s": f"{frame['steps']['preemptions']:.1f}",
            "evicted/s": _rates(frame["adapters"]["evictions"]),
            "adapters": _counts(frame["adapters"]["states"]),
        }
    )


def _adapters(adapters: Frame, max_rows: int) -> RenderableType:
    table = Table("adapter", "tier", "now", box=None, pad_edge=False)
    for heading in ("in flight", "requests/s", "tokens/s"):
        table.add_column(heading, justify="right")
    for row in adapters["busy"][:max_rows]:
        now = " ".join(word for word in ("running", "waiting") if row[word])
        in_flight = "" if row["in_flight"] is None else str(row["in_flight"])
        numbers = (f"{row['requests']:.2f}", f"{row['tokens']:,.1f}")
        table.add_row(Text(row["name"], no_wrap=True, overflow="ellipsis"), row["state"], now, in_flight, *numbers)
    num_left = len(adapters["busy"]) - max_rows
    return Group(table, Text(f"and {num_left} more")) if num_left > 0 else table


def _pairs(rows: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    for key, value in rows.items():
        table.add_row(key, Text(value))
    return table


def _rates(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {rate:.2f}" for name, rate in sorted(rates.items())) or "0"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "none"


def _of(used: Mapping[str, int]) -> str:
    share = used["used"] / used["total"] if used["total"] else None
    return f"{used['used']:,} of {used['total']:,}, {_share(share)}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"
