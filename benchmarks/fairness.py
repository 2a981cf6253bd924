"""What one adapter's traffic does to the others', and what one long prompt does to those who decode.

    python benchmarks/fairness.py          # minutes; prints the tables, writes docs/performance.md and the samples
    python benchmarks/fairness.py --quick  # fewer and shorter rounds; prints the tables only

Random weights. Each load runs against a `weft serve` of its own, asked over gRPC, in turns within one run.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import click
import transformers
from loaded import Client, Load, Seen, closed_loop, weft_server
from overhead import measure_overhead
from report import Samples, machine, table, write_section
from rich.progress import Progress
from shapes import SHAPES, make_base, write_adapters

import weft
from weft.server.config import EngineConfig

ROOT = Path(weft.__file__).parents[2]
OTHERS = [f"a{i:02d}" for i in range(19)]
HOT = "hot"
TIMES = 50
"""How often the hot adapter is asked for each time that one of the others is."""

LONG_PROMPT = 8192
NUM_DECODES = 40
DEFAULT_TARGET_MS = EngineConfig().target_step_ms

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured. busy: the others' share of what the server can do; seconds: of each load."""

    shape: str
    rounds: int
    seconds: float
    busy: float
    prompt_tokens: int
    new_tokens: int
    long_rounds: int
    num_running: int


FULL = Effort("135m", 2, 60.0, 0.35, 128, 16, 2, 256)
QUICK = Effort("tiny", 1, 10.0, 0.35, 128, 16, 1, 64)


@dataclass
class Crowding:
    """Times to the first token of the nineteen others in seconds, by the load that they shared the server with."""

    rate: float
    ttft: dict[str, Samples] = field(default_factory=dict)
    num_hot: dict[str, int] = field(default_factory=dict)

    @property
    def alone(self) -> str:
        return next(iter(self.ttft))

    def ratio(self, load: str, percent: float) -> float:
        return self.ttft[load].percentile(percent) / self.ttft[self.alone].percentile(percent)

    def show(self) -> str:
        head = ["load", "the others' requests", "hot requests answered", "median TTFT, ms", "p95 TTFT, ms"]
        return table(head, [self._row(load) for load in self.ttft])

    def _row(self, load: str) -> list[str]:
        samples = self.ttft[load]
        cells = [f"{samples.percentile(percent) * 1e3:.0f}; {self.ratio(load, percent):.2f}x" for percent in (50, 95)]
        return [load, str(len(samples.values)), str(self.num_hot[load]), *cells]

    def to_json(self) -> dict[str, object]:
        return {
            load: {**samples.to_json(), "p95_ratio": self.ratio(load, 95), "hot_answered": self.num_hot[load]}
            for load, samples in self.ttft.items()
        }


def arrivals(rate: float, seconds: float, seed: int, *, hot: bool) -> list[tuple[float, str]]:
    """When each adapter is asked for: the others `rate` times a second each, the hot one TIMES as often. In order."""
    due = []
    for number, (name, times) in enumerate([*((name, 1) for name in OTHERS), *([(HOT, TIMES)] if hot else [])]):
        rng = random.Random(1000 * seed + number)
        at = rng.expovariate(rate * times)
        while at < seconds:
            due.append((at, name))
            at += rng.expovariate(rate * times)
    return sorted(due)


async def offer(client: Client, due: Sequence[tuple[float, str]], seconds: float) -> list[Seen]:
    """An open loop; what still waits when the others are all answered, and the time is over, is given up."""
    started = time.perf_counter()
    tasks: dict[asyncio.Task[Seen], str] = {}
    for seed, (at, name) in enumerate(due):
        await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
        tasks[asyncio.create_task(client.stream(name, seed))] = name
    await asyncio.gather(*(task for task, name in tasks.items() if name != HOT))
    await asyncio.sleep(max(0.0, started + seconds - time.perf_counter()))
    seen = [task.result() for task in tasks if task.done()]
    waiting = [task for task in tasks if not task.done()]
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    return seen


def measure_crowding(effort: Effort, base: Path, folder: Path, tell: Tell) -> Crowding:
    """One server; how fast it is is measured first, with twenty clients that each ask again once answered."""
    write_adapters(effort.shape, folder, dict.fromkeys([*OTHERS, HOT], 8))
    load = Load(SHAPES[effort.shape]["vocab_size"], effort.prompt_tokens, effort.new_tokens)
    options = ("--adapters", folder, "--no-adapter-probe", "--no-watch", "--max-queued-requests", 100_000)
    with weft_server(base, *options, threads=1) as address:

        async def capacity() -> float:
            async with Client(address, load) as client:
                await closed_loop(client.ask, OTHERS, clients=20)
                return 3 * len(OTHERS) / await closed_loop(client.ask, OTHERS * 3, clients=20)

        tell("measuring what the server can do")
        rate = effort.busy * asyncio.run(capacity()) / len(OTHERS)
        crowding = Crowding(rate)
        share = (len(OTHERS) + TIMES) * rate * effort.busy / (len(OTHERS) * rate)
        names = {
            False: "nineteen adapters",
            True: f"and one at {TIMES} times their rate ({share:.1f} of capacity in all)",
        }
        for turn in range(effort.rounds):
            for hot, name in names.items():
                tell(f"{name}, round {turn + 1}")

                async def work(hot: bool = hot, turn: int = turn) -> list[Seen]:
                    async with Client(address, load) as client:
                        return await offer(client, arrivals(rate, effort.seconds, turn, hot=hot), effort.seconds)

                seen = asyncio.run(work())
                others = [each.ttft_s for each in seen if each.adapter != HOT]
                crowding.ttft.setdefault(name, Samples()).values += others
                crowding.num_hot[name] = crowding.num_hot.get(name, 0) + len(seen) - len(others)
    return crowding


