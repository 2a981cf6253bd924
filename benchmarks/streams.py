"""Thousands of streams at the same time, each on a connection of its own: none is lost, all answers are right.

    python benchmarks/streams.py                 # 2,000 streams
    python benchmarks/streams.py --streams 200   # a short one

The demo's base and adapters in a `weft serve` of its own. All streams are open before the first may end. Ends with 1
where one was lost, refused or answered wrongly.
"""

from __future__ import annotations

import asyncio
import json
import resource
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import transformers
from open_loop import End, Shape, Source
from report import Samples, machine, table
from rich.progress import Progress
from soaking.process import ServerProcess, weft_process
from soaking.truth import DEMO

from weft.demo import tasks

SHAPE = Shape(("", *sorted(tasks.TASKS)), prompt_tokens=16, new_tokens=64)


@dataclass
class Streams:
    """What came of them. together: the most that the server had at once."""

    ends: Sequence[End]
    together: int
    seconds: float
    sockets: int
    rss_bytes: tuple[int, int]

    @property
    def lost(self) -> Counter[str]:
        return Counter(f"{end.code}: {end.words}" for end in self.ends if end.code != "OK")

    def show(self) -> str:
        first = Samples([end.first_token_s for end in self.ends if end.first_token_s is not None])
        before, during = self.rss_bytes
        rows = [
            ["streams", f"{len(self.ends):,}"],
            ["… that the server had at once", f"{self.together:,}"],
            ["connections at once", f"{self.sockets:,}"],
            ["lost", f"{self.lost.total()}"],
            ["tokens a second", f"{sum(end.tokens for end in self.ends) / self.seconds:.0f}"],
            ["time to first token, median and last", f"{first.percentile(50):.1f} s, {first.high:.1f} s"],
            ["memory of the server before and with them", f"{before / 2**20:.0f} MiB, {during / 2**20:.0f} MiB"],
            *([words, str(count)] for words, count in self.lost.most_common(5)),
        ]
        return table(["what", "found"], rows)


async def measure(server: ServerProcess, num_streams: int, connections: int) -> Streams:
    loop = asyncio.get_running_loop()
    before = server.held()
    together, most = 0, before

    async def watch() -> None:
        nonlocal together, most
        while True:
            metrics = await asyncio.to_thread(server.metrics)
            together = max(together, int(metrics["weft_requests_running"] + metrics["weft_requests_waiting"]))
            most = max(most, server.held(), key=lambda held: held.rss_bytes)
            await asyncio.sleep(0.25)

    async with Source(server.address, SHAPE, connections) as source:
        watching = asyncio.create_task(watch())
        started_s = loop.time()
        ends = await asyncio.gather(*(source.ask(number) for number in range(num_streams)))
        seconds = loop.time() - started_s
        watching.cancel()
        sockets = server.held().sockets - before.sockets
    return Streams(ends, together, seconds, sockets, (before.rss_bytes, most.rss_bytes))


@click.command(help=__doc__)
@click.option("--streams", "num_streams", type=click.IntRange(1), default=2000, show_default=True)
@click.option("--connections", type=click.IntRange(1), help="That they share.  [default: one each]")
@click.option("--output", type=click.Path(path_type=Path), help="A file for what was found, as JSON.")
@click.pass_context
def main(context: click.Context, num_streams: int, connections: int | None, output: Path | None) -> None:
    transformers.utils.logging.set_verbosity_error()
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    with Progress() as progress:
        progress.add_task(f"{num_streams:,} streams", total=None)
        options = ("--adapters", DEMO / "adapters", "--threads", 1, "--max-queue-ms", 0)
        with weft_process(DEMO / "base", *options) as server:
            found = asyncio.run(measure(server, num_streams, connections or num_streams))
    click.echo(f"{found.show()}\n\nMachine: {machine()}.")
    if output is not None:
        data = {"streams": num_streams, "together": found.together, "lost": found.lost, "seconds": found.seconds}
        output.write_text(json.dumps(data, indent=1) + "\n")
    context.exit(1 if found.lost else 0)


if __name__ == "__main__":
    main()
