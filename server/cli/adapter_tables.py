"""What `weft adapters` prints: tables for people, protobuf's JSON for scripts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import click
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.table import Table
from rich.text import Text

from weft.server.cli.output import wide_console
from weft.v1 import adapter_pb2 as pb2

_SHORT_DIGEST = len("sha256:") + 12


def print_json(message: Message | Sequence[Message], *, indent: int | None = 2) -> None:
    """With the names of the .proto files; fields that hold their default are left out."""
    found = _as_dict(message) if isinstance(message, Message) else [_as_dict(each) for each in message]
    click.echo(json.dumps(found, indent=indent))


def print_list(adapters: Iterable[pb2.Adapter]) -> None:
    """One line an adapter, whatever its error is: `show` prints that whole."""
    table = Table(box=None)
    for heading in ("name", "state", "ranks", "pages", "size", "pinned", "in flight"):
        table.add_column(heading, no_wrap=True)
    table.add_column("digest")
    table.add_column("error")
    for adapter in adapters:
        table.add_row(
            Text(adapter.name),
            state_name(adapter.state),
            ", ".join(map(str, adapter.ranks)),
            str(adapter.num_pages),
            _size(adapter.device_bytes),
            _yes(adapter.pinned),
            str(adapter.requests_in_flight),
            _shrinking(adapter.digest[:_SHORT_DIGEST]),
            _shrinking(_first_problem(adapter.error)),
        )
    wide_console().print(table)


def print_adapter(adapter: pb2.Adapter) -> None:
    """All that is known of one, a line each."""
    _print_pairs(
        {
            "name": adapter.name,
            "state": state_name(adapter.state),
            "error": adapter.error,
            "source": adapter.source,
            "digest": adapter.digest,
            "ranks": ", ".join(map(str, adapter.ranks)),
            "modules": ", ".join(adapter.modules),
            "tells apart": ", ".join(adapter.class_labels),
            "pages": str(adapter.num_pages),
            "on device": _size(adapter.device_bytes),
            "on host": _size(adapter.host_bytes),
            "on disk": _size(adapter.disk_bytes),
            "parity error": _parity(adapter),
            "pinned": _yes(adapter.pinned),
            "labels": ", ".join(f"{key}={value}" for key, value in sorted(adapter.labels.items())),
            "created": adapter.create_time.ToJsonString(),
            "last used": adapter.last_used_time.ToJsonString() if adapter.HasField("last_used_time") else "never",
            "in flight": str(adapter.requests_in_flight),
        }
    )


def print_report(report: pb2.AdapterReport) -> None:
    """Module by module, then the whole, then every problem."""
    if report.modules:
        table = Table("module", "kind", "applied", "rank", "scale", "dtype", "pages", "bytes", box=None)
        for module in report.modules:
            table.add_row(
                Text(module.name),
                Text(module.kind),
                _yes(module.applied),
                str(module.rank),
                f"{module.scale:g}",
                module.dtype,
                str(module.num_pages),
                f"{module.num_bytes:,}",
            )
        wide_console().print(table)
    if report.problems:
        _print_problems(report.problems)
        return
    _print_pairs(
        {
            "digest": report.digest,
            "pages": str(report.num_pages),
            "on device": _size(report.device_bytes),
            "parity error": _parity(report),
        }
    )
    click.echo("can be served")


def print_plan(plan: pb2.PlanCapacityResponse) -> None:
    """Each source, then what there is."""
    if plan.sources:
        table = Table("source", "pages", "in host memory", "digest", box=None)
        for source in plan.sources:
            host_size = _size(source.host_bytes)
            table.add_row(Text(source.source), str(source.num_pages), host_size, source.digest[:_SHORT_DIGEST])
        wide_console().print(table)
        for source in plan.sources:
            _print_problems(source.problems, f"{source.source}: ")
    _print_pairs(
        {
            "pages needed": f"{plan.pages_needed:,}",
            "pages": f"{plan.pages_total:,}, {plan.pages_free:,} free, {plan.pages_pinned:,} pinned",
            "host needed": _size(plan.host_bytes_needed),
            "host": f"{_size(plan.host_bytes_total)}, {_size(plan.host_bytes_used)} used",
            "KV tokens": f"{plan.kv_tokens_total:,}, {plan.kv_tokens_free:,} free",
            **{f"rank {room.rank}": f"{room.count:,} more fit" for room in plan.rooms},
        }
    )
    if any(source.problems for source in plan.sources):
        click.echo("not all can be served")
    else:
        click.echo("all fit on the device at once" if plan.fits else "not all fit on the device at once")


def event_line(event: pb2.WatchAdaptersResponse) -> str:
    """One event in one line."""
    kind = pb2.AdapterEventKind.Name(event.kind).removeprefix("ADAPTER_EVENT_KIND_").lower()
    if not event.HasField("adapter"):
        return kind
    adapter = event.adapter
    words = [adapter.digest[:_SHORT_DIGEST], "pinned" if adapter.pinned else "", " ".join(adapter.error.split())]
    return "  ".join([f"{kind:7}", f"{state_name(adapter.state):7}", adapter.name, *filter(None, words)])


def state_name(state: int) -> str:
    """A state as the command line says it; a newer server's, which has no name here, as its number."""
    if state not in pb2.AdapterState.values():
        return str(state)
    return pb2.AdapterState.Name(pb2.AdapterState.ValueType(state)).removeprefix("ADAPTER_STATE_").lower()


def _shrinking(text: str) -> Text:
    """What a narrow terminal cuts short before anything else."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def _first_problem(error: str) -> str:
    first, more, _ = " ".join(error.split()).partition("; ")
    return f"{first}; …" if more else first


def _as_dict(message: Message) -> dict[str, object]:
    return MessageToDict(message, preserving_proto_field_name=True)


def _print_pairs(rows: Mapping[str, str]) -> None:
    table = Table(box=None, show_header=False)
    for key, value in rows.items():
        if value:
            table.add_row(key, Text(value))
    wide_console().print(table)


def _print_problems(problems: Iterable[pb2.AdapterProblem], before: str = "") -> None:
    for problem in problems:
        click.echo(f"{before}{problem.subject}: {problem.description}")


def _parity(message: pb2.Adapter | pb2.AdapterReport) -> str:
    return f"{message.parity_error:.2g}" if message.HasField("parity_error") else ""


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.2f} MiB"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
