"""Adapters by the thousand: loading, throughput, first tokens and memory, each beside its plain measure in one run.

    python benchmarks/adapters.py          # minutes; prints the tables, writes docs/performance.md and the samples
    python benchmarks/adapters.py --quick  # fewer and shorter rounds; prints the tables only

Random weights throughout. Where a server is asked, it is a `weft serve` of its own and is asked over gRPC.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import transformers
from crowds import measure_crowd, measure_delay, measure_edge, show_edges
from memory import measure_memory, show_memory
from moves import measure_moves, show_moves
from report import machine, write_section
from rich.progress import Progress
from shapes import make_base

import weft

ROOT = Path(weft.__file__).parents[2]
PADDED_TO = 64


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured. shape: of the model that large adapters are for."""

    shape: str
    ranks: tuple[int, ...]
    move_rounds: int
    delay_rounds: int
    delay_tokens: int
    counts: tuple[int, ...]
    crowd_rounds: int
    crowd_requests: int
    edge_rounds: int
    edge_requests: int


FULL = Effort("135m", (8, 16, 32, 64), 5, 2, 32, (10, 100, 1000, 2000), 3, 240, 2, 240)
QUICK = Effort("135m", (8, 64), 2, 1, 16, (10, 1000), 1, 160, 1, 160)

Section = tuple[str, object]
"""Markdown, and what goes into the file of samples."""


def measure(effort: Effort, folder: Path, device: str, tell: Callable[[str], None]) -> Iterator[tuple[str, Section]]:
    """Every section with its title, as soon as it is there."""
    tell("making the models")
    large, tiny = folder / "large", folder / "tiny"
    make_base(effort.shape, large)
    make_base("tiny", tiny)
    tell("moving adapters from tier to tier")
    torch.set_num_threads(1)  # copies side by side, of one thread each
    moves = measure_moves(effort.shape, effort.ranks, effort.move_rounds, large, folder / "moves", device)
    yield "Loading", (show_moves(moves), [each.to_json() for each in moves])
    delay = measure_delay(effort.shape, effort.delay_rounds, effort.delay_tokens, large, folder / "delay", tell)
    yield "Decoding while others load", (delay.show(), delay.to_json())
    crowd = measure_crowd(effort.counts, 32, effort.crowd_rounds, effort.crowd_requests, tiny, folder / "crowd", tell)
    yield "Many registered", (crowd.show(), crowd.to_json())
    edges = [
        measure_edge(slots, effort.edge_rounds, effort.edge_requests, tiny, folder / f"edge{slots}", tell)
        for slots in (8, 32)
    ]
    yield "One adapter more than slots", (show_edges(edges), {edge.slots: edge.to_json() for edge in edges})
    memory = [measure_memory(effort.shape, ranks, PADDED_TO) for ranks in ((8, 16, 64), (1, 12, 33), (8,), (64,))]
    yield "Memory", (show_memory(memory, PADDED_TO), [each.to_json() for each in memory])


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="Less of everything; writes nothing but --samples.")
@click.option(
    "--device", default="cpu", show_default=True, help="Of the moves from tier to tier; servers run on a CPU."
)
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "docs" / "performance.md")
@click.option("--samples", type=click.Path(path_type=Path), help="A file for every sample, as JSON.")
def main(quick: bool, device: str, output: Path, samples: Path | None) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch, Progress() as progress:
        work = progress.add_task("starting", total=None)
        started = progress.get_time()
        effort = QUICK if quick else FULL
        parts: list[str] = []
        data: dict[str, object] = {"machine": machine()}
        for title, (text, found) in measure(
            effort, Path(scratch), device, lambda words: progress.update(work, description=words)
        ):
            parts.append(f"### {title}\n\n{text}\n")
            data[title] = found
            progress.stop()
            click.echo(f"{parts[-1]}\n({progress.get_time() - started:.0f} s)\n")
            progress.start()
    parts.append(f"Machine: {data['machine']}; here one thread each for the copies and for every server.\n")
    report = "\n".join(parts)
    if not quick:
        write_section(output, "adapters", report)
        samples = samples or ROOT / "benchmarks" / "results" / "adapters.json"
    if samples is not None:
        samples.parent.mkdir(parents=True, exist_ok=True)
        samples.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
