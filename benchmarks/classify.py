"""What many classifiers in one batch cost: inputs a second with 32 adapters that bring their own heads, and with one.

    python benchmarks/classify.py              # prints the table and writes docs/performance.md
    python benchmarks/classify.py --shape tiny # a quick try of the script itself

The same inputs go to one server in several ways, which take turns. "One at a time" sends each adapter's inputs together
and waits for all of them, as a server must that batches by adapter.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import grpc
import torch
from loaded import weft_server
from report import Samples, machine, table, write_section
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from shapes import SHAPES, make_base, write_adapters

import weft
from weft.v1 import inference_pb2, inference_pb2_grpc

ROOT = Path(weft.__file__).parents[2]
NUM_ADAPTERS, RANK = 32, 8
NUM_INPUTS, INPUT_TOKENS, UNDER_WAY = 128, 32, 32
BASE = "no adapter, a vector"
ONE, MIXED, IN_TURN = "1 classifier", f"{NUM_ADAPTERS} classifiers, mixed", f"{NUM_ADAPTERS}, one at a time"

Groups = list[list[tuple[int, str]]]
"""Inputs, by number, each with its adapter; a group is sent when the one before is answered."""


def write_classifiers(shape: str, folder: Path) -> list[str]:
    """Adapters with heads of 2, 3, 4, … labels. Returns their names."""
    names = [f"c{index:02d}" for index in range(NUM_ADAPTERS)]
    write_adapters(shape, folder, dict.fromkeys(names, RANK))
    for num_labels, name in enumerate(names, 2):
        config = json.loads((folder / name / "adapter_config.json").read_text())
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
        head = torch.randn(
            num_labels, SHAPES[shape]["hidden_size"], generator=torch.Generator().manual_seed(num_labels)
        )
        weights = folder / name / "adapter_model.safetensors"
        save_file({**load_file(weights), "base_model.model.score.weight": head * 0.02}, weights)
        labels = {str(label): f"label {label}" for label in range(num_labels)}
        (folder / name / "config.json").write_text(json.dumps({"id2label": labels}))
    return names


def ways(names: Sequence[str]) -> dict[str, Groups]:
    """The same inputs, by way."""
    mixed = [(index, names[index % len(names)]) for index in range(NUM_INPUTS)]
    return {
        BASE: [[(index, "") for index in range(NUM_INPUTS)]],
        ONE: [[(index, names[0]) for index in range(NUM_INPUTS)]],
        MIXED: [mixed],
        IN_TURN: [[(index, name) for index, name in mixed if name == wanted] for wanted in names],
    }


@dataclass
class Measured:
    """One way's rounds: inputs a second, and what came back in each."""

    rates: Samples = field(default_factory=Samples)
    answers: list[dict[int, list[float]]] = field(default_factory=list)


async def send(address: str, groups: Groups, inputs: Sequence[Sequence[int]]) -> dict[int, list[float]]:
    """The numbers that came back for each input."""
    places = asyncio.Semaphore(UNDER_WAY)
    answers: dict[int, list[float]] = {}
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def ask(index: int, adapter: str) -> None:
            ids = inference_pb2.TokenIds(ids=inputs[index])
            async with places:
                if adapter:
                    request = inference_pb2.ClassifyRequest(adapter_id=adapter, token_ids=ids)
                    answers[index] = [scored.logit for scored in (await stub.Classify(request)).scores]
                else:
                    embedded = await stub.Embed(inference_pb2.EmbedRequest(token_ids=ids))
                    answers[index] = list(embedded.values)

        for group in groups:
            await asyncio.gather(*(ask(index, adapter) for index, adapter in group))
    return answers


def show(measured: dict[str, Measured]) -> str:
    base, one = measured[BASE].rates.median, measured[ONE].rates.median
    return table(
        ["who is asked", "inputs a second", "over one classifier", "over no adapter"],
        (
            [name, way.rates.show(), f"{way.rates.median / one:.2f}", f"{way.rates.median / base:.2f}"]
            for name, way in measured.items()
        ),
    )


@click.command(help=__doc__)
@click.option("--shape", type=click.Choice(list(SHAPES)), default="135m", show_default=True)
@click.option("--rounds", default=3, show_default=True, help="How often each way takes its turn.")
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "docs" / "performance.md", show_default=False)
def main(shape: str, rounds: int, output: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch, Progress() as progress:
        folder = Path(scratch)
        work = progress.add_task("making the model")
        make_base(shape, folder / "base")
        sent = ways(write_classifiers(shape, folder / "adapters"))
        progress.update(work, total=(1 + rounds) * len(sent))
        measured = {name: Measured() for name in sent}
        options = ("--adapters", folder / "adapters", "--adapter-pages", 2 * NUM_ADAPTERS, "--no-prefix-cache")
        with weft_server(folder / "base", *options) as address:
            for number in range(1 + rounds):
                rng = random.Random(number)
                vocab_size = SHAPES[shape]["vocab_size"]
                inputs = [[rng.randrange(1, vocab_size) for _ in range(INPUT_TOKENS)] for _ in range(NUM_INPUTS)]
                for name, groups in sent.items():
                    progress.update(work, description=f"round {number}: {name}" if number else "warming up")
                    started = time.perf_counter()
                    answers = asyncio.run(send(address, groups, inputs))
                    if number:
                        measured[name].rates.values.append(NUM_INPUTS / (time.perf_counter() - started))
                        measured[name].answers.append(answers)
                    progress.advance(work)
    pairs = zip(measured[MIXED].answers, measured[IN_TURN].answers, strict=True)
    same = sum(mixed[index] == alone[index] for mixed, alone in pairs for index in mixed)
    report = (
        f"{show(measured)}\n\n"
        f"{same} of {rounds * NUM_INPUTS} classifications have the same logits to the bit mixed and one classifier "
        "at a time.\n\n"
        f"Machine: {machine()}; {rounds} rounds.\n"
    )
    click.echo(report)
    if shape == "135m":
        write_section(output, "classify", report)


if __name__ == "__main__":
    main()
