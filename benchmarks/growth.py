"""How a decode step grows with its rows, the adapters in it, their rank, and the context.

    python benchmarks/growth.py          # prints the tables and writes docs/performance.md
    python benchmarks/growth.py --quick  # a tiny model; prints the tables only

The engine alone, in one process, on a model of the SmolLM-135M shape; all measured steps of a table take turns. Wall
time of a whole step: schedule, build, forward, sample, commit.
"""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import transformers
from floor import Rates, Sizes, measure_rates, step_s
from prometheus_client import CollectorRegistry
from report import Samples, machine, table, write_section
from rich.progress import Progress
from shapes import SHAPES, make_base, module_shapes, write_adapters

import weft
from weft.adapters.records import NewAdapter
from weft.server.config import EngineConfig, ModelConfig, ServerConfig
from weft.server.engine.load import LoadedEngine, load_engine
from weft.server.engine.request import Request, Stopping
from weft.server.metrics import Metrics

ROOT = Path(weft.__file__).parents[2]
RANKS = (8, 16, 32, 64)
MOST_ROWS, MOST_CONTEXT = 64, 1024
CONTEXT = 64
STEPS = 6
"""Measured ones of a turn."""


class Steps:
    """An engine with adapters `r{rank}-{n}`, sixteen of each rank, and steps of chosen rows on it."""

    def __init__(self, folder: Path, shape: str, most_context: int) -> None:
        make_base(shape, folder / "base")
        write_adapters(shape, folder / "adapters", {f"r{rank}-{n}": rank for rank in RANKS for n in range(16)})
        config = ServerConfig(
            ModelConfig(str(folder / "base"), dtype="float32", device="cpu"),
            EngineConfig(
                max_batch_tokens=8192,
                max_running_requests=MOST_ROWS,
                kv_tokens=16 * (most_context + 128) + MOST_ROWS * 128,
                adapter_pages=16 * sum(RANKS) // 8,
                target_step_ms=0,
                speculative_tokens=0,
                adapter_probe=False,
                prefix_cache=False,
            ),
            source_roots=(folder / "adapters",),
        )
        self.loaded: LoadedEngine = load_engine(config, Metrics(CollectorRegistry()))
        self._count = itertools.count()
        self._vocabulary = SHAPES[shape]["vocab_size"]
        for name in sorted(path.name for path in (folder / "adapters").iterdir()):
            self.loaded.store.create(NewAdapter(name, f"file:{folder / 'adapters' / name}"))

    def run(self, adapters: Sequence[str], context: int, seconds: Samples) -> None:
        """Prefill one request a name ("" is the base), then measure some steps of their decodes."""
        engine, rng = self.loaded.engine, random.Random(0)
        for name in adapters:
            chosen = ((name, 1.0),) if name else ()
            prompt = tuple(rng.randrange(self._vocabulary) for _ in range(context))
            stopping = Stopping(max_tokens=STEPS + 4, ignore_eos=True)
            request = Request(f"{next(self._count)}", prompt, adapters=chosen, stopping=stopping)
            engine.add(request, self.loaded.store.acquire_all(chosen))
        first: set[str] = set()
        while len(first) < len(adapters):
            first |= {request.request_id for request, _ in engine.step()}
        for _ in range(STEPS):
            started = time.perf_counter()
            engine.step()
            seconds.values.append(time.perf_counter() - started)
        while engine.has_work:
            engine.step()


def names(rows: int, distinct: int, rank: int) -> list[str]:
    return [f"r{rank}-{i % distinct}" if distinct else "" for i in range(rows)]


class Table:
    """Cells of one kind of step, measured in turns."""

    def __init__(self, steps: Steps, cells: Mapping[tuple[str, ...], tuple[list[str], int]]) -> None:
        """cells: what the adapters of the rows and their context are, by the words of the cell."""
        self._steps = steps
        self._cells = cells
        self.samples = {words: Samples() for words in cells}

    def turn(self) -> None:
        for words, (adapters, context) in self._cells.items():
            self._steps.run(adapters, context, self.samples[words])

    def ms(self, *words: str) -> str:
        return self.samples[words].show(1e3)

    def over(self, words: tuple[str, ...], other: tuple[str, ...]) -> str:
        return f"{self.samples[words].median / self.samples[other].median:.2f}"


def show_rows(found: Table, rows: Sequence[int], rates: Rates, sizes: Sizes) -> str:
    lines = []
    for count in rows:
        floor = step_s(rates, sizes, count, count, [], [])
        base, mixed = (str(count), "none"), (str(count), "distinct")
        least = step_s(rates, sizes, count, count, [16] * count, [16] * min(count, 16)) / floor
        one = found.over((str(count), "one"), base)
        lines.append([str(count), found.ms(*base), f"{floor * 1e3:.1f}", one, found.over(mixed, base), f"{least:.2f}"])
    head = [
        "rows",
        "no adapter, ms",
        "its floor, ms",
        "one adapter, over none",
        "up to 16 distinct, over none",
        "floor",
    ]
    return table(head, lines)


@click.command(help=__doc__)
@click.option("--quick", is_flag=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "docs" / "performance.md", show_default=False)
def main(quick: bool, rounds: int, output: Path) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    shape, rows = ("tiny", (1, 4)) if quick else ("135m", (1, 4, 16, 64))
    contexts = (64, 128) if quick else (64, 512, MOST_CONTEXT)
    kinds = {"none": 0, "one": 1, "distinct": 16}
    with tempfile.TemporaryDirectory() as scratch, Progress() as progress:
        work = progress.add_task("making the model and 64 adapters", total=None)
        steps = Steps(Path(scratch), shape, contexts[-1])
        rates = measure_rates()
        by_rows = {(str(n), kind): (names(n, count, 16), CONTEXT) for n in rows for kind, count in kinds.items()}
        by_rank = {(f"rank {rank}", str(n)): (names(16, n, rank), CONTEXT) for rank in RANKS for n in (1, 4, 16)}
        by_context = {(str(length),): ([""] * rows[-2], length) for length in contexts}
        tables = [
            Table(steps, cells) for cells in (by_rows, by_rank | {("none", "0"): ([""] * 16, CONTEXT)}, by_context)
        ]
        progress.update(work, description="steps", total=rounds * len(tables))
        for _ in range(rounds):
            for each in tables:
                each.turn()
                progress.advance(work)
        rates = rates.best(measure_rates())
    of_rows, of_rank, of_context = tables
    modules = list(module_shapes(shape).values())
    sizes = Sizes.of(modules, SHAPES[shape]["hidden_size"], SHAPES[shape]["vocab_size"])
    served = steps.loaded.info.startup_line.partition(";")[0]
    ranked = [
        [f"rank {rank}", *(of_rank.over((f"rank {rank}", str(n)), ("none", "0")) for n in (1, 4, 16))] for rank in RANKS
    ]
    report = "\n\n".join(
        [
            show_rows(of_rows, rows, rates, sizes),
            "A step of 16 rows over the same without adapters:\n\n"
            + table(["", "1 adapter", "4 adapters", "16 adapters"], ranked),
            f"A step of {rows[-2]} rows without adapters, by context:\n\n"
            + table(["tokens of context", "ms"], [[length, of_context.ms(length)] for (length,) in by_context]),
            f"Machine: {machine()}; {served}; {rounds} rounds of {STEPS} steps.",
        ]
    )
    click.echo(report)
    if not quick:
        write_section(output, "growth", report + "\n")


if __name__ == "__main__":
    main()
