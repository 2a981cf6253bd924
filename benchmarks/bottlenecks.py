"""Decode steps with a bottleneck adapter a row, beside LoRA of as many parameters and the base alone.

    python benchmarks/bottlenecks.py       # minutes; prints a table, which docs/performance.md then has

Random weights of SmolLM-135M's shape in float32; the kinds take turns, so that none has the quiet minutes for itself.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
import transformers
from prometheus_client import CollectorRegistry
from report import Samples, machine, table, write_section
from shapes import SHAPES, make_base, module_shapes, write_adapters

from weft.adapters.bottlenecks import BottleneckConfig
from weft.adapters.records import NewAdapter
from weft.kernels.bottleneck import Reads
from weft.making.adapterhub import write_folder
from weft.server.config import EngineConfig, ModelConfig, ServerConfig
from weft.server.engine.engine import Engine
from weft.server.engine.load import LoadedEngine, load_engine
from weft.server.engine.request import Request, Stopping
from weft.server.metrics import Metrics

ROOT = Path(__file__).parents[1]
SHAPE = "135m"
ROWS = 16
KINDS = {
    "the MLP": BottleneckConfig("relu", Reads.SUM, ("mlp.down_proj",), ()),
    "both": BottleneckConfig("silu", Reads.OUTPUT, ("self_attn.o_proj", "mlp.down_proj"), ()),
}
"""Pfeiffer's and Houlsby's, by the sub-layers that they are behind."""


@dataclass
class Kind:
    """parameters: of one adapter. step_s: of decode steps."""

    parameters: int
    adapters: list[str | None]
    step_s: Samples = field(default_factory=Samples)


def write_bottlenecks(config: BottleneckConfig, rank: int, folder: Path) -> int:
    """One for each row; returns the parameters of one."""
    d = SHAPES[SHAPE]["hidden_size"]
    shapes = {"down.weight": (rank, d), "down.bias": (rank,), "up.weight": (d, rank), "up.bias": (d,)}
    names = [name for name in module_shapes(SHAPE) if config.targets(name)]
    for row in range(ROWS):
        generator = torch.Generator().manual_seed(row)
        tensors = {
            f"{name}.{part}": torch.randn(shape, generator=generator) * 0.02
            for name in names
            for part, shape in shapes.items()
        }
        write_folder(config, tensors, folder / f"b{row}")
    return len(names) * (2 * d * rank + d + rank)


def make_kinds(folder: Path) -> dict[str, Kind]:
    """Folders of every kind's adapters; they are named by them."""
    rank = SHAPES[SHAPE]["hidden_size"] // 16
    row_parameters = sum(d_in + d_out for d_in, d_out in module_shapes(SHAPE).values())
    kinds = {"the base": Kind(0, [None] * ROWS)}
    for number, (behind, config) in enumerate(KINDS.items()):
        parameters = write_bottlenecks(config, rank, folder / f"{number}")
        adapters: list[str | None] = [f"{number}/b{row}" for row in range(ROWS)]
        kinds[f"bottlenecks of {rank} behind {behind}"] = Kind(parameters, adapters)
        lora_rank = round(parameters / row_parameters)
        names = [f"{number}/l{row}" for row in range(ROWS)]
        write_adapters(SHAPE, folder, dict.fromkeys(names, lora_rank))
        kinds[f"LoRA of rank {lora_rank} on all seven modules"] = Kind(lora_rank * row_parameters, [*names])
    return kinds


def load(base: Path, folder: Path, kinds: Mapping[str, Kind]) -> LoadedEngine:
    settings = EngineConfig(max_running_requests=ROWS, kv_tokens=ROWS * 128, adapter_pages=1024, target_step_ms=0)
    config = ServerConfig(ModelConfig(str(base), device="cpu"), settings, source_roots=(folder,))
    loaded = load_engine(config, Metrics(CollectorRegistry()))
    for name in (name for kind in kinds.values() for name in kind.adapters if name):
        loaded.store.create(NewAdapter(name, f"file:{folder / name}"))
    return loaded


def run_round(loaded: LoadedEngine, kind: Kind, steps: int) -> None:
    """Decode a few tokens a row, and time the steps in which all rows run."""
    engine: Engine = loaded.engine
    for row, name in enumerate(kind.adapters):
        mix = ((name, 1.0),) if name else ()
        prompt = tuple(range(1 + row, 9 + row))
        stopping = Stopping(max_tokens=steps + 4, ignore_eos=True)
        engine.add(Request(f"r{row}", prompt, mix, stopping=stopping), loaded.store.acquire_all(mix))
    for _ in range(3):
        engine.step()
    for _ in range(steps):
        started = time.perf_counter()
        engine.step()
        kind.step_s.values.append(time.perf_counter() - started)
    while engine.has_work:
        engine.step()


@click.command(help=__doc__)
@click.option("--rounds", default=8, show_default=True)
@click.option("--steps", default=8, show_default=True, help="That are timed, a round of each kind.")
def main(rounds: int, steps: int) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_base(SHAPE, folder / "base")
        kinds = make_kinds(folder / "adapters")
        loaded = load(folder / "base", folder / "adapters", kinds)
        for _ in range(rounds):
            for kind in kinds.values():
                run_round(loaded, kind, steps)
    base = kinds["the base"].step_s.median
    head = [f"{ROWS} rows, each with its own", "parameters", "ms a step", "speed, x base"]
    rows = [
        [name, f"{kind.parameters:,}", kind.step_s.show(1e3), f"{base / kind.step_s.median:.2f}"]
        for name, kind in kinds.items()
    ]
    report = f"{table(head, rows)}\n\nMachine: {machine()}.\n"
    click.echo(report)
    write_section(ROOT / "docs" / "performance.md", "bottlenecks", report)


if __name__ == "__main__":
    main()
