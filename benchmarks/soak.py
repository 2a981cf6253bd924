"""Thousands of clients that ask, cancel, stall, talk nonsense and vanish, while adapters come and go; then an audit.

    python benchmarks/soak.py                  # 20,000 requests, minutes
    python benchmarks/soak.py --minutes 120    # as many as that takes
    python benchmarks/soak.py --requests 500   # a short one

The demo's base and adapters in a `weft serve` of its own. Ends with 1 where a request was lost or answered wrongly,
where a block, a page, a thread, a file or a socket is still held, or where memory has grown.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

import click
import grpc
import transformers
from report import machine, table
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from soaking.clients import CANCELLED, GOOD, LOST, REFUSED, RIGHT, WRONG, Crowd, Tally
from soaking.passing import NAMES, Passing
from soaking.process import Held, ServerProcess, weft_process
from soaking.truth import DEMO, Truth, learn_truth
from soaking.vandals import Vandals

from weft.v1 import adapter_pb2, adapter_pb2_grpc

WARM_UP = 0.25
"""Of the requests, before memory and all else that is held is taken for what is normal."""

STALL_S = 2.0
"""For readers, so that a soak sees some of them ended."""

_HELD_IN_METRICS = {
    "requests in the server": "weft_requests_running",
    "KV blocks in use": "weft_kv_blocks_used",
    "adapter pages in use once all are deleted": "weft_adapter_pages_used",
}

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Effort:
    """minutes: instead of a number of requests. max_growth: of resident memory, in per cent."""

    requests: int = 20_000
    minutes: float = 0.0
    clients: int = 128
    seed: int = 0
    max_growth: float = 2.0
    adapters: int | None = None


DEFAULT = Effort()


@dataclass
class Soak:
    """What came of it. Each check: what was asked, what was found, and whether it is good."""

    tally: Tally
    seconds: float
    habits: dict[str, int]
    wrong: list[str]
    memory: list[tuple[float, int]]
    checks: list[tuple[str, str, str, bool]] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return all(good for *_, good in self.checks)

    def show(self) -> str:
        rows = [[name, asked, found, "yes" if good else "**no**"] for name, asked, found, good in self.checks]
        beside = ", ".join(f"{count:,} {name}" for name, count in sorted(self.habits.items()))
        rate = (
            f"{self.tally.total / self.seconds:.0f} requests and {self.tally.tokens / self.seconds:.0f} tokens a second"
        )
        examples = [f"- {line}" for line in (*self.tally.examples, *self.wrong)[:20]]
        parts = [table(["what", "asked", "found", "good"], rows), f"{rate}. Beside them: {beside}.", *examples]
        return "\n\n".join(parts)

    def to_json(self) -> dict[str, object]:
        return {
            "seconds": self.seconds,
            "ends": dict(self.tally.ends),
            "tokens": self.tally.tokens,
            "habits": self.habits,
            "checks": [dict(zip(("what", "asked", "found", "good"), check, strict=True)) for check in self.checks],
            "rss_bytes": self.memory,
        }


async def soak(server: ServerProcess, truth: Truth, effort: Effort, advance: Callable[[int], None], tell: Tell) -> Soak:
    digests = await _digests(server.address)
    tally = Tally()
    crowd = Crowd(server.address, truth, digests, NAMES, tally)
    vandals = Vandals(server.address, server.metrics_address, effort.seed)
    passing = Passing(server.address, [f"file:{DEMO / 'adapters' / name}" for name in truth.adapters], effort.seed)
    memory: list[tuple[float, int]] = []
    started_s = time.perf_counter()
    held = [server.held()]
    for share, words in ((WARM_UP, "warming up"), (1 - WARM_UP, "soaking")):
        tell(words)
        vandals.go_on()
        passing.go_on()
        others = [asyncio.create_task(vandals.run()), asyncio.create_task(passing.run())]
        watching = asyncio.create_task(_watch(server, tally, advance, memory, started_s))
        await crowd.run(_numbers(effort, share, tally.total), effort.clients, effort.seed)
        vandals.stop()
        passing.stop()
        await asyncio.gather(*others)
        watching.cancel()
        tell("coming to rest")
        gc.collect()  # a call that was given up keeps its connection until then
        threads = held[1].threads if len(held) > 1 else None
        held.append(await asyncio.to_thread(server.rest, sockets=held[0].sockets, threads=threads))
    habits = {**vandals.done, **passing.done}
    seconds = time.perf_counter() - started_s
    await _delete_all(server.address)
    wrong = [*vandals.wrong, *passing.wrong]
    found = Soak(tally, seconds, dict(habits), [*wrong, *(f"in the log: {line}" for line in server.trouble)], memory)
    found.checks = [*_answers(tally, wrong), *_leaks(server, *held[1:], effort.max_growth)]
    return found


def _numbers(effort: Effort, share: float, first: int) -> Iterator[int]:
    """Of the requests to send: so many, or for so long."""
    if not effort.minutes:
        yield from range(first, first + round(share * effort.requests))
        return
    end_s = time.monotonic() + share * effort.minutes * 60
    for number in itertools.count(first):
        if time.monotonic() > end_s:
            return
        yield number


async def _watch(
    server: ServerProcess,
    tally: Tally,
    advance: Callable[[int], None],
    memory: list[tuple[float, int]],
    started_s: float,
) -> None:
    while True:
        advance(tally.total)
        memory.append((time.perf_counter() - started_s, server.held().rss_bytes))
        await asyncio.sleep(1.0)


async def _digests(address: str) -> dict[str, str]:
    """The demo's adapters by what is in them."""
    async with grpc.aio.insecure_channel(address) as channel:
        listed = await adapter_pb2_grpc.AdapterServiceStub(channel).ListAdapters(adapter_pb2.ListAdaptersRequest())
    return {adapter.digest: adapter.name for adapter in listed.adapters}


