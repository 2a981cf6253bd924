"""`weft sync`: makes a running server's adapters match a declared list, once or for good."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import click
import grpc
from watchfiles import Change, watch

from weft.errors import InvalidConfig
from weft.server.cli.adapters import pages
from weft.server.cli.client import Endpoint, Line, describe, failures_in_words, server_options
from weft.server.cli.declared import read
from weft.server.cli.syncing import Step, steps_to, take_all
from weft.v1 import adapter_pb2 as pb2
from weft.v1 import adapter_pb2_grpc

QUIET_MS = 200
"""How long the file must be left alone before it is read again."""

RECONNECT_S = 1.0


@dataclass(slots=True)
class _Said:
    """Lines on standard error, each once for as long as it holds."""

    before: frozenset[str] = frozenset()
    now: set[str] = field(default_factory=set)

    def problem(self, line: str) -> None:
        if line not in self.before and line not in self.now:
            click.echo(f"weft: {' '.join(line.split())}", err=True)
        self.now.add(line)

    def turn(self) -> None:
        """What is not said in the next round is over, and worth a line when it comes again."""
        self.before, self.now = frozenset(self.now), set()


@dataclass(frozen=True, slots=True)
class _Sync:
    """path: of the declaration. owner: whose adapters those are that may be deleted."""

    path: Path
    line: Line
    owner: str
    prune: bool
    said: _Said = field(default_factory=_Said)

    @property
    def stub(self) -> adapter_pb2_grpc.AdapterServiceStub:
        return adapter_pb2_grpc.AdapterServiceStub(self.line.channel)

    def plan(self) -> list[Step]:
        """Raises InvalidConfig and grpc.RpcError."""
        declaration = read(self.path, self.owner)
        for problem in declaration.problems:
            self.said.problem(problem)
        if self.prune and declaration.spared is None:
            self.said.problem(f"{self.path}: nothing is deleted while an entry's name can't be read")
        there: Mapping[str, pb2.Adapter] = {adapter.name: adapter for adapter in pages(self.stub, {})}
        return steps_to(declaration, there, self.owner, prune=self.prune)

    def once(self) -> bool:
        """Take every step; whether everything is as declared then. Raises InvalidConfig and grpc.RpcError."""
        for step, failure in take_all(self.plan(), self.stub, lambda error: describe(error, self.line.server)):
            if failure:
                self.said.problem(f"{step.adapter.name} was not {step.verb.done}: {failure}")
            else:
                click.echo(f"{step.verb.done} {step.what}")
        return not self.said.now

    def for_good(self, interval_s: float, ready_file: Path | None) -> NoReturn:
        """Once now, and again when the file or the server has changed, and now and then without.

        A key that is refused does not end it: a sidecar that ends takes its pod out of service.
        """
        wake = threading.Event()
        for follow in (self._follow_file, self._follow_server):
            threading.Thread(target=follow, args=(wake,), daemon=True).start()
        while True:
            wake.clear()
            self.line.renew()
            try:
                self.once()
                if ready_file is not None:
                    ready_file.touch()
            except InvalidConfig as error:
                self.said.problem(str(error))
            except grpc.RpcError as error:
                self.said.problem(describe(error, self.line.server))
            self.said.turn()
            wake.wait(interval_s)

    def _follow_file(self, wake: threading.Event) -> None:
        """Kubernetes replaces a mounted ConfigMap by one rename, of the link `..data` beside the file."""

        def is_ours(_change: Change, path: str) -> bool:
            return Path(path).name in (self.path.name, "..data")

        try:
            for _ in watch(self.path.parent, watch_filter=is_ours, step=QUIET_MS, recursive=False):
                wake.set()
        except (OSError, RuntimeError) as error:  # the system's limits on watches, for one
            click.echo(f"weft: {self.path} is read every --interval only: it can't be watched ({error})", err=True)

    def _follow_server(self, wake: threading.Event) -> None:
        """A server that has come, or come back, lists its adapters; one that lost an adapter says so."""
        while True:
            try:
                for event in self.stub.WatchAdapters(pb2.WatchAdaptersRequest()):
                    if event.kind in (pb2.ADAPTER_EVENT_KIND_LISTED, pb2.ADAPTER_EVENT_KIND_DELETED):
                        wake.set()
            except (grpc.RpcError, ValueError):  # gRPC's own for a channel that was closed a moment ago
                if self.line.is_closed:
                    return
                if self.line.is_stale:  # the server may have the certificate that was to come
                    wake.set()
            time.sleep(RECONNECT_S)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@server_options
@click.option("--watch/--once", "for_good", default=False, help="Go on as the file and the server change.  [once]")
@click.option("--prune/--no-prune", default=True, help="Delete what sync made and the file no longer has.  [prune]")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
@click.option(
    "--managed-by", "owner", default="weft-sync", show_default=True, help="The label of what this file declares."
)
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(0.1, 86400),
    default=60.0,
    show_default=True,
    help="With --watch: look again after so many seconds, and try again what failed.",
)
@click.option(
    "--ready-file", type=click.Path(path_type=Path), help="Made once the list has been gone through, for a probe."
)
def sync(
    server: Endpoint,
    file: Path,
    for_good: bool,
    prune: bool,
    dry_run: bool,
    owner: str,
    interval_s: float,
    ready_file: Path | None,
) -> int:
    """Make the adapters match those that FILE declares, in TOML or JSON: create, update what differs, delete.

    \b
    [[adapters]]
    name = "team-a/summaries"
    source = "hf:team-a/summaries@v3"
    labels = { tenant = "a" }
    pinned = true

    Deletes only what it made itself, which it labels. An entry that can't be served costs a line and no other entry.
    Ends with 0 when all is as declared, 1 if anything could not be done.
    """  # noqa: D301 - \b is click's
    if dry_run and for_good:
        raise click.UsageError("--dry-run and --watch contradict each other; choose one")
    if not owner:
        raise click.UsageError("--managed-by is empty; must be a text")
    with closing(Line(server)) as line, failures_in_words(server):
        syncing = _Sync(file.absolute(), line, owner, prune)
        if dry_run:
            for step in syncing.plan():
                click.echo(f"would {step.verb} {step.what}")
            return 1 if syncing.said.now else 0
        if for_good:
            if not file.absolute().parent.is_dir():
                raise click.UsageError(f"FILE is {str(file)!r}; its folder must exist")
            signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
            syncing.for_good(interval_s, ready_file)
        is_done = syncing.once()
        if ready_file is not None:
            ready_file.touch()
        return 0 if is_done else 1
