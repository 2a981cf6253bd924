"""`weft top`: what a running server does, as it does it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import click
import grpc
from rich.console import Console
from rich.live import Live

from weft.server.cli.client import address_option, connected
from weft.server.cli.output import wide_console
from weft.server.cli.scraping import Interval, scrape
from weft.server.cli.top_view import Frame, to_frame, to_screen
from weft.v1 import adapter_pb2, adapter_pb2_grpc, server_pb2, server_pb2_grpc

METRICS_PORT = 9090
MAX_ADAPTERS = 1000
"""That are asked for by name: one page."""

_LINES_BESIDE_ADAPTERS = 14
_INTERVAL = click.FloatRange(0.1, 3600)


def _metrics_address(_context: click.Context, _option: click.Parameter, metrics: str | None) -> str | None:
    if metrics is not None and not metrics.rpartition(":")[2].isdigit():
        raise click.UsageError(f"--metrics is {metrics!r}; must be HOST:PORT, such as 127.0.0.1:{METRICS_PORT}")
    return metrics


@click.command()
@address_option
@click.option(
    "--metrics",
    envvar="WEFT_METRICS",
    metavar="HOST:PORT",
    callback=_metrics_address,
    help=f"Of the server's metrics.  [default: port {METRICS_PORT} of --address's host]",
)
@click.option(
    "--interval", type=_INTERVAL, default=2.0, show_default=True, metavar="SECONDS", help="That a frame is about."
)
@click.option("--once", is_flag=True, help="Print one frame and end.")
@click.option("--json", "as_json", is_flag=True, help="Print frames as JSON, one a line.")
def top(address: str, metrics: str | None, interval: float, once: bool, as_json: bool) -> None:
    """Show requests, latency, memory and the busiest adapters of a running server, until Ctrl-C."""
    where = metrics or f"{address.rpartition(':')[0]}:{METRICS_PORT}"
    with connected(address) as channel:
        frames = _frames(channel, where, interval, time.sleep)
        if as_json:
            for frame in frames:
                click.echo(json.dumps(frame))
                if once:
                    return
        elif once:
            wide_console().print(to_screen(next(frames), address, MAX_ADAPTERS))
        else:
            _show(frames, address)


def _frames(channel: grpc.Channel, metrics: str, interval_s: float, wait: Callable[[float], None]) -> Iterator[Frame]:
    """One after each interval, without end."""
    info = server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(server_pb2.GetServerInfoRequest())
    adapters = adapter_pb2_grpc.AdapterServiceStub(channel)
    before = scrape(metrics)
    while True:
        wait(interval_s)
        after = scrape(metrics)
        listed = adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(page_size=MAX_ADAPTERS))
        yield to_frame(info, listed.adapters, Interval(before, after))
        before = after


def _show(frames: Iterator[Frame], address: str) -> None:
    """On the terminal's other screen, so that what was there comes back."""
    console = Console()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        for frame in frames:
            max_rows = max(1, console.height - _LINES_BESIDE_ADAPTERS)
            live.update(to_screen(frame, address, max_rows), refresh=True)