async def _delete_all(address: str) -> None:
    """So that every page must be free."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        listed = await stub.ListAdapters(adapter_pb2.ListAdaptersRequest(page_size=1000))
        for adapter in listed.adapters:
            await stub.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name=adapter.name))


def _answers(tally: Tally, wrong: list[str]) -> Iterator[tuple[str, str, str, bool]]:
    ends = tally.ends
    total = sum(ends[end] for end in GOOD)
    yield "requests that ended as they should", f"all {tally.total:,}", f"{total:,}", total == tally.total
    for end in (RIGHT, CANCELLED, REFUSED):
        yield f"… {end}", "some", f"{ends[end]:,}", ends[end] > 0
    for end in (WRONG, LOST):
        yield end, "none", f"{ends[end]:,}", not ends[end]
    yield "what else went wrong beside them", "none", f"{len(wrong):,}", not wrong


def _leaks(server: ServerProcess, before: Held, after: Held, max_growth: float) -> Iterator[tuple[str, str, str, bool]]:
    metrics = server.metrics()
    for name, key in _HELD_IN_METRICS.items():
        yield name, "none", f"{metrics[key]:.0f}", not metrics[key]
    for name in ("threads", "files", "sockets", "children"):
        was, now = getattr(before, name), getattr(after, name)
        yield name, f"at most {was}", str(now), now <= was
    growth = 100 * (after.rss_bytes / before.rss_bytes - 1)
    found = f"{growth:+.2f} % of {before.rss_bytes / 2**20:.0f} MiB"
    yield "growth of resident memory after warm-up", f"< {max_growth:g} %", found, growth < max_growth
    yield "failures in the server's log", "none", str(len(server.trouble)), not server.trouble


@click.command(help=__doc__)
@click.option("--requests", type=click.IntRange(100), default=DEFAULT.requests, show_default=True)
@click.option("--minutes", type=click.FloatRange(0), default=0.0, help="Soak for so long instead.")
@click.option("--clients", type=click.IntRange(1), default=DEFAULT.clients, show_default=True, help="At a time.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--max-growth", type=float, default=DEFAULT.max_growth, show_default=True, help="Of memory, in per cent.")
@click.option("--output", type=click.Path(path_type=Path), help="A file for all that was found, as JSON.")
@click.option("--log", type=click.File("w"), help="A file for the server's log.")
@click.pass_context
def main(context: click.Context, output: Path | None, log: TextIO | None, **options: float) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    effort = Effort(**options)  # type: ignore[arg-type]  # the options are its fields
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,}"), TimeElapsedColumn())
    with Progress(*columns) as progress:
        work = progress.add_task("starting", total=None if effort.minutes else effort.requests)

        def tell(words: str) -> None:
            progress.update(work, description=words)

        found, exit_code = run(effort, lambda count: progress.update(work, completed=count), tell, log)
    click.echo(f"{found.show()}\n\nMachine: {machine()}.")
    if output is not None:
        data = {"effort": asdict(effort), "machine": machine(), **found.to_json(), "exit_code": exit_code}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(data, indent=1) + "\n")
    context.exit(0 if found.is_good else 1)


def run(effort: Effort, advance: Callable[[int], None], tell: Tell, log: TextIO | None = None) -> tuple[Soak, int]:
    """A soak of a server of its own, and the server's exit code, which is one of the checks."""
    truth = learn_truth(effort.adapters, tell)
    tell("starting the server")
    options = ("--adapters", DEMO / "adapters", "--threads", 1, "--stall-seconds", STALL_S, "--no-watch")
    with weft_process(DEMO / "base", *options, log=log) as server:
        found = asyncio.run(soak(server, truth, effort, advance, tell))
        exit_code = server.stop()
    found.checks.append(("exit code after SIGTERM", "0", str(exit_code), exit_code == 0))
    return found, exit_code


if __name__ == "__main__":
    main()
