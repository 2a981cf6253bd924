"""What the prefix cache saves: time to first token, and what preempted requests compute again.

    python benchmarks/prefixes.py              # prints the tables and writes docs/performance.md
    python benchmarks/prefixes.py --shape tiny # a quick try of the script itself

Two servers that differ in --no-prefix-cache alone take turns; each round has tokens of its own, so it begins cold.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import grpc
import torch
from loaded import weft_server
from prometheus_client import CollectorRegistry
from report import Samples, machine, table, write_section
from rich.progress import Progress
from shapes import SHAPES, make_base, write_adapters

import weft
from weft.server.config import EngineConfig, ModelConfig, ServerConfig
from weft.server.engine.load import load_engine
from weft.server.engine.request import Request, Stopping
from weft.server.metrics import Metrics
from weft.v1 import inference_pb2, inference_pb2_grpc

ROOT = Path(weft.__file__).parents[2]
ADAPTER = "rank16"
TURNS, OPENING, QUESTION, ANSWER = 8, 128, 112, 16
CROWD, SYSTEM, OWN = 16, 512, 32
TIGHT, TIGHT_PROMPT, TIGHT_ANSWERS = 8, 192, (16, 32, 48, 64, 80, 96, 112, 128)


@dataclass(frozen=True, slots=True)
class Seen:
    """When the first token came, from the request on; and the tokens."""

    ttft_s: float
    ids: list[int]


async def ask(stub: inference_pb2_grpc.InferenceServiceStub, prompt: Sequence[int], new_tokens: int) -> Seen:
    request = inference_pb2.StreamGenerateRequest(
        adapter_id=ADAPTER,
        token_ids=inference_pb2.TokenIds(ids=prompt),
        stopping=inference_pb2.Stopping(max_tokens=new_tokens, ignore_eos=True),
    )
    asked_s, first_s = time.perf_counter(), None
    ids: list[int] = []
    async for message in stub.StreamGenerate(request):
        ids += [token.id for token in message.tokens]
        if ids and first_s is None:
            first_s = time.perf_counter()
    assert first_s is not None, "no token came"
    assert len(ids) == new_tokens, "tokens are missing"
    return Seen(first_s - asked_s, ids)


def draw(rng: random.Random, vocab_size: int, count: int) -> list[int]:
    return [rng.randrange(1, vocab_size) for _ in range(count)]


async def chat(stub: inference_pb2_grpc.InferenceServiceStub, vocab_size: int, seed: int) -> list[Seen]:
    """One conversation; each turn's prompt is all that came before and a new question."""
    rng = random.Random(seed)
    turns: list[Seen] = []
    prompt = draw(rng, vocab_size, OPENING)
    for _ in range(TURNS):
        prompt += draw(rng, vocab_size, QUESTION)
        turns.append(await ask(stub, prompt, ANSWER))
        prompt += turns[-1].ids
    return turns


async def crowd(stub: inference_pb2_grpc.InferenceServiceStub, vocab_size: int, seed: int) -> list[Seen]:
    """Requests that come at once and share what they begin with."""
    rng = random.Random(seed)
    system = draw(rng, vocab_size, SYSTEM)
    prompts = [system + draw(rng, vocab_size, OWN) for _ in range(CROWD)]
    return list(await asyncio.gather(*(ask(stub, prompt, 8) for prompt in prompts)))


@dataclass
class Measured:
    """One server's rounds: time to first token of each turn, and in the crowd of the median and the last request."""

    turns: list[Samples] = field(default_factory=lambda: [Samples() for _ in range(TURNS)])
    median: Samples = field(default_factory=Samples)
    last: Samples = field(default_factory=Samples)
    ids: list[list[int]] = field(default_factory=list)

    def round(self, address: str, vocab_size: int, seed: int) -> None:
        async def everything() -> tuple[list[Seen], list[Seen]]:
            async with grpc.aio.insecure_channel(address) as channel:
                stub = inference_pb2_grpc.InferenceServiceStub(channel)
                return await chat(stub, vocab_size, seed), await crowd(stub, vocab_size, seed)

        turns, together = asyncio.run(everything())
        for samples, seen in zip(self.turns, turns, strict=True):
            samples.values.append(seen.ttft_s)
        times = [seen.ttft_s for seen in together]
        self.median.values.append(statistics.median(times))
        self.last.values.append(max(times))
        self.ids += [seen.ids for seen in (*turns, *together)]


@dataclass(frozen=True, slots=True)
class Tight:
    """A run in a KV cache that holds less than all requests need."""

    name: str
    seconds: float
    preemptions: int
    prefill_tokens: int
    ids: list[list[int]]


