"""`weft score`: which of several continuations a prompt makes likely, on a running server."""

from __future__ import annotations

import math
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from weft.server.cli.adapter_tables import print_json
from weft.server.cli.client import Endpoint, connected, server_options
from weft.server.cli.output import wide_console
from weft.server.cli.texts import request_options, texts_of
from weft.v1 import inference_pb2 as pb2
from weft.v1 import inference_pb2_grpc


@click.command()
@click.argument("prompt")
@click.argument("continuations", nargs=-1, required=True)
@click.option("--adapter", default="", metavar="ID", help="NAME or NAME@sha256:…; without it the base scores.")
@server_options
@request_options
@click.option("--json", "as_json", is_flag=True, help="Print what the server says, in the order given.")
def score(
    prompt: str,
    continuations: tuple[str, ...],
    adapter: str,
    server: Endpoint,
    timeout: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Rank CONTINUATIONS of PROMPT, the likeliest first (`-`: the lines of standard input)."""
    texts = [text for given in continuations for text in texts_of(given)]
    if not texts:
        raise click.UsageError("standard input holds no continuations: give one a line")
    request = pb2.ScoreRequest(adapter_id=adapter, text=prompt, continuations=texts, **options)
    with connected(server) as channel:
        response = inference_pb2_grpc.InferenceServiceStub(channel).Score(request, timeout=timeout)
    if as_json:
        print_json(response, indent=None)
    else:
        _print_ranks(texts, [scored.logprob for scored in response.scores])


def _print_ranks(texts: list[str], logprobs: list[float]) -> None:
    """share: of the probability of all of them together."""
    best = max(logprobs)
    total = sum(math.exp(logprob - best) for logprob in logprobs)
    table = Table("continuation", "share", "logprob", box=None)
    for text, logprob in sorted(zip(texts, logprobs, strict=True), key=lambda pair: -pair[1]):
        table.add_row(Text(text), f"{math.exp(logprob - best) / total:.4f}", f"{logprob:.3f}")
    wide_console().print(table)
