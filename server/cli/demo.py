"""`weft demo`: the real server on loopback, one mixed batch through the real client, the answers checked.

Beside the generators, one adapter tells kinds of texts apart, and one is asked how likely given answers are.

What it shows of the server comes from the server's own ports: answers and ranks over gRPC, steps from the metrics.
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import click
import grpc
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table
from rich.text import Text

from weft.demo import kinds, tasks
from weft.server.cli.client import failures_in_words
from weft.server.cli.output import wide_console
from weft.server.config import EngineConfig, ModelConfig, ServerConfig
from weft.v1 import adapter_pb2, adapter_pb2_grpc, inference_pb2_grpc
from weft.v1 import inference_pb2 as pb2

MIN_ADAPTERS = 8
SCORED = "sentiment"
MAX_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt for one adapter ("" is the base), and the answer that a program knows to be right."""

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
class Verdict:
    """What an adapter makes of given answers: how likely each is."""

    question: Question
    probabilities: Mapping[str, float]

    @property
    def best(self) -> str:
        return max(self.probabilities, key=lambda answer: self.probabilities[answer])

    @property
    def is_right(self) -> bool:
        return self.best == self.question.expected


@dataclass(frozen=True, slots=True)
class Batching:
    """What the metrics say of the engine's steps."""

    num_steps: int
    max_requests: int
    max_adapters: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that a run of the demo brought. base: the base's own answer to the first question.

    kind: by a classifier's head; score: by the probabilities of given answers.
    """

    startup_line: str
    ranks: Mapping[str, Sequence[int]]
    replies: Sequence[Reply]
    base: Reply
    kind: Verdict
    score: Verdict
    batching: Batching

    @property
    def num_right(self) -> int:
        return sum(reply.is_right for reply in self.replies)

    @property
    def is_good(self) -> bool:
        answers: list[Reply | Verdict] = [*self.replies, self.kind, self.score]
        return all(answer.is_right for answer in answers) and self.batching.max_adapters > 1


@click.command()
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the examples.")
@click.option(
    "--per-task", type=click.IntRange(1, 50), default=1, show_default=True, help="Examples of each task, all at once."
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Where base/ and adapters/ are.  [default: the demo's own]",
)
def demo(seed: int, per_task: int, folder: Path | None) -> int:
    """Serve the demo's base and adapters, send one mixed batch, show and check the answers."""
    place = folder or Path(tasks.__file__).parent
    questions = choose_questions(place, seed, per_task)
    config = ServerConfig(
        model=ModelConfig(str(place / "base")),
        engine=EngineConfig(threads=1),  # so small a model gains nothing from more
        adapters=place / "adapters",
        port=0,
        metrics_port=0,
    )
    logging.getLogger("weft").setLevel(logging.WARNING)
    console = wide_console()
    with console.status("loading the base and its adapters"), failures_in_words():
        outcome = asyncio.run(_run(config, questions, seed))
    _show(outcome, console)
    return 0 if outcome.is_good else 1


def choose_questions(place: Path, seed: int, num_each: int) -> list[Question]:
    """Held-out examples of every task that has an adapter. Raises click.ClickException where there is no demo."""
    names = [name for name in tasks.TASKS if (place / "adapters" / name).is_dir()]
    others = [place / "base", *(place / "adapters" / name for name in (kinds.ADAPTER, SCORED))]
    if not all(map(Path.is_dir, others)) or len(names) < MIN_ADAPTERS:
        raise click.ClickException(
            f"{place} holds no base, {MIN_ADAPTERS} adapters and a classifier: make them with "
            "`python -m weft.demo.train`, and the classifier as weft.demo.kinds says"
        )
    return [
        Question(name, tasks.prompt(example.text), example.answer)
        for name in names
        for example in tasks.TASKS[name].examples(tasks.HELD_OUT, num_each, seed)
    ]