def run_tight(name: str, base: Path, vocab_size: int, kv_tokens: int, *, prefix_cache: bool) -> Tight:
    """The engine itself, without gRPC: all requests at once, to their ends."""
    registry = CollectorRegistry()
    settings = EngineConfig(kv_tokens=kv_tokens, prefix_cache=prefix_cache, adapter_pages=1)
    loaded = load_engine(ServerConfig(ModelConfig(str(base)), settings), Metrics(registry))
    rng = random.Random(0)
    requests = [
        Request(
            request_id=str(count),
            prompt=tuple(draw(rng, vocab_size, TIGHT_PROMPT)),
            stopping=Stopping(max_tokens=count, ignore_eos=True),
        )
        for count in rng.sample(TIGHT_ANSWERS, TIGHT)
    ]
    answers: dict[Request, list[int]] = {request: [] for request in requests}
    started = time.perf_counter()
    for request in requests:
        loaded.engine.add(request, ())
    while loaded.engine.has_work:
        for request, event in loaded.engine.step():
            if isinstance(event, Exception):
                raise event
            answers[request] += [token.id for token in event.tokens]
    seconds = time.perf_counter() - started

    def count(metric: str, **labels: str) -> int:
        return int(registry.get_sample_value(metric, labels) or 0)

    prefill_tokens = count("weft_computed_tokens_total", phase="prefill")
    return Tight(name, seconds, count("weft_preemptions_total"), prefill_tokens, list(answers.values()))


def copy_seconds(shape: str, num_tokens: int) -> float:
    """To copy the keys and values of so many tokens once, in one piece, into memory that is there; best of five."""
    of = SHAPES[shape]
    numbers = 2 * of["num_hidden_layers"] * of["hidden_size"] // of["num_attention_heads"] * of["num_key_value_heads"]
    source, target = torch.ones(num_tokens * numbers), torch.zeros(num_tokens * numbers)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - started)
    return min(times)


def show_ttft(plain: Measured, cached: Measured) -> str:
    head = ["time to first token, ms", "prompt tokens", "without", "with", "with / without"]
    rows = []
    for turn, (before, after) in enumerate(zip(plain.turns, cached.turns, strict=True)):
        prompt_tokens = OPENING + QUESTION + turn * (QUESTION + ANSWER)
        rows.append((f"chat, turn {turn + 1}", prompt_tokens, before, after))
    rows.append((f"{CROWD} at once, the median", SYSTEM + OWN, plain.median, cached.median))
    rows.append((f"{CROWD} at once, the last", SYSTEM + OWN, plain.last, cached.last))
    return table(
        head,
        (
            [name, str(count), before.show(1e3, 0), after.show(1e3, 0), f"{after.median / before.median:.2f}"]
            for name, count, before, after in rows
        ),
    )


def show_tight(runs: Sequence[Tight]) -> str:
    prompt_tokens = TIGHT * TIGHT_PROMPT
    head = ["KV cache", "preemptions", "tokens computed again", "seconds", "over room for all"]
    rows = []
    for run in runs:
        again = run.prefill_tokens - prompt_tokens
        rows.append(
            [run.name, str(run.preemptions), str(again), f"{run.seconds:.1f}", f"{run.seconds / runs[0].seconds:.2f}"]
        )
    return table(head, rows)


@click.command(help=__doc__)
@click.option("--shape", type=click.Choice(list(SHAPES)), default="135m", show_default=True)
@click.option("--rounds", default=3, show_default=True, help="How often each server takes its turn.")
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "docs" / "performance.md", show_default=False)
def main(shape: str, rounds: int, output: Path) -> None:
    vocab_size = SHAPES[shape]["vocab_size"]
    plain, cached = Measured(), Measured()
    with tempfile.TemporaryDirectory() as scratch, Progress() as progress:
        folder = Path(scratch)
        work = progress.add_task("making the model", total=2 * rounds + 3)
        make_base(shape, folder / "base")
        write_adapters(shape, folder / "adapters", {ADAPTER: 16})
        options = ("--adapters", folder / "adapters", "--kv-tokens", 32768, "--context-length", 2048)
        with (
            weft_server(folder / "base", *options, "--no-prefix-cache") as without,
            weft_server(folder / "base", *options) as with_it,
        ):
            for number in range(rounds):
                for measured, address in ((plain, without), (cached, with_it)):
                    progress.update(work, description=f"round {number + 1}")
                    measured.round(address, vocab_size, number)
                    progress.advance(work)
        needed = TIGHT * TIGHT_PROMPT + sum(TIGHT_ANSWERS)
        runs = []
        for name, kv_tokens, prefix_cache in (
            ("room for all", needed, True),
            ("half of that, without a prefix cache", needed // 2, False),
            ("half of that, with one", needed // 2, True),
        ):
            progress.update(work, description=name)
            runs.append(run_tight(name, folder / "base", vocab_size, kv_tokens, prefix_cache=prefix_cache))
            progress.advance(work)
    same = sum(a == b for a, b in zip(plain.ids, cached.ids, strict=True))
    equal = sum(a == b == c for a, b, c in zip(*(run.ids for run in runs), strict=True))
    again_s = statistics.median(plain.turns[-1].values)
    again_tokens = OPENING + QUESTION + (TURNS - 1) * (QUESTION + ANSWER)
    copied_s = copy_seconds(shape, again_tokens)
    report = (
        f"{show_ttft(plain, cached)}\n\n"
        f"{same} of {len(plain.ids)} answers have the same tokens with and without.\n\n"
        f"{show_tight(runs)}\n\n"
        f"{equal} of {TIGHT} answers have the same tokens in all three. To compute {again_tokens:,} tokens again takes "
        f"{again_s * 1e3:.0f} ms (the last turn above), to copy their keys and values {copied_s * 1e3:.1f} ms each "
        "way.\n\n"
        f"Machine: {machine()}; {rounds} rounds.\n"
    )
    click.echo(report)
    if shape == "135m":
        write_section(output, "prefixes", report)


if __name__ == "__main__":
    main()
