"""What `weft bench` shows: how far a run has come, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from weft.server.cli.output import wide_console

if TYPE_CHECKING:
    from weft.server.bench.summary import Record, Spread, Summary
    from weft.server.bench.workload import Burst, Trace

_QUANTITIES = (
    ("latency", "latency, s", 1.0, 2),
    ("ttft", "TTFT, s", 1.0, 3),
    ("tpot", "TPOT, ms", 1e3, 1),
    ("itl", "ITL, ms", 1e3, 1),
    ("lateness", "sent late, ms", 1e3, 1),
)


class Watch:
    """A progress bar on standard error, where that is a terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[failed]} failed"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=2,  # drawing takes time from sending
        )
        self._failed = 0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, workload: Trace | Burst, num_requests: int) -> None:
        self._failed = 0
        self._task = self._bar.add_task(title(workload), total=num_requests, failed=0)

    def ended(self, record: Record) -> None:
        self._failed += record.outcome != "OK"
        self._bar.update(self._task, advance=1, failed=self._failed)


def title(workload: Trace | Burst) -> str:
    """What a run is told from others by."""
    fields: dict[str, Any] = workload.to_json()
    if "popularity" in fields:
        return f"{fields['popularity']}, {fields['requests']} at once"
    count = fields["adapters"]
    adapters = f"{count:,} adapter{'s' * (count != 1)}" if count else "the base"
    return f"{adapters}, alpha {fields['alpha']:g}, cv {fields['cv']:g}, {fields['rate']:g}/s"


def print_runs(runs: Sequence[tuple[Trace | Burst, Summary]]) -> None:
    """One run by quantity, several by run; then what failed, and what is to be doubted."""
    if len(runs) == 1:
        _print_one(*runs[0])
    else:
        _print_many(runs)
    for workload, summary in runs:
        failed = {code: count for code, count in summary.outcomes.items() if code != "OK"}
        if failed:
            codes = ", ".join(f"{count} {code}" for code, count in failed.items())
            click.echo(f"{title(workload)}: of {summary.requests} requests failed: {codes}")
        if summary.warning:
            click.echo(f"{title(workload)}: {summary.warning}", err=True)


def _print_one(workload: Trace | Burst, summary: Summary) -> None:
    click.echo(f"{title(workload)}: {summary.answered} of {summary.requests} answered in {summary.duration_s:.1f} s")
    offered = "" if math.isinf(summary.offered_per_s) else f" of {summary.offered_per_s:.2f} offered"
    click.echo(f"{summary.requests_per_s:.2f} requests/s{offered}, {summary.tokens_per_s:.1f} tokens/s")
    click.echo(f"first token within 6 s: {summary.slo_attainment:.1%}")
    table = Table(box=None)
    for heading in ("", "mean", "p50", "p90", "p99", "most"):
        table.add_column(heading, justify="right")
    for name, words, factor, digits in _QUANTITIES:
        spread: Spread | None = getattr(summary, name)
        if spread:
            values = (spread.mean, spread.p50, spread.p90, spread.p99, spread.most)
            table.add_row(words, *(f"{value * factor:.{digits}f}" for value in values))
    wide_console().print(table)


def _print_many(runs: Sequence[tuple[Trace | Burst, Summary]]) -> None:
    table = Table(box=None)
    table.add_column("run", no_wrap=True)
    for heading in ("answered", "requests/s", "tokens/s", "latency p50, s", "TTFT p50", "p90", "p99", "TPOT, ms"):
        table.add_column(heading, justify="right")
    table.add_column("within 6 s", justify="right")
    for workload, summary in runs:
        ttft = [getattr(summary.ttft, name, math.nan) for name in ("p50", "p90", "p99")]
        table.add_row(
            title(workload),
            f"{summary.answered}/{summary.requests}",
            f"{summary.requests_per_s:.2f}",
            f"{summary.tokens_per_s:.1f}",
            f"{getattr(summary.latency, 'p50', math.nan):.2f}",
            *(f"{value:.3f}" for value in ttft),
            f"{getattr(summary.tpot, 'p50', math.nan) * 1e3:.1f}",
            f"{summary.slo_attainment:.1%}",
        )
    wide_console().print(table)