@dataclass
class Beside:
    """Gaps between the tokens of those who decode beside a long prompt, and that one's TTFT; seconds, by target."""

    gaps: dict[int, Samples] = field(default_factory=dict)
    ttft: dict[int, Samples] = field(default_factory=dict)

    def show(self) -> str:
        head = ["target", "median gap, ms", "p99", "largest gap, ms", "the long prompt's TTFT, s"]
        return table(
            head,
            [
                [
                    f"{target} ms" if target else "none: chunks of 512 tokens",
                    *(f"{gaps.percentile(percent) * 1e3:.0f}" for percent in (50, 99, 100)),
                    self.ttft[target].show(),
                ]
                for target, gaps in self.gaps.items()
            ],
        )

    def to_json(self) -> dict[str, object]:
        return {
            str(target): {"gap_seconds": gaps.to_json(), "ttft_seconds": self.ttft[target].to_json()}
            for target, gaps in self.gaps.items()
        }


def measure_beside(effort: Effort, targets: Sequence[int], base: Path, tell: Tell) -> Beside:
    """A server for each target: forty requests decode, and then one with a prompt of LONG_PROMPT tokens comes."""
    vocab_size = SHAPES[effort.shape]["vocab_size"]
    beside = Beside()
    options = ("--kv-tokens", 1 << 16, "--context-length", 16384, "--no-watch")
    for turn in range(effort.long_rounds):
        for target in targets:
            tell(f"{LONG_PROMPT} tokens beside {NUM_DECODES} decodes, target {target} ms, round {turn + 1}")
            with weft_server(base, *options, "--target-step-ms", target, threads=1) as address:
                gaps, ttft_s = asyncio.run(_beside(address, vocab_size))
            beside.gaps.setdefault(target, Samples()).values += gaps
            beside.ttft.setdefault(target, Samples()).values.append(ttft_s)
    return beside


async def _beside(address: str, vocab_size: int) -> tuple[list[float], float]:
    """The gaps while the long prompt is computed, and how long it takes."""
    async with (
        Client(address, Load(vocab_size, 16, 4096)) as decoding,
        Client(address, Load(vocab_size, LONG_PROMPT, 1)) as long,
        Client(address, Load(vocab_size, 256, 4)) as other,
    ):
        came: list[list[float]] = [[] for _ in range(NUM_DECODES)]
        tasks = [asyncio.create_task(decoding.watch("", seed, came[seed])) for seed in range(NUM_DECODES)]
        await other.stream("", 1)
        await other.stream("", 2)
        seen = await long.stream("")
        end_s = seen.came_s[0]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    gaps = [now - before for times in came for before, now in pairwise(times) if now > seen.asked_s and before < end_s]
    return gaps, seen.ttft_s


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="Less of everything; writes nothing but --samples.")
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "docs" / "performance.md")
@click.option("--samples", type=click.Path(path_type=Path), help="A file for every sample, as JSON.")
def main(quick: bool, output: Path, samples: Path | None) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    effort = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as scratch, Progress() as progress:
        work = progress.add_task("making the model", total=None)

        def tell(words: str) -> None:
            progress.update(work, description=words)

        base = Path(scratch) / "base"
        make_base(effort.shape, base, max_position_embeddings=16384)
        crowding = measure_crowding(effort, base, Path(scratch) / "adapters", tell)
        beside = measure_beside(effort, (0, DEFAULT_TARGET_MS), base, tell)
        tell(f"{effort.num_running} running requests")
        overhead = measure_overhead(base, SHAPES[effort.shape]["vocab_size"], effort.num_running)
    report = "\n".join(
        [
            f"### One adapter at {TIMES} times the rate of nineteen others\n\n{crowding.show()}\n",
            f"### A prompt of {LONG_PROMPT:,} tokens beside {NUM_DECODES} decodes\n\n{beside.show()}\n",
            f"### A step's time at {effort.num_running} running requests\n\n{overhead.show()}\n",
            f"Machine: {machine()}; every server computes with one thread.\n",
        ]
    )
    click.echo(report)
    data = {"crowding": crowding.to_json(), "beside": beside.to_json(), "overhead": overhead.to_json()}
    if not quick:
        write_section(output, "fairness", report)
        samples = samples or ROOT / "benchmarks" / "results" / "fairness.json"
    if samples is not None:
        samples.parent.mkdir(parents=True, exist_ok=True)
        samples.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
