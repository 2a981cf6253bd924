"""`weft classify`: texts to a sequence classifier on a running server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from weft.server.cli.adapter_tables import print_json
from weft.server.cli.client import Endpoint, connected, server_options
from weft.server.cli.output import wide_console
from weft.server.cli.texts import text_options, texts_of
from weft.v1 import inference_pb2 as pb2
from weft.v1 import inference_pb2_grpc

_LIKELY = 0.5


@click.command()
@click.argument("text")
@click.option("--adapter", default="", metavar="ID", help="A sequence classifier; without it the base's own.")
@server_options
@text_options
@click.option("--json", "as_json", is_flag=True, help="Print what the server says, a line a text.")
def classify(text: str, adapter: str, server: Endpoint, timeout: float | None, as_json: bool, **options: Any) -> None:
    """Label TEXT (`-`: each line of standard input, in a line each)."""
    with connected(server) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for each in texts_of(text):
            request = pb2.ClassifyRequest(adapter_id=adapter, text=each, **options)
            response = stub.Classify(request, timeout=timeout)
            if as_json:
                print_json(response, indent=None)
            elif text == "-":
                click.echo(f"{', '.join(_told(response))}\t{each}")
            else:
                _print_scores(response)


def _told(response: pb2.ClassifyResponse) -> Iterator[str]:
    """Of a single label the likeliest, of several all that are likely, of a regression each number."""
    scores = sorted(response.scores, key=lambda scored: -scored.score)
    if response.problem_type == pb2.PROBLEM_TYPE_SINGLE_LABEL:
        scores = scores[:1]
    elif response.problem_type == pb2.PROBLEM_TYPE_MULTI_LABEL:
        scores = [scored for scored in scores if scored.score > _LIKELY]
    for scored in scores:
        yield f"{scored.label} {scored.score:.4g}"


def _print_scores(response: pb2.ClassifyResponse) -> None:
    table = Table("label", "score", "logit", box=None)
    for scored in response.scores:
        table.add_row(Text(scored.label), f"{scored.score:.4f}", f"{scored.logit:.3f}")
    wide_console().print(table)
    if response.truncated_tokens:
        click.echo(f"{response.truncated_tokens} tokens at the end were left out", err=True)
