"""`weft adapters`: the adapters of a running server."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from weft.server.cli.client import address_option, connected
from weft.server.cli.output import wide_console
from weft.v1 import adapter_pb2 as pb2
from weft.v1 import adapter_pb2_grpc

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:")
"""How a source begins that is no plain path."""


@click.group()
def adapters() -> None:
    """See and change what a running server has loaded."""


@adapters.command(name="list")
@address_option
def list_(address: str) -> None:
    """List the adapters."""
    with connected(address) as channel:
        found = list(_pages(adapter_pb2_grpc.AdapterServiceStub(channel)))
    if not found:
        click.echo("no adapters")
        return
    table = Table("name", "state", "ranks", "size", "in flight", "digest", "error", box=None)
    for adapter in found:
        table.add_row(
            Text(adapter.name),
            _state(adapter),
            ", ".join(map(str, adapter.ranks)),
            _size(adapter.device_bytes),
            str(adapter.requests_in_flight),
            adapter.digest[:19],
            Text(adapter.error),
        )
    wide_console().print(table)


@adapters.command()
@click.argument("name")
@address_option
def show(name: str, address: str) -> None:
    """Show all that is known of one adapter."""
    with connected(address) as channel:
        stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        _print(stub.GetAdapter(pb2.GetAdapterRequest(name=name)).adapter)


@adapters.command()
@click.argument("name")
@click.argument("source")
@address_option
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="May be given several times.")
@click.option("--pinned", is_flag=True, help="Never evict it.")
@click.option("--no-wait", is_flag=True, help="Return before it is loaded.")
def load(name: str, source: str, address: str, labels: Sequence[str], pinned: bool, no_wait: bool) -> None:
    """Load the PEFT folder at SOURCE, a path on the server's machine or `file:` and one, under NAME."""
    pairs = dict(_label(label) for label in labels)
    url = source if _SCHEME.match(source) else f"file:{Path(source).absolute()}"
    with connected(address) as channel:
        stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        adapter = pb2.Adapter(name=name, source=url, labels=pairs, pinned=pinned)
        _print(stub.CreateAdapter(pb2.CreateAdapterRequest(adapter=adapter, wait=not no_wait)).adapter)


@adapters.command()
@click.argument("name")
@address_option
def unload(name: str, address: str) -> None:
    """Take an adapter away; requests in flight finish with it."""
    with connected(address) as channel:
        stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        stub.DeleteAdapter(pb2.DeleteAdapterRequest(name=name))
    click.echo(f"{name} is unloaded")


def _pages(stub: adapter_pb2_grpc.AdapterServiceStub) -> Iterator[pb2.Adapter]:
    token = ""
    while True:
        page = stub.ListAdapters(pb2.ListAdaptersRequest(page_token=token))
        yield from page.adapters
        token = page.next_page_token
        if not token:
            return


def _print(adapter: pb2.Adapter) -> None:
    table = Table(box=None, show_header=False)
    rows = {
        "name": adapter.name,
        "state": _state(adapter),
        "error": adapter.error,
        "source": adapter.source,
        "digest": adapter.digest,
        "ranks": ", ".join(map(str, adapter.ranks)),
        "modules": ", ".join(adapter.modules),
        "size": _size(adapter.device_bytes),
        "pinned": "yes" if adapter.pinned else "no",
        "labels": ", ".join(f"{key}={value}" for key, value in sorted(adapter.labels.items())),
        "created": adapter.create_time.ToJsonString(),
        "last used": adapter.last_used_time.ToJsonString() if adapter.HasField("last_used_time") else "never",
        "in flight": str(adapter.requests_in_flight),
    }
    for key, value in rows.items():
        if value:
            table.add_row(key, Text(value))
    wide_console().print(table)


def _state(adapter: pb2.Adapter) -> str:
    return pb2.AdapterState.Name(adapter.state).removeprefix("ADAPTER_STATE_").lower()


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.2f} MiB"


def _label(label: str) -> tuple[str, str]:
    key, equals, value = label.partition("=")
    if not equals:
        raise click.UsageError(f"--label is {label!r}; must be KEY=VALUE")
    return key, value
