"""`weft demo`: the real server on loopback, one mixed batch through the real client, the answers checked."""

from __future__ import annotations

import asyncio
import http.client
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import click
import grpc
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table
from rich.text import Text

from weft.demo import tasks
from weft.server.cli.client import failures_in_words
from weft.server.config import EngineConfig, ModelConfig, ServerConfig
from weft.v1 import inference_pb2 as pb2
from weft.v1 import inference_pb2_grpc

MIN_ADAPTERS = 8
MAX_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt for one adapter, and the answer that a program knows to be right."""

    adapter: str
    prompt: str
    expected: str


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back, and how long its first token took."""

    question: Question
    text: str
    ttft_s: float

    @property
    def is_right(self) -> bool:
        return self.text == self.question.expected


@dataclass(frozen=True, slots=True)
class Batching:
    """What the metrics say of the engine's steps."""

    num_steps: int
    max_requests: int
    max_adapters: int


@click.command()
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the examples.")
@click.option(
    "--requests", type=click.IntRange(1, 50), default=1, show_default=True, help="Examples of each task, all at once."
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Where base/ and adapters/ are.  [default: the demo's own]",
)
def demo(seed: int, requests: int, folder: Path | None) -> int:
    """Serve the demo's base and adapters, send one mixed batch, show and check the answers."""
    place = folder or Path(tasks.__file__).parent
    questions = choose_questions(place, seed, requests)
    config = ServerConfig(
        model=ModelConfig(str(place / "base")),
        engine=EngineConfig(threads=1),  # so small a model gains nothing from more
        adapters=place / "adapters",
        port=0,
        metrics_port=0,
    )
    logging.getLogger("weft").setLevel(logging.WARNING)
    console = Console()
    with console.status("loading the base and its adapters"), failures_in_words():
        startup_line, replies, batching = asyncio.run(_run(config, questions))
    console.print(Text(startup_line))
    console.print(_table(replies))
    num_right = sum(reply.is_right for reply in replies)
    console.print(
        f"{num_right} of {len(replies)} answers are right. By its metrics, the server made them in "
        f"{batching.num_steps} steps; one step held up to {batching.max_requests} requests of "
        f"{batching.max_adapters} different adapters."
    )
    return 0 if num_right == len(replies) and batching.max_adapters > 1 else 1


def choose_questions(place: Path, seed: int, num_each: int) -> list[Question]:
    """Held-out examples of every task that has an adapter. Raises click.ClickException where there is no demo."""
    names = [name for name in tasks.TASKS if (place / "adapters" / name).is_dir()]
    if not (place / "base").is_dir() or len(names) < MIN_ADAPTERS:
        raise click.ClickException(
            f"{place} holds no base and {MIN_ADAPTERS} adapters: make them with `python -m weft.demo.train`"
        )
    return [
        Question(name, tasks.prompt(example.text), example.answer)
        for name in names
        for example in tasks.TASKS[name].examples(tasks.HELD_OUT, num_each, seed)
    ]


async def _run(config: ServerConfig, questions: Sequence[Question]) -> tuple[str, list[Reply], Batching]:
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415 - as the next one

    from weft.server import app  # noqa: PLC0415 - brings torch, which no other command should wait for

    disable_progress_bar()
    async with app.running_server(config) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = cast(
                "inference_pb2_grpc.InferenceServiceAsyncStub", inference_pb2_grpc.InferenceServiceStub(channel)
            )
            replies = await asyncio.gather(*(_ask(stub, question) for question in questions))
        metrics = await asyncio.to_thread(_scrape, server.metrics_address)
        batching = Batching(
            num_steps=int(metrics["weft_step_seconds_count"]),
            max_requests=int(metrics["weft_step_requests_max"]),
            max_adapters=int(metrics["weft_step_adapters_max"]),
        )
        return server.startup_line, replies, batching


async def _ask(stub: inference_pb2_grpc.InferenceServiceAsyncStub, question: Question) -> Reply:
    request = pb2.StreamGenerateRequest(
        adapter_id=question.adapter, text=question.prompt, stopping=pb2.Stopping(max_tokens=MAX_TOKENS)
    )
    started = time.perf_counter()
    first: float | None = None
    text = ""
    async for message in stub.StreamGenerate(request):
        first = first or time.perf_counter()
        text += message.text
    return Reply(question, text, (first or time.perf_counter()) - started)


def _scrape(address: str) -> Mapping[str, float]:
    """The metrics without labels, by name."""
    connection = http.client.HTTPConnection(address)
    try:
        connection.request("GET", "/metrics")
        body = connection.getresponse().read().decode()
    finally:
        connection.close()
    families = text_string_to_metric_families(body)
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


def _table(replies: Sequence[Reply]) -> Table:
    table = Table("adapter", "prompt", "answer", "expected", "", box=None)
    table.add_column("TTFT ms", justify="right")
    for reply in replies:
        question = reply.question
        mark = Text("✓", "green") if reply.is_right else Text("✗", "red")
        texts = (question.adapter, question.prompt, reply.text, question.expected)
        table.add_row(*map(Text, texts), mark, f"{1000 * reply.ttft_s:.0f}")
    return table
