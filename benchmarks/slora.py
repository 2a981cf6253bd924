"""S-LoRA's question: what does it cost to have thousands of adapters registered instead of five?

    python benchmarks/slora.py          # about ten minutes; prints the table, writes docs/performance.md and the plot
    python benchmarks/slora.py --quick  # two short rounds at 5 and 100 adapters; prints the table only

S-LoRA's generator (uniform popularity, Poisson arrivals, prompts and answers of 8 to 511 tokens) at the rate that a
server without adapters can just hold, which is measured first. Random weights of the demo's shape, adapters of rank 8.
One server for each number of registered adapters, all up at once and asked in turns; an open loop over gRPC.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
import grpc
import transformers
from loaded import weft_server
from report import Samples, machine, table, write_section
from rich.progress import Progress
from shapes import make_base, write_adapters

import weft
from weft.server.bench import generator
from weft.server.bench.plot import Point, plot
from weft.server.bench.summary import Record, Summary, summarize
from weft.server.bench.target import survey
from weft.server.bench.workload import Burst, Lengths, Scheduled, Trace
from weft.server.cli.client import Endpoint

ROOT = Path(weft.__file__).parents[2]
RANK = 8
CONTEXT = 2048

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How much is measured. seconds: of each run's arrivals; probe: requests that measure what the base can hold."""

    shape: str
    counts: Sequence[int]
    rounds: int
    seconds: float
    probe: int
    lengths: Lengths = (8, 512)


FULL = Effort("demo", (5, 100, 1000, 2000), 2, 50.0, 256)
QUICK = Effort("tiny", (5, 100), 2, 5.0, 32, (8, 64))


@dataclass
class Suite:
    """Runs by the number of adapters that the server had; rate: that was offered, requests a second."""

    rate: float
    runs: dict[int, list[Summary]] = field(default_factory=dict)
    records: dict[int, list[list[Record]]] = field(default_factory=dict)

    def throughput(self, count: int) -> Samples:
        return Samples([run.requests_per_s for run in self.runs[count]])

    def ratio(self, count: int) -> Samples:
        """Over the fewest adapters, round by round."""
        fewest = self.throughput(min(self.runs)).values
        return Samples([mine / first for mine, first in zip(self.throughput(count).values, fewest, strict=True)])

    def show(self) -> str:
        head = ["registered", "requests/s", "over the fewest", "tokens/s", "TTFT p50, s", "p99", "first token < 6 s"]
        return table(head, [self._row(count) for count in self.runs])

    def _row(self, count: int) -> list[str]:
        runs = self.runs[count]
        ttft = [run.ttft for run in runs if run.ttft is not None]
        return [
            f"{count:,}",
            self.throughput(count).show(digits=2),
            self.ratio(count).show(digits=3),
            Samples([run.tokens_per_s for run in runs]).show(digits=0),
            Samples([each.p50 for each in ttft]).show(digits=2) if ttft else "-",
            Samples([each.p99 for each in ttft]).show(digits=2) if ttft else "-",
            Samples([run.slo_attainment * 100 for run in runs]).show(digits=1) + " %",
        ]

    @property
    def failures(self) -> int:
        return sum(run.requests - run.answered for runs in self.runs.values() for run in runs)

    @property
    def warnings(self) -> list[str]:
        return list(dict.fromkeys(run.warning for runs in self.runs.values() for run in runs if run.warning))

    def points(self) -> list[tuple[float | str, list[Point]]]:
        return [
            (count, [Point(run.requests_per_s, *((t.p50, t.p99) if (t := run.ttft) else (None, None))) for run in runs])
            for count, runs in self.runs.items()
        ]

    def to_json(self) -> dict[str, object]:
        return {
            "rate": self.rate,
            "runs": {
                str(count): [
                    {**asdict(run), "requests": [record.to_json() for record in records]}
                    for run, records in zip(runs, self.records[count], strict=True)
                ]
                for count, runs in self.runs.items()
            },
        }


def offer(address: str, schedule: Sequence[Scheduled], seed: int) -> tuple[Summary, list[Record]]:
    """Run a schedule over the adapters that the server lists."""
    with grpc.insecure_channel(address) as channel:
        target = survey(channel)
    requests = generator.prepare(schedule, target.adapters, target.pool, seed)
    ran = asyncio.run(generator.run(Endpoint(address), requests, None, lambda _: None))
    return summarize(ran.records, ran.busy_s, ran.wall_s), ran.records


