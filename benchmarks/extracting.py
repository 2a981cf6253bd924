"""The memory that `weft extract` takes, and its time, against the size of the model.

    python benchmarks/extracting.py          # prints the table and writes docs/performance.md
    python benchmarks/extracting.py --quick  # smaller models; prints the table only

Random float32 models of the SmolLM-135M shape with more and more layers, in shards of 200 MB, and fine-tunes in which
all linear weights of the layers changed. Each is extracted at rank 16 by a process of its own. Its peak is of resident
memory, mapped files included, less what it held when everything was imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch
import transformers
from report import machine, table, write_section
from rich.progress import track
from shapes import SHAPES
from transformers import LlamaConfig, LlamaForCausalLM

import weft
from weft.making.extraction import Extractor
from weft.making.low_rank import Wanted

ROOT = Path(weft.__file__).parents[2]
RANK = 16
SHARD = "200MB"
EXTRACT_HERE = "--extract-here"


def make_models(shape: str, num_layers: int, folder: Path) -> None:
    """`base` and `tuned`."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**SHAPES[shape], "num_hidden_layers": num_layers}, tie_word_embeddings=True)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base", max_shard_size=SHARD)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter.add_(torch.randn_like(parameter) * 1e-3)
    model.save_pretrained(folder / "tuned", max_shard_size=SHARD)


def resident_bytes(what: str) -> int:
    """Of this process: VmRSS, or VmHWM at its highest."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[what].split()[0]) * 1024


def extract_here(folder: Path) -> None:
    """Prints what it took, as JSON."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
    own, started_s = resident_bytes("VmRSS"), time.perf_counter()
    extractor = Extractor(str(folder / "base"), str(folder / "tuned"), lambda names, _: names)
    extractor.write(Wanted(rank=RANK), keep=False, dtype=torch.float32, folder=folder)
    taken_s = time.perf_counter() - started_s
    click.echo(json.dumps({"bytes": resident_bytes("VmHWM") - own, "seconds": taken_s}))


def measure(shape: str, num_layers: int) -> list[str]:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_models(shape, num_layers, folder)
        sizes = {path: path.stat().st_size for path in folder.rglob("*.safetensors")}
        model_bytes = sum(size for path, size in sizes.items() if path.parent.name == "base")
        command = [sys.executable, __file__, EXTRACT_HERE, str(folder)]
        took = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        adapter_bytes = (folder / "adapter_model.safetensors").stat().st_size
    mb = [f"{num_bytes / 1e6:.0f} MB" for num_bytes in (model_bytes, adapter_bytes, took["bytes"])]
    return [str(num_layers), *mb, f"{took['bytes'] / 2 / model_bytes:.2f}", f"{took['seconds']:.1f}"]


@click.command(help=__doc__)
@click.option("--quick", is_flag=True)
@click.option(EXTRACT_HERE, "here", type=click.Path(path_type=Path), hidden=True)
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "docs" / "performance.md", show_default=False)
def main(quick: bool, here: Path | None, output: Path) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if here is not None:
        extract_here(here)
        return
    shape, counts = ("demo", (2, 8)) if quick else ("135m", (10, 30, 90))
    rows = [measure(shape, count) for count in track(counts, "extracting", transient=True)]
    head = ["layers", "the model", "the adapter", "peak of `weft extract`", "over both models in memory", "seconds"]
    report = f"{table(head, rows)}\n\nMachine: {machine()}.\n"
    click.echo(report)
    if not quick:
        write_section(output, "extracting", report)


if __name__ == "__main__":
    main()
