"""`weft adapters`: the adapters of a running server."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from google.protobuf.field_mask_pb2 import FieldMask

from weft.server.cli.adapter_tables import (
    event_line,
    print_adapter,
    print_json,
    print_list,
    print_plan,
    print_report,
    state_name,
)
from weft.server.cli.client import Endpoint, connected, server_options
from weft.v1 import adapter_pb2 as pb2
from weft.v1 import adapter_pb2_grpc

PLANNED_RANKS = (8, 16, 32, 64)
"""How many more of them fit, `weft adapters plan` says unless told otherwise."""

_RANK = click.IntRange(1, 65536)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:")
"""How a source begins that is no plain path."""

_SHAPE = re.compile(r"(\d{1,7})(?:x(\d{1,7}))?")
_STATES = {state_name(state): state for state in pb2.AdapterState.values() if state}

json_option = click.option("--json", "as_json", is_flag=True, help="As JSON, with the names of the .proto files.")


def _pairs(_context: click.Context, _option: click.Parameter, labels: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE, each given once, as a map."""
    return dict(_label(label) for label in labels)


def _shapes(_context: click.Context, _option: click.Parameter, shapes: Sequence[str]) -> list[pb2.AdapterShape]:
    return [_shape(shape) for shape in shapes]


def _filtered(command: Callable[..., None]) -> Callable[..., None]:
    """With options that become the fields of a list's or a watch's request."""
    for option in (
        click.option("--prefix", "name_prefix", default="", metavar="TEXT", help="Only names that begin so."),
        click.option(
            *("--label", "labels"),
            multiple=True,
            callback=_pairs,
            metavar="KEY=VALUE",
            help="Only those with this label; may be given several times.",
        ),
        click.option("--state", type=click.Choice(list(_STATES)), help="Only those in this state."),
    ):
        command = option(command)
    return command


@click.group()
def adapters() -> None:
    """See and change what a running server has loaded."""


@adapters.command(name="list")
@server_options
@_filtered
@json_option
def list_(server: Endpoint, as_json: bool, **wanted: Any) -> None:
    """List the adapters."""
    with _service(server) as stub:
        found = list(pages(stub, _filter(wanted)))
    if as_json:
        print_json(found)
    elif found:
        print_list(found)
    else:
        click.echo("no adapters")


@adapters.command()
@click.argument("name")
@server_options
@json_option
def show(name: str, server: Endpoint, as_json: bool) -> None:
    """Show all that is known of one adapter."""
    with _service(server) as stub:
        adapter = stub.GetAdapter(pb2.GetAdapterRequest(name=name)).adapter
    print_json(adapter) if as_json else print_adapter(adapter)


@adapters.command()
@click.argument("source")
@server_options
@json_option
def check(source: str, server: Endpoint, as_json: bool) -> int:
    """Say, module by module, what of SOURCE would be applied, and what can't be served and why. Loads nothing.

    Ends with 1 if it can't be served.
    """
    with _service(server) as stub:
        report = stub.CheckAdapter(pb2.CheckAdapterRequest(source=_url(source))).report
    print_json(report) if as_json else print_report(report)
    return 1 if report.problems else 0


@adapters.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="A new folder.")
@click.option("--without-head", is_flag=True, help="Leave an output head beside it out: right if it is the base's own.")
def convert(folder: Path, output: Path, without_head: bool) -> None:
    """Make a folder that Weft serves of FOLDER, a bottleneck adapter as AdapterHub's library saves it."""
    from weft.making.adapterhub import convert as converted  # noqa: PLC0415 - slow to load

    config = converted(folder, output, without_head=without_head)
    ends = ", ".join(config.target_modules)
    click.echo(f"{output}: {config.non_linearity} bottlenecks behind {ends}, which read the {config.reads}")


@adapters.command()
@click.argument("name")
@click.argument("source")
@server_options
@click.option("--label", "labels", multiple=True, callback=_pairs, metavar="KEY=VALUE", help="May be given repeatedly.")
@click.option("--pinned", is_flag=True, help="Never evict it.")
@click.option("--no-wait", is_flag=True, help="Return before it is loaded.")
def load(name: str, source: str, server: Endpoint, labels: Mapping[str, str], pinned: bool, no_wait: bool) -> None:
    """Load the PEFT folder at SOURCE under NAME: a path on the server's machine, `hf:org/repo`, a URL."""
    with _service(server) as stub:
        adapter = pb2.Adapter(name=name, source=_url(source), labels=labels, pinned=pinned)
        print_adapter(stub.CreateAdapter(pb2.CreateAdapterRequest(adapter=adapter, wait=not no_wait)).adapter)


