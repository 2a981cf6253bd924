"""What callers see of a server that is asked for five times what it can do.

    python benchmarks/overload.py          # minutes; prints the tables, writes docs/operations.md and the samples
    python benchmarks/overload.py --quick  # one short round; prints only
    python benchmarks/overload.py --max-queue-ms 0 --max-queue-ms 250 --max-queue-ms 1000   # to choose a bound

The demo's base and adapters in a `weft serve` of its own on one thread, asked over gRPC from the other core. What it
can do is measured first, with as many clients as it runs requests; then it is offered 0.8 and 5 times that, in turns.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
from open_loop import End, Shape, Source, tokens_a_second
from report import Samples, machine, table, write_section
from rich.progress import Progress
from soaking.process import weft_process
from soaking.truth import DEMO

import weft
from weft.demo import tasks
from weft.server.config import EngineConfig

ROOT = Path(weft.__file__).parents[2]
LOADS = (0.8, 5.0)
SHAPE = Shape(("", *sorted(tasks.TASKS)), prompt_tokens=64, new_tokens=64)
RAMP_S = 3.0
"""At the beginning of each load, which counts for nothing: the rate of the queue is measured first."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured. seconds: of each load."""

    rounds: int
    seconds: float
    clients: int = EngineConfig().max_running_requests


FULL = Effort(3, 20.0)
QUICK = Effort(1, 6.0)


@dataclass
class Seen:
    """Of one load, over all rounds; p95: of each round, of the accepted requests' time to first token, in seconds."""

    p50: Samples = field(default_factory=Samples)
    p95: Samples = field(default_factory=Samples)
    refusal_p95: Samples = field(default_factory=Samples)
    tokens: Samples = field(default_factory=Samples)
    answered: int = 0
    refused: int = 0
    without_retry: int = 0
    lost: list[str] = field(default_factory=list)

    def add(self, ends: Sequence[End], seconds: float) -> None:
        first = Samples([end.first_token_s for end in ends if end.code == "OK" and end.first_token_s is not None])
        refused = [end for end in ends if end.code == "RESOURCE_EXHAUSTED"]
        self.p50.values.append(first.percentile(50))
        self.p95.values.append(first.percentile(95))
        self.tokens.values.append(tokens_a_second(ends, seconds))
        if refused:
            self.refusal_p95.values.append(Samples([end.ended_s for end in refused]).percentile(95))
        self.answered += len(first.values)
        self.refused += len(refused)
        self.without_retry += sum(end.retry_s is None for end in refused)
        self.lost += [f"{end.code}: {end.words}" for end in ends if end.code not in ("OK", "RESOURCE_EXHAUSTED")]

    def to_json(self) -> dict[str, object]:
        samples = {"p50": self.p50, "p95": self.p95, "tokens_a_second": self.tokens}
        counts = {"answered": self.answered, "refused": self.refused, "without_retry_info": self.without_retry}
        return {**{name: each.to_json() for name, each in samples.items()}, **counts, "lost": self.lost}


@dataclass
class Overload:
    """One bound. capacity: requests a second."""

    max_queue_ms: int
    capacity: float
    loads: dict[float, Seen]

    @property
    def ratios(self) -> Samples:
        """Of the p95 of the higher load to that of the lower, round by round."""
        low, high = (self.loads[load].p95.values for load in LOADS)
        return Samples([over / under for over, under in zip(high, low, strict=True)])

    def rows(self) -> list[list[str]]:
        return [self._row(load, seen) for load, seen in self.loads.items()]

    def _row(self, load: float, seen: Seen) -> list[str]:
        share = seen.refused / max(1, seen.answered + seen.refused)
        is_high = load == LOADS[-1]
        return [
            f"{self.max_queue_ms} ms" if self.max_queue_ms else "none",
            f"{load:g}x",
            f"{seen.answered:,}",
            f"{seen.refused:,} ({100 * share:.0f} %)",
            seen.refusal_p95.show(1e3, 0) if seen.refusal_p95.values else "",
            seen.p50.show(1e3, 0),
            seen.p95.show(1e3, 0),
            f"{self.ratios.show(1, 2)}" if is_high else "",
            seen.tokens.show(1, 0),
        ]


HEAD = [
    "bound",
    "offered",
    "answered",
    "refused",
    "p95 to a refusal, ms",
    "median TTFT, ms",
    "p95 TTFT, ms",
    "p95 to that at 0.8x",
    "tokens/s",
]


async def measure(address: str, max_queue_ms: int, effort: Effort, tell: Tell) -> Overload:
    async with Source(address, SHAPE) as source:
        tell("measuring what the server can do")
        await source.closed(effort.clients, effort.seconds / 4)
        capacity = len(await source.closed(effort.clients, effort.seconds / 2)) / (effort.seconds / 2)
        found = Overload(max_queue_ms, capacity, {load: Seen() for load in LOADS})
        for turn in range(effort.rounds):
            for load in LOADS:
                tell(f"bound {max_queue_ms} ms, {load:g} times {capacity:.0f} requests a second, round {turn + 1}")
                await source.opened(load * capacity, RAMP_S, 2 * turn)
                found.loads[load].add(
                    await source.opened(load * capacity, effort.seconds, 2 * turn + 1), effort.seconds
                )
    return found


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="One short round; writes nothing but --samples.")
@click.option("--max-queue-ms", "bounds", type=int, multiple=True, default=(EngineConfig().max_queue_ms,))
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "docs" / "operations.md")
@click.option("--samples", type=click.Path(path_type=Path), help="A file for every sample, as JSON.")
def main(quick: bool, bounds: tuple[int, ...], output: Path, samples: Path | None) -> None:
    effort = QUICK if quick else FULL
    found = []
    with Progress() as progress:
        work = progress.add_task("starting", total=None)
        for bound in bounds:
            options = ("--adapters", DEMO / "adapters", "--threads", 1, "--max-queue-ms", bound)
            with weft_process(DEMO / "base", *options) as server:
                tell = lambda words: progress.update(work, description=words)  # noqa: E731
                found.append(asyncio.run(measure(server.address, bound, effort, tell)))
    rows = [row for each in found for row in each.rows()]
    capacities = ", ".join(f"{each.capacity:.0f}" for each in found)
    report = (
        f"{table(HEAD, rows)}\n\n"
        f"It could do {capacities} requests of {SHAPE.prompt_tokens} + {SHAPE.new_tokens} tokens a second; "
        f"{effort.rounds} rounds of {effort.seconds:g} s, median (lowest to highest). Machine: {machine()}.\n"
    )
    click.echo(report)
    if not quick:
        write_section(output, "overload", report)
        samples = samples or ROOT / "benchmarks" / "results" / "overload.json"
    if samples is not None:
        data = {each.max_queue_ms: {load: seen.to_json() for load, seen in each.loads.items()} for each in found}
        samples.parent.mkdir(parents=True, exist_ok=True)
        samples.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
