"""What clients see of a server with more adapters than pages: throughput, first tokens, and others' decode steps."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from loaded import Client, Load, Seen, closed_loop, open_loop, weft_server
from report import Samples, table
from shapes import SHAPES, write_adapters

RANK = 8
"""One page an adapter, so that pages are slots."""

BUSY = 0.5
"""Share of the closed loop's rate at which the open loop offers requests."""

Report = Callable[[str], None]


def spread(names: Sequence[str], count: int) -> list[str]:
    """So many of the names, evenly apart."""
    return [names[i * len(names) // count] for i in range(count)]


def draw(names: Sequence[str], count: int, seed: int) -> list[str]:
    """Uniform popularity."""
    rng = random.Random(seed)
    return [rng.choice(names) for _ in range(count)]


@dataclass
class Crowd:
    """Servers by how many adapters are registered; requests a second by the size of the working set (0: all)."""

    pages: int
    rates: dict[int, dict[int, Samples]] = field(default_factory=dict)

    def first(self, working: int) -> int:
        """The smallest crowd that was asked for such a working set."""
        return min(count for count, rates in self.rates.items() if working in rates)

    def ratio(self, count: int, working: int) -> float:
        """The rate over that of the smallest crowd with the same working set; all is held against what fits."""
        own = self.rates[count]
        if not working:
            return own[0].median / own[self.pages].median
        return own[working].median / self.rates[self.first(working)][working].median

    def to_json(self) -> dict[str, object]:
        return {
            str(count): {
                "all" if not working else f"{working} of them": {
                    "requests_per_second": samples.to_json(),
                    "ratio": self.ratio(count, working),
                }
                for working, samples in rates.items()
            }
            for count, rates in self.rates.items()
        }

    def show(self) -> str:
        working = sorted({size for rates in self.rates.values() for size in rates if size})
        head = ["registered", *(f"requests to {size} of them, requests/s" for size in working), "to all, uniformly"]
        return table(
            head, [[f"{count:,}", *(self._cell(count, size) for size in (*working, 0))] for count in self.rates]
        )

    def _cell(self, count: int, working: int) -> str:
        if working not in self.rates[count]:
            return "-"
        return f"{self.rates[count][working].show(digits=0)}; {self.ratio(count, working):.2f}"


def measure_crowd(
    counts: Sequence[int], pages: int, rounds: int, requests: int, base: Path, folder: Path, tell: Report
) -> Crowd:
    """One server for each count, all up at once, asked in turns by a closed loop of 16 clients."""
    load = Load(SHAPES["tiny"]["vocab_size"], prompt_tokens=16, new_tokens=16)
    crowd = Crowd(pages)
    with ExitStack() as stack:
        servers = {}
        for count in counts:
            tell(f"registering {count:,} adapters")
            names = [f"a{i:04d}" for i in range(count)]
            write_adapters("tiny", folder / str(count), dict.fromkeys(names, RANK))
            options = ("--adapters", folder / str(count), "--adapter-pages", pages, "--no-adapter-probe")
            servers[count] = names, stack.enter_context(weft_server(base, *options, threads=1))
        for turn in range(rounds + 1):
            for count, (names, address) in servers.items():
                for working in dict.fromkeys((min(counts), pages, 0)):
                    if working > count or (working == 0 and count <= pages):
                        continue
                    tell(f"{count:,} registered, asking for {working or 'all'} of them")
                    chosen = spread(names, working) if working else names
                    rate = asyncio.run(_rate(address, load, chosen, requests, turn, warm=working > 0))
                    if turn:
                        crowd.rates.setdefault(count, {}).setdefault(working, Samples()).values.append(rate)
    return crowd


async def _rate(address: str, load: Load, names: Sequence[str], requests: int, seed: int, *, warm: bool) -> float:
    """Requests a second. warm: ask for each once before, so that what was measured last has left the pages."""
    async with Client(address, load) as client:
        if warm:
            await closed_loop(client.ask, names, clients=16)
        return requests / await closed_loop(client.ask, draw(names, requests, seed), clients=16)


@dataclass
class Edge:
    """Times to the first token with as many adapters as slots, and one more; seconds, by loop and count."""

    slots: int
    ttft: dict[str, dict[int, list[Samples]]] = field(default_factory=dict)

    def pooled(self, loop: str, count: int) -> Samples:
        return Samples([value for samples in self.ttft[loop][count] for value in samples.values])

    def ratio(self, loop: str, percent: float) -> float:
        over, within = (self.pooled(loop, count).percentile(percent) for count in (self.slots + 1, self.slots))
        return over / within

    def to_json(self) -> dict[str, object]:
        return {
            loop: {
                **{str(count): [each.to_json() for each in samples] for count, samples in by_count.items()},
                "median_ratio": self.ratio(loop, 50),
                "p99_ratio": self.ratio(loop, 99),
            }
            for loop, by_count in self.ttft.items()
        }

    def rows(self) -> list[list[str]]:
        return [
            [
                str(self.slots),
                loop,
                *(self._cell(loop, percent) for percent in (50, 99)),
            ]
            for loop in self.ttft
        ]

    def _cell(self, loop: str, percent: float) -> str:
        within, over = (self.pooled(loop, count).percentile(percent) for count in (self.slots, self.slots + 1))
        return f"{within * 1e3:.1f} → {over * 1e3:.1f}; {over / within:.2f}x"


def show_edges(edges: Sequence[Edge]) -> str:
    head = ["slots", "load", "median TTFT, ms: N = slots → slots + 1", "p99 TTFT, ms"]
    return table(head, [row for edge in edges for row in edge.rows()])


def measure_edge(slots: int, rounds: int, requests: int, base: Path, folder: Path, tell: Report) -> Edge:
    """One server with `slots` pages, asked for N of its adapters at uniform popularity, in turns."""
    names = [f"a{i:04d}" for i in range(slots + 1)]
    write_adapters("tiny", folder / f"edge{slots}", dict.fromkeys(names, RANK))
    load = Load(SHAPES["tiny"]["vocab_size"], prompt_tokens=16, new_tokens=16)
    options = ("--adapters", folder / f"edge{slots}", "--adapter-pages", slots, "--no-adapter-probe")
    edge = Edge(slots)
    with weft_server(base, *options, threads=1) as address:
        rate = asyncio.run(_edge(address, load, names[:slots], slots, requests, 0, None))[1]
        for turn in range(1, rounds + 1):
            for count in (slots, slots + 1):
                for loop, offered in (("closed loop", None), ("open loop", rate * BUSY)):
                    tell(f"{count} adapters on {slots} slots, {loop}")
                    seen, _ = asyncio.run(_edge(address, load, names[:count], slots, requests, turn, offered))
                    samples = Samples([each.ttft_s for each in seen])
                    edge.ttft.setdefault(f"{loop}", {}).setdefault(count, []).append(samples)
    return edge


async def _edge(
    address: str, load: Load, names: Sequence[str], clients: int, requests: int, seed: int, rate: float | None
) -> tuple[list[Seen], float]:
    """What was seen, and requests a second. rate: of an open loop; None: a closed one."""
    seen: list[Seen] = []
    async with Client(address, load) as client:

        async def work(adapter: str, number: int) -> None:
            seen.append(await client.stream(adapter, number))

        await closed_loop(client.ask, names, clients)
        adapters = draw(names, requests, seed)
        if rate is None:
            return seen, requests / await closed_loop(work, adapters, clients)
        await open_loop(work, adapters, rate)
        return seen, rate


MODES = {"none": "no other requests", "hot": "requests to one adapter in pages", "cold": "requests that load from disk"}


@dataclass
class Delay:
    """Between tokens of a batch that runs beside nothing, beside requests that load nothing or that load; seconds."""

    gaps: dict[str, list[Samples]] = field(default_factory=dict)
    ttft: dict[str, list[Samples]] = field(default_factory=dict)
    file_bytes: int = 0

    def pooled(self, mode: str) -> Samples:
        return Samples([value for samples in self.gaps[mode] for value in samples.values])

    def ratio(self, percent: float) -> float:
        """With cold loads over the same requests without."""
        return self.pooled("cold").percentile(percent) / self.pooled("hot").percentile(percent)

    def to_json(self) -> dict[str, object]:
        return {
            "file_bytes_of_each_load": self.file_bytes,
            "inter_token_seconds": {mode: [each.to_json() for each in samples] for mode, samples in self.gaps.items()},
            "others_ttft_seconds": {mode: [each.to_json() for each in samples] for mode, samples in self.ttft.items()},
            "median_ratio": self.ratio(50),
            "p99_ratio": self.ratio(99),
        }

    def show(self) -> str:
        rows = []
        for mode, words in MODES.items():
            gaps = self.pooled(mode)
            first = Samples([value for samples in self.ttft.get(mode, []) for value in samples.values])
            rows.append(
                [
                    words,
                    *(f"{gaps.percentile(percent) * 1e3:.0f}" for percent in (50, 99, 100)),
                    f"{first.median * 1e3:.0f}" if first.values else "-",
                ]
            )
        head = ["beside", "median between tokens, ms", "p99", "largest", "the others' own median TTFT, ms"]
        return table(head, rows)


def measure_delay(shape: str, rounds: int, tokens: int, base: Path, folder: Path, tell: Report) -> Delay:
    """A batch of 8 decodes while, every 250 ms, a request of one token comes for an adapter of rank 32."""
    cold = [f"cold{i}" for i in range(8)]
    write_adapters(shape, folder / "delay", {"running": 8, "hot": 32, **dict.fromkeys(cold, 32)})
    options = ("--adapters", folder / "delay", "--no-adapter-probe", "--adapter-host-bytes", 0)
    # Pages for those that run, the hot one, and two of the cold: each comes from disk, over and over.
    options = (*options, "--adapter-pages", 1 + 4 * 3)
    delay = Delay(file_bytes=(folder / "delay" / "hot" / "adapter_model.safetensors").stat().st_size)
    # One core computes and the others load: threads that wait for one another would measure the machine.
    with weft_server(base, *options, threads=1) as address:
        for turn in range(rounds + 1):
            for mode, others in (("none", []), ("hot", ["hot"]), ("cold", cold)):
                tell(f"a running batch beside {MODES[mode]}")
                gaps, ttft = asyncio.run(_delay(address, SHAPES[shape]["vocab_size"], tokens if turn else 2, others))
                if turn:
                    delay.gaps.setdefault(mode, []).append(gaps)
                    if ttft.values:
                        delay.ttft.setdefault(mode, []).append(ttft)
    return delay


async def _delay(address: str, vocab_size: int, tokens: int, others: Sequence[str]) -> tuple[Samples, Samples]:
    async with (
        Client(address, Load(vocab_size, prompt_tokens=8, new_tokens=tokens)) as running,
        Client(address, Load(vocab_size, prompt_tokens=1, new_tokens=1)) as asking,
    ):
        for adapter in others[:1]:
            await asking.ask(adapter)
        batch = [asyncio.create_task(running.stream("running", seed)) for seed in range(8)]
        asked: list[asyncio.Task[Seen]] = []
        while others and not all(task.done() for task in batch):
            asked.append(asyncio.create_task(asking.stream(others[len(asked) % len(others)])))
            await asyncio.sleep(0.25)
        seen = await asyncio.gather(*batch)
        firsts = await asyncio.gather(*asked)
    begun = max(each.came_s[0] for each in seen)  # all prompts are computed
    ended = min(each.came_s[-1] for each in seen)
    gaps = [length for each in seen for came, length in each.gaps if begun < came <= ended]
    return Samples(gaps), Samples([each.ttft_s for each in firsts])
