"""What the sampler takes of a step, by how the rows are sampled and how many there are.

    python benchmarks/sampling.py          # prints the tables and writes docs/performance.md
    python benchmarks/sampling.py --quick  # fewer rows and rounds; prints the tables only

A step is the forward pass of that many decodes, each with 64 tokens of context, and the sampler on the logits that come
out; each way of sampling is timed after it in every round, in processor seconds of one thread, so that other work on
the machine matters less. The model is a random one of the SmolLM-135M shape: its distributions are far flatter than a
trained model's, which is the slow case for top-p; "peaked" is at temperature 0.3.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence as Seq
from pathlib import Path

import click
import torch
import transformers
from report import Samples, machine, table, write_section
from rich.progress import Progress
from shapes import SHAPES, make_base

import weft
from weft.kernels.native import find_native
from weft.server.config import ModelConfig
from weft.server.engine.batch import build_batch
from weft.server.engine.kv_blocks import BlockPool
from weft.server.engine.kv_cache import KvCache
from weft.server.engine.model import PagedModel, load_model
from weft.server.engine.request import Request, Sampling
from weft.server.engine.sampler import sample
from weft.server.engine.scheduler import Scheduled
from weft.server.engine.sequence import Sequence
from weft.server.engine.text import OutputText

ROOT = Path(weft.__file__).parents[2]
CONTEXT, BLOCK = 64, 16
LARGE_VOCAB = 151_936

WAYS: dict[str, tuple[Sampling, int | None]] = {
    "greedy": (Sampling(), None),
    "temperature": (Sampling(temperature=1.0), None),
    "top-k 50": (Sampling(temperature=1.0, top_k=50), None),
    "top-p 0.9": (Sampling(temperature=1.0, top_p=0.9), None),
    "top-p 0.9, peaked": (Sampling(temperature=0.3, top_p=0.9), None),
    "min-p 0.05": (Sampling(temperature=1.0, min_p=0.05), None),
    "typical-p 0.9": (Sampling(temperature=1.0, typical_p=0.9), None),
    "three penalties, greedy": (
        Sampling(repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1),
        None,
    ),
    "greedy, 5 log-probabilities": (Sampling(), 5),
    "top-k 50, top-p 0.9, penalties": (
        Sampling(temperature=0.8, top_k=50, top_p=0.9, repetition_penalty=1.1, presence_penalty=0.1),
        None,
    ),
}


def make_sequences(way: str, count: int, vocab: int) -> list[Sequence]:
    """Sequences that wait for their first token."""
    sampling, top = WAYS[way]
    rng = random.Random(0)
    made = []
    for index in range(count):
        prompt = tuple(rng.randrange(vocab) for _ in range(CONTEXT))
        request = Request(f"r{index}", prompt, sampling=sampling, logprobs=top is not None, top_logprobs=top or 0)
        made.append(Sequence(request, (), OutputText(lambda ids: ""), random.Random(index), 0.0))
    return made


class Decoder:
    """A model that decodes one token of many sequences over and over."""

    def __init__(self, folder: Path, most: int) -> None:
        self.model: PagedModel = load_model(ModelConfig(str(folder), "float32", "cpu"), find_native(1))
        self.pool = BlockPool(most * CONTEXT // BLOCK + 1, BLOCK)
        cache = KvCache(self.model.kv_shapes, self.pool.num_blocks, BLOCK, self.model.dtype, self.model.device)
        self.model.attach(cache, {}, "torch")

    def step(self, sequences: Seq[Sequence]) -> tuple[torch.Tensor, float]:
        """The logits of one decode each, and how long they took."""
        for sequence in sequences:
            sequence.blocks = self.pool.allocate(CONTEXT // BLOCK)
            sequence.num_computed = CONTEXT - 1
        started = time.process_time()
        batch = build_batch([Scheduled(sequence, 1) for sequence in sequences], BLOCK, self.model.device)
        logits = self.model.forward(batch).logits
        elapsed = time.process_time() - started
        for sequence in sequences:
            self.pool.free(sequence.blocks)
        return logits, elapsed


def time_sample(logits: torch.Tensor, sequences: Seq[Sequence]) -> float:
    """A call as the engine makes it, with what it keeps of the sequences there already."""
    sample(logits, sequences, frozenset([0]))
    started = time.process_time()
    sample(logits, sequences, frozenset([0]))
    return time.process_time() - started


def measure(decoder: Decoder, counts: Seq[int], rounds: int, progress: Progress) -> list[list[str]]:
    """For each way of sampling and number of rows: milliseconds, and the share of the step."""
    vocab = decoder.model.vocab_size
    shares: dict[tuple[str, int], Samples] = {(way, count): Samples() for way in WAYS for count in counts}
    taken: dict[tuple[str, int], Samples] = {(way, count): Samples() for way in WAYS for count in counts}
    work = progress.add_task("sampling", total=rounds * len(counts) * len(WAYS))
    for _ in range(rounds):
        for count in counts:
            logits, forward_s = decoder.step(make_sequences("greedy", count, vocab))
            for way in WAYS:
                sequences = make_sequences(way, count, vocab)
                sample_s = time_sample(logits, sequences)
                taken[way, count].values.append(sample_s)
                shares[way, count].values.append(sample_s / (forward_s + sample_s))
                progress.advance(work)
    return [
        [way, *(f"{shares[way, n].show(100)} %; {taken[way, n].median * 1e3:.2f} ms" for n in counts)] for way in WAYS
    ]


def measure_large(counts: Seq[int], rounds: int) -> list[list[str]]:
    """The sampler alone, on logits of a large vocabulary; milliseconds a row."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for way in WAYS:
        taken = []
        for count in counts:
            logits = torch.randn(count, LARGE_VOCAB, generator=generator) * 3
            sequences = make_sequences(way, count, LARGE_VOCAB)
            samples = Samples([time_sample(logits, sequences) / count for _ in range(rounds)])
            taken.append(samples.show(1e3, 2))
        rows.append([way, *taken])
    return rows


def show_count(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"


@click.command(help=__doc__)
@click.option("--quick", is_flag=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--shape", default="135m", type=click.Choice(list(SHAPES)), show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "docs" / "performance.md", show_default=False)
def main(quick: bool, rounds: int, shape: str, output: Path) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    counts = (1, 16) if quick else (1, 16, 64, 256)
    rounds = 2 if quick else rounds
    with tempfile.TemporaryDirectory() as scratch, Progress() as progress:
        make_base(shape, Path(scratch) / "base")
        decoder = Decoder(Path(scratch) / "base", max(counts))
        decoder.step(make_sequences("greedy", 16, decoder.model.vocab_size))
        shares = measure(decoder, counts, rounds, progress)
        large = measure_large(counts[:2], rounds)
    report = (
        "The sampler's share of a decode step, and its own time:\n\n"
        f"{table(['sampled by', *map(show_count, counts)], shares)}\n\n"
        f"The sampler alone on a vocabulary of {LARGE_VOCAB:,}, ms a row:\n\n"
        f"{table(['sampled by', *map(show_count, counts[:2])], large)}\n\n"
        f"Machine: {machine()}; {rounds} rounds.\n"
    )
    click.echo(report)
    if not quick and shape == "135m":
        write_section(output, "sampling", report)


if __name__ == "__main__":
    main()