def capacity(address: str, effort: Effort) -> float:
    """Requests a second that a server holds with none to wait for: many at once, to the base."""
    burst = Burst("identical", effort.probe, effort.lengths, effort.lengths)
    base = [Scheduled(0.0, None, each.prompt_tokens, each.new_tokens) for each in burst.schedule()]
    offer(address, base[:8], seed=1)
    return offer(address, base, seed=2)[0].requests_per_s


def measure(effort: Effort, folder: Path, threads: int, tell: Tell) -> Suite:
    base = folder / "base"
    make_base(effort.shape, base, CONTEXT)
    options = ("--no-adapter-probe", "--no-watch", "--max-queued-requests", 100_000)
    with ExitStack() as stack:
        tell("measuring what the base can hold")
        with weft_server(base, *options, threads=threads) as address:
            suite = Suite(capacity(address, effort))
        servers = {}
        for count in effort.counts:
            tell(f"registering {count:,} adapters")
            adapters = folder / str(count)
            write_adapters(effort.shape, adapters, dict.fromkeys([f"a{i:04d}" for i in range(count)], RANK))
            servers[count] = stack.enter_context(weft_server(base, "--adapters", adapters, *options, threads=threads))
        for turn in range(effort.rounds):
            for count, address in servers.items():
                tell(f"round {turn + 1}: {count:,} adapters, {suite.rate:.2f} requests/s")
                trace = Trace(suite.rate, effort.seconds, count, 1.0, 1.0, effort.lengths, effort.lengths, 42 + turn)
                summary, records = offer(address, trace.schedule(), seed=turn)
                suite.runs.setdefault(count, []).append(summary)
                suite.records.setdefault(count, []).append(records)
    return suite


def words(suite: Suite, effort: Effort) -> str:
    low, high = effort.lengths
    offered = f"{suite.rate:.2f} requests/s for {effort.seconds:g} s, prompts and answers of {low} to {high - 1} tokens"
    return " ".join([f"Offered: {offered}; {suite.failures} requests failed.", *suite.warnings])


def made_by(effort: Effort, threads: int) -> str:
    shape = f"the {effort.shape} shape, {effort.rounds} rounds, {threads} thread{'s' * (threads > 1)} a server"
    return f"Machine: {machine()}; {shape}."


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="Less of everything; writes nothing but --samples and --plot.")
@click.option("--shape", type=click.Choice(["tiny", "demo", "135m"]), help="[default: demo; with --quick, tiny]")
@click.option("--rounds", type=click.IntRange(1), help="[default: 2]")
@click.option("--seconds", type=click.FloatRange(1), help="Of each run's arrivals.  [default: 50; with --quick, 5]")
@click.option("--threads", default=1, show_default=True, help="Of each server; the generator has the other cores.")
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "docs" / "performance.md")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="[default: docs/slora.svg]")
@click.option("--samples", type=click.Path(path_type=Path), help="A file for every request, as JSON.")
def main(
    quick: bool,
    shape: str | None,
    rounds: int | None,
    seconds: float | None,
    threads: int,
    output: Path,
    picture: Path | None,
    samples: Path | None,
) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    given = QUICK if quick else FULL
    effort = Effort(
        shape or given.shape,
        given.counts,
        rounds or given.rounds,
        seconds or given.seconds,
        given.probe,
        given.lengths,
    )
    with tempfile.TemporaryDirectory() as scratch, Progress() as progress:
        work = progress.add_task("making the model", total=None)
        suite = measure(effort, Path(scratch), threads, lambda words: progress.update(work, description=words))
    report = f"{suite.show()}\n\n{words(suite, effort)}\n\n{made_by(effort, threads)}\n"
    click.echo(report)
    if not quick:
        write_section(output, "slora", report)
        picture = picture or ROOT / "docs" / "slora.svg"
        samples = samples or ROOT / "benchmarks" / "results" / "slora.json"
    if picture is not None:
        plot(picture, "adapters registered", suite.points())
    if samples is not None:
        samples.parent.mkdir(parents=True, exist_ok=True)
        samples.write_text(json.dumps(suite.to_json()) + "\n")


if __name__ == "__main__":
    main()