@adapters.command()
@click.argument("name")
@server_options
@click.option("--source", help="Read it from here now. Requests in flight finish on the version they began with.")
@click.option("--pin/--unpin", "pinned", default=None, help="Never evict it, or do.")
@click.option(
    *("--label", "labels"),
    multiple=True,
    callback=_pairs,
    metavar="KEY=VALUE",
    help="Its labels from now on, in the place of all it had; may be given several times.",
)
@click.option("--no-labels", is_flag=True, help="Drop its labels.")
def update(
    name: str, server: Endpoint, source: str | None, pinned: bool | None, labels: Mapping[str, str], no_labels: bool
) -> None:
    """Change an adapter, all at once or not at all."""
    if labels and no_labels:
        raise click.UsageError("--label and --no-labels contradict each other; choose one")
    given = {"source": source is not None, "pinned": pinned is not None, "labels": bool(labels) or no_labels}
    paths = [field for field, is_given in given.items() if is_given]
    if not paths:
        raise click.UsageError("nothing to change: give --source, --pin, --unpin, --label or --no-labels")
    adapter = pb2.Adapter(
        name=name, source=_url(source) if source is not None else "", pinned=bool(pinned), labels=labels
    )
    _update(server, adapter, paths)


@adapters.command()
@click.argument("name")
@server_options
def pin(name: str, server: Endpoint) -> None:
    """Bring an adapter to the device, and keep it there."""
    _update(server, pb2.Adapter(name=name, pinned=True), ["pinned"])


@adapters.command()
@click.argument("name")
@server_options
def unpin(name: str, server: Endpoint) -> None:
    """Let an adapter make room for others again."""
    _update(server, pb2.Adapter(name=name), ["pinned"])


@adapters.command()
@click.argument("name")
@server_options
def unload(name: str, server: Endpoint) -> None:
    """Take an adapter away; requests in flight finish with it."""
    with _service(server) as stub:
        stub.DeleteAdapter(pb2.DeleteAdapterRequest(name=name))
    click.echo(f"{name} is unloaded")


@adapters.command()
@server_options
@_filtered
@json_option
def watch(server: Endpoint, as_json: bool, **wanted: Any) -> None:
    """Print each adapter, `listed`, and then each change as it happens: one line an event, until Ctrl-C."""
    with _service(server) as stub:
        for event in stub.WatchAdapters(pb2.WatchAdaptersRequest(**_filter(wanted))):
            print_json(event, indent=None) if as_json else click.echo(event_line(event))


@adapters.command()
@click.argument("sources", nargs=-1, metavar="[SOURCE]...")
@server_options
@click.option(
    *("--shape", "shapes"),
    multiple=True,
    callback=_shapes,
    metavar="RANK[xCOUNT]",
    help="So many adapters of this rank besides; may be given several times.",
)
@click.option(
    *("--rank", "ranks"), multiple=True, type=_RANK, help="Say how many more of this rank fit.  [default: 8 16 32 64]"
)
@json_option
def plan(
    sources: Sequence[str], server: Endpoint, shapes: Sequence[pb2.AdapterShape], ranks: Sequence[int], as_json: bool
) -> int:
    """Say whether adapters would fit on the device all at once, and what there is. Loads nothing.

    Ends with 1 if they would not.
    """
    request = pb2.PlanCapacityRequest(
        sources=[_url(source) for source in sources], shapes=shapes, ranks=ranks or PLANNED_RANKS
    )
    with _service(server) as stub:
        answer = stub.PlanCapacity(request)
    print_json(answer) if as_json else print_plan(answer)
    return 0 if answer.fits else 1


def pages(stub: adapter_pb2_grpc.AdapterServiceStub, wanted: Mapping[str, Any]) -> Iterator[pb2.Adapter]:
    """Every adapter that the fields of a list's request ask for."""
    token = ""
    while True:
        page = stub.ListAdapters(pb2.ListAdaptersRequest(page_token=token, **wanted))
        yield from page.adapters
        token = page.next_page_token
        if not token:
            return


@contextmanager
def _service(server: Endpoint) -> Iterator[adapter_pb2_grpc.AdapterServiceStub]:
    with connected(server) as channel:
        yield adapter_pb2_grpc.AdapterServiceStub(channel)


def _update(server: Endpoint, adapter: pb2.Adapter, paths: Sequence[str]) -> None:
    request = pb2.UpdateAdapterRequest(adapter=adapter, update_mask=FieldMask(paths=paths))
    with _service(server) as stub:
        print_adapter(stub.UpdateAdapter(request).adapter)


def _filter(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `_filtered` as fields."""
    state = _STATES[wanted["state"]] if wanted["state"] else pb2.ADAPTER_STATE_UNSPECIFIED
    return {**wanted, "state": state}


def _url(source: str) -> str:
    """A plain path as a source; it is one on the server's machine. An empty one is left for the server to refuse."""
    return source if not source or _SCHEME.match(source) else f"file:{Path(source).absolute()}"


def _label(label: str) -> tuple[str, str]:
    key, equals, value = label.partition("=")
    if not equals:
        raise click.UsageError(f"--label is {label!r}; must be KEY=VALUE")
    return key, value


def _shape(shape: str) -> pb2.AdapterShape:
    match = _SHAPE.fullmatch(shape)
    if match is None:
        raise click.UsageError(f"--shape is {shape!r}; must be a rank, or RANKxCOUNT such as 16x100")
    return pb2.AdapterShape(rank=int(match[1]), count=int(match[2]) if match[2] else None)
