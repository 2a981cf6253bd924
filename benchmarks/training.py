"""A step of training and the memory it takes: LoRA against full fine-tuning of the same model, by the same Trainer.

    python benchmarks/training.py          # minutes; prints the table, writes docs/performance.md and the samples
    python benchmarks/training.py --quick  # a small model alone; prints the table only

Each training is a process of its own, whose peak resident memory is read at its end; they take turns.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from report import Samples, machine, table, write_section
from rich.progress import Progress
from shapes import make_base
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from weft.making.config import MethodConfig
from weft.making.methods import adapted

ROOT = Path(__file__).parents[1]
FULL = "full fine-tuning"
METHODS = {FULL: None, "LoRA": MethodConfig(), "DoRA": MethodConfig(name="dora"), "head": MethodConfig(name="head")}
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Case:
    """What is trained on. name: of a shape, or the demo's base."""

    name: str
    batch_size: int
    num_tokens: int
    num_steps: int
    rounds: int


CASES = (Case("135m", 4, 128, 5, 2), Case("demo base", 32, 64, 20, 2))
QUICK = (Case("demo base", 8, 32, 6, 1),)


class Clock(TrainerCallback):
    """Seconds of each step, the first one left out."""

    def __init__(self) -> None:
        self.step_s: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step_s.append(time.perf_counter() - self._began)


def train_once(method: str, case: Case, model: Path, scratch: Path) -> dict[str, Any]:
    """In this process, which should do nothing else."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings = METHODS[method]
    trained = base if settings is None else adapted(base, settings, "generate", ())
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ids = torch.randint(3, 200, (case.num_steps * case.batch_size, case.num_tokens))
    clock = Clock()
    arguments = TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=case.batch_size,
        max_steps=case.num_steps,
        learning_rate=1e-4,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    examples = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(trained, arguments, train_dataset=examples, callbacks=[clock]).train()
    return {
        "step_s": clock.step_s[1:],
        "loaded_bytes": loaded * 1024,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "trained_parameters": sum(each.numel() for each in trained.parameters() if each.requires_grad),
    }


@dataclass
class Measured:
    """A method on a case, over all rounds."""

    step_s: Samples = field(default_factory=Samples)
    peak_bytes: Samples = field(default_factory=Samples)
    loaded_bytes: Samples = field(default_factory=Samples)
    ratio: Samples = field(default_factory=Samples)
    trained_parameters: int = 0

    def take(self, found: dict[str, Any]) -> float:
        """Returns the median step."""
        steps = Samples(found["step_s"])
        self.step_s.values += steps.values
        self.peak_bytes.values.append(found["peak_bytes"])
        self.loaded_bytes.values.append(found["loaded_bytes"])
        self.trained_parameters = found["trained_parameters"]
        return steps.median

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name).to_json() for name in ("step_s", "peak_bytes", "loaded_bytes", "ratio")} | {
            "trained_parameters": self.trained_parameters
        }


def measure(case: Case, index: int, quick: bool, folder: Path, progress: Progress) -> dict[str, Measured]:
    """Every method, in turn, each round in another order; steps are compared within a round."""
    model = ROOT / "examples" / "demo" / "base"
    if case.name != "demo base":
        model = folder / case.name
        make_base(case.name, model)
    measured = {method: Measured() for method in METHODS}
    work = progress.add_task(case.name, total=case.rounds * len(METHODS))
    for turn in range(case.rounds):
        order = list(METHODS)[turn % len(METHODS) :] + list(METHODS)[: turn % len(METHODS)]
        medians = {}
        for method in order:
            command = [sys.executable, __file__, "--one", method, "--case", str(index), "--model", str(model)]
            ran = subprocess.run(command + ["--quick"] * quick, check=True, capture_output=True, text=True)
            medians[method] = measured[method].take(json.loads(ran.stdout.splitlines()[-1]))
            progress.advance(work)
        for method, median in medians.items():
            measured[method].ratio.values.append(median / medians[FULL])
    return measured


def show(case: Case, measured: dict[str, Measured]) -> str:
    full = measured[FULL]
    rows = [
        (
            method,
            f"{found.trained_parameters:,}",
            found.step_s.show(1e3, 0),
            found.ratio.show(digits=2),
            f"{found.peak_bytes.median / GIB:.2f}",
            f"{(found.peak_bytes.median - found.loaded_bytes.median) / GIB:.2f}",
            f"{found.peak_bytes.median / full.peak_bytes.median:.2f}",
        )
        for method, found in measured.items()
    ]
    head = ("method", "trained", "step, ms", "of full's", "peak, GiB", "over the loaded model", "of full's peak")
    title = f"### {case.name}: {case.batch_size} rows of {case.num_tokens} tokens a step"
    return f"{title}\n\n{table(head, rows)}\n"


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="Less of everything; writes nothing but --samples.")
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "docs" / "performance.md")
@click.option("--samples", type=click.Path(path_type=Path), help="A file for every sample, as JSON.")
@click.option("--one", type=click.Choice(list(METHODS)), hidden=True)
@click.option("--case", "index", type=int, default=0, hidden=True)
@click.option("--model", type=click.Path(path_type=Path), hidden=True)
def main(quick: bool, output: Path, samples: Path | None, one: str | None, index: int, model: Path | None) -> None:
    cases = QUICK if quick else CASES
    with tempfile.TemporaryDirectory() as scratch:
        if one is not None and model is not None:
            click.echo(json.dumps(train_once(one, cases[index], model, Path(scratch))))
            return
        with Progress() as progress:
            found = [measure(case, place, quick, Path(scratch), progress) for place, case in enumerate(cases)]
    parts = [show(case, measured) for case, measured in zip(cases, found, strict=True)]
    parts.append(f"Median (lowest to highest) of all steps but each process's first. Machine: {machine()}.\n")
    report = "\n".join(parts)
    click.echo(report)
    if not quick:
        write_section(output, "training", report)
        samples = samples or ROOT / "benchmarks" / "results" / "training.json"
    if samples is not None:
        data = {
            case.name: {name: each.to_json() for name, each in measured.items()}
            for case, measured in zip(cases, found, strict=True)
        }
        samples.write_text(json.dumps({"machine": machine(), **data}, indent=1) + "\n")


if __name__ == "__main__":
    main()