async def _run(config: ServerConfig, questions: Sequence[Question], seed: int) -> Outcome:
    # Bring torch and transformers, which no other command should wait for.
    from weft.server import app  # noqa: PLC0415
    from weft.server.cli.quiet import quiet_transformers  # noqa: PLC0415

    quiet_transformers()
    async with app.running_server(config) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            inference = cast(
                "inference_pb2_grpc.InferenceServiceAsyncStub", inference_pb2_grpc.InferenceServiceStub(channel)
            )
            adapters = cast("adapter_pb2_grpc.AdapterServiceAsyncStub", adapter_pb2_grpc.AdapterServiceStub(channel))
            replies, kind, score = await asyncio.gather(
                asyncio.gather(*(_ask(inference, question) for question in questions)),
                _classify(inference, seed),
                _score(inference, seed),
            )
            base = await _ask(inference, replace(questions[0], adapter=""))
            listed = await adapters.ListAdapters(adapter_pb2.ListAdaptersRequest())
        return Outcome(
            startup_line=server.startup_line,
            ranks={adapter.name: adapter.ranks for adapter in listed.adapters},
            replies=replies,
            base=base,
            kind=kind,
            score=score,
            batching=await asyncio.to_thread(_batching, server.metrics_address),
        )


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


async def _classify(stub: inference_pb2_grpc.InferenceServiceAsyncStub, seed: int) -> Verdict:
    example = kinds.examples(tasks.HELD_OUT, 1, seed)[0]
    response = await stub.Classify(pb2.ClassifyRequest(adapter_id=kinds.ADAPTER, text=example.text))
    question = Question(kinds.ADAPTER, example.text, example.answer)
    return Verdict(question, {each.label: each.score for each in response.scores})


async def _score(stub: inference_pb2_grpc.InferenceServiceAsyncStub, seed: int) -> Verdict:
    example = tasks.TASKS[SCORED].examples(tasks.HELD_OUT, 1, seed)[0]
    question = Question(SCORED, tasks.prompt(example.text), example.answer)
    answers = ("positive", "negative")
    response = await stub.Score(pb2.ScoreRequest(adapter_id=SCORED, text=question.prompt, continuations=answers))
    return Verdict(
        question, {each: math.exp(score.logprob) for each, score in zip(answers, response.scores, strict=True)}
    )


def _batching(metrics_address: str) -> Batching:
    metrics = _scrape(metrics_address)
    return Batching(
        num_steps=int(metrics["weft_step_seconds_count"]),
        max_requests=int(metrics["weft_step_requests_max"]),
        max_adapters=int(metrics["weft_step_adapters_max"]),
    )


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


def _show(outcome: Outcome, console: Console) -> None:
    base, batching = outcome.base, outcome.batching
    console.print(Text(outcome.startup_line))
    console.print(_table(outcome))
    kind, score = outcome.kind, outcome.score
    console.print(
        Text(f"{kind.question.adapter}, by a head of its own, classifies {kind.question.prompt!r}: {_told(kind)}")
    )
    console.print(Text(f"{score.question.adapter} scores two answers to {score.question.prompt!r}: {_told(score)}"))
    console.print(
        Text(f"The base alone, asked {base.question.prompt!r}, answers {base.text!r}, not {base.question.expected!r}.")
        if not base.is_right
        else Text(f"The base alone answers {base.question.prompt!r} rightly too.")
    )
    console.print(
        Text(
            f"{outcome.num_right} of {len(outcome.replies)} answers are right. By its own metrics, the server ran "
            f"{batching.num_steps} steps; one step held up to {batching.max_requests} requests of "
            f"{batching.max_adapters} different adapters."
        )
    )


def _told(verdict: Verdict) -> str:
    """How likely the likeliest answers are, and whether the first is right."""
    likely = sorted(verdict.probabilities.items(), key=lambda each: -each[1])[:3]
    shown = ", ".join(f"{answer} {probability:.1%}" for answer, probability in likely)
    return f"{shown} ✓" if verdict.is_right else f"{shown} ✗ (it is {verdict.question.expected})"


def _table(outcome: Outcome) -> Table:
    table = Table(box=None)
    table.add_column("adapter")
    table.add_column("rank", justify="right")
    for name in ("prompt", "answer", "expected", ""):
        table.add_column(name, overflow="fold")
    table.add_column("TTFT ms", justify="right")
    for reply in outcome.replies:
        question = reply.question
        table.add_row(
            question.adapter,
            ", ".join(map(str, outcome.ranks[question.adapter])),
            Text(question.prompt),
            Text(reply.text),
            Text(question.expected),
            Text("✓", "green") if reply.is_right else Text("✗", "red"),
            f"{1000 * reply.ttft_s:.0f}",
        )
    return table
