"""Constrained output: which library, and what a constraint costs a step.

    python benchmarks/constraints.py          # prints the tables and writes docs/performance.md
    python benchmarks/constraints.py --quick  # without the libraries; prints the table only

The libraries are asked for the JSON-Schema-Test-Suite and for time; those not installed are left out. The steps
are the engine's own, on a random model of the SmolLM-135M shape whose 49,152 tokens are words and parts of words; what
a constraint adds is timed by itself, in processor seconds of one thread, so that other work on the machine matters
less.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import click
import torch
import transformers
from constraint_libraries import check_suite, fetch_suite, installed, make_vocabulary, measure_speed
from prometheus_client import CollectorRegistry
from report import Samples, machine, table, write_section
from rich.progress import Progress
from shapes import SHAPES, make_base
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import weft
from weft.server.config import EngineConfig, ModelConfig, ServerConfig
from weft.server.engine.constraints import Constraint, Kind, Spec, constrain
from weft.server.engine.load import LoadedEngine, load_engine
from weft.server.engine.request import Request, Sampling, Stopping
from weft.server.metrics import Metrics

ROOT = Path(weft.__file__).parents[2]
SIZES = (49_152, 151_936)
ROWS = (1, 16, 64)
PROMPT_TOKENS, STEPS, END = 8, 24, 0

RECORDS = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 40}, "size": {"type": "integer"}},
        "required": ["name", "size"],
    },
}
CONSTRAINTS: Mapping[str, Spec] = {
    "json_schema": Spec(Kind.JSON_SCHEMA, (json.dumps(RECORDS),)),
    "regex [a-z ]*": Spec(Kind.REGEX, ("[a-z ]*",)),
    "regex, 10 to 1,200 letters": Spec(Kind.REGEX, (r"[A-Z][a-z ,]{10,1200}\.",)),
}


def save_words(folder: Path, size: int) -> None:
    """A tokenizer of the words that the libraries are measured with."""
    letters = {byte: letter for letter, byte in _bytes_of_letters()}
    words = ["".join(letters[byte] for byte in word) for word in make_vocabulary(size)[:-1]]
    vocab = {word: token for token, word in enumerate(["<eos>", *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def _bytes_of_letters() -> Iterator[tuple[str, int]]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others follow from U+0100 on."""
    itself = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in itself]
    yield from ((chr(byte), byte) for byte in itself)
    yield from ((chr(256 + place), byte) for place, byte in enumerate(others))


def step_s(loaded: LoadedEngine, rows: int) -> float:
    """Processor seconds of the median decoding step without constraints."""
    generator = torch.Generator().manual_seed(rows)
    for row in range(rows):
        prompt = tuple(torch.randint(1, loaded.info.vocab_size, (PROMPT_TOKENS,), generator=generator).tolist())
        stopping = Stopping(max_tokens=STEPS, ignore_eos=True)
        loaded.engine.add(Request(f"r{row}", prompt, (), Sampling(temperature=1.0, seed=row), stopping), ())
    times: list[float] = []
    while loaded.engine.has_work:
        start = time.process_time()
        loaded.engine.step()
        times.append(time.process_time() - start)
    return statistics.median(times[1:-1])


def added_s(constraint: Constraint, rows: int, vocab_size: int, seed: int) -> float:
    """Processor seconds that a constraint adds to the mean step: a copy of the logits, their masks, the tokens taken.

    The tokens are drawn from random logits, as a random model's are. An answer that is over makes way for a new one.
    """
    generator = torch.Generator().manual_seed(seed)
    matchers = [constraint.matcher() for _ in range(rows)]
    spent = 0.0
    for _ in range(STEPS):
        logits = torch.randn(rows, vocab_size, generator=generator)
        logits[:, END] = float("-inf")
        start = time.process_time()
        scores = logits.clone()
        constrain(scores, range(rows), matchers)
        spent += time.process_time() - start
        tokens = scores.argmax(-1).tolist()
        start = time.process_time()
        for matcher, token in zip(matchers, tokens, strict=True):
            matcher.accept(token)
        spent += time.process_time() - start
        matchers = [constraint.matcher() if matcher.is_over else matcher for matcher in matchers]
    return spent / STEPS


def measure_overhead(folder: Path, rounds: int, tell: Callable[[str], None]) -> list[list[str]]:
    """Rows of the table: what is constrained, and for each number of requests a step and what is added to it."""
    tell("making the model")
    make_base("135m", folder)
    save_words(folder, SHAPES["135m"]["vocab_size"])
    settings = EngineConfig(
        max_running_requests=64, kv_tokens=64 * 80, adapter_pages=0, threads=1, prefix_cache=False, target_step_ms=0
    )
    loaded = load_engine(ServerConfig(ModelConfig(str(folder)), settings), Metrics(CollectorRegistry()))
    compiled = {name: loaded.compiler.compile(spec) for name, spec in CONSTRAINTS.items()}
    cells: dict[str, list[str]] = {name: [] for name in ("none", *CONSTRAINTS)}
    for rows in ROWS:
        tell(f"steps with {rows} rows")
        free = Samples([step_s(loaded, rows) for _ in range(rounds)])
        cells["none"].append(free.show(1e3))
        for name, constraint in compiled.items():
            added = Samples([added_s(constraint, rows, loaded.info.vocab_size, seed) for seed in range(rounds)])
            cells[name].append(f"+{added.show(1e3, 2)}; {added.median / free.median:.1%}")
    return [[name, *row] for name, row in cells.items()]


def show_overhead(rows: list[list[str]]) -> str:
    return table(["constraint", *(f"{count} rows: a step, ms" for count in ROWS)], rows)


def show_libraries(folder: Path, tell: Callable[[str], None]) -> str:
    suite = fetch_suite(folder)
    rights, speeds = [], []
    for title in installed():
        name = title.split()[0]
        tell(f"the test suite with {name}")
        counts = check_suite(name, suite)
        columns = ("schemas compiled", "schemas refused", "valid accepted", "valid refused", "invalid accepted")
        rights.append([title, *(str(counts[column]) for column in (*columns, "files that failed"))])
        for size in SIZES:
            tell(f"{name} with {size:,} tokens")
            for constraint, speed in measure_speed(name, size).items():
                assert speed is not None, f"{name} refuses the answer to {constraint}"
                tokens = speed.tokens_s
                numbers = (f"{speed.compile_s * 1e3:,.1f}", f"{tokens.median * 1e6:,.0f}", f"{tokens.high * 1e6:,.0f}")
                speeds.append([f"{size:,}", constraint, title, *numbers])
    speeds.sort(key=lambda row: (int(row[0].replace(",", "")), row[1]))
    right = ["library", *columns, "files that failed"]
    speed = ["tokens", "constraint", "library", "compile, ms", "a token, median µs", "a token, most µs"]
    return f"{table(right, rights)}\n\n{table(speed, speeds)}"


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="Only the steps, fewer rounds; writes nothing.")
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "docs" / "performance.md")
def main(quick: bool, output: Path) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch, Progress() as progress:
        work = progress.add_task("starting", total=None)

        def tell(words: str) -> None:
            progress.update(work, description=words)

        folder = Path(scratch)
        parts = [show_overhead(measure_overhead(folder / "base", 1 if quick else 5, tell))]
        if not quick:
            parts.insert(0, show_libraries(folder, tell))
    report = "\n\n".join([*parts, f"Machine: {machine()}.\n"])
    click.echo(report)
    if not quick:
        write_section(output, "constraints", report)


if __name__ == "__main__":
    main()
