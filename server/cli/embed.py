"""`weft embed`: texts to vectors, on a running server."""

from __future__ import annotations

import json
from typing import Any

import click

from weft.server.cli.client import Endpoint, connected, server_options
from weft.server.cli.texts import text_options, texts_of
from weft.v1 import inference_pb2 as pb2
from weft.v1 import inference_pb2_grpc

_POOLINGS = ("last", "mean", "cls")


@click.command()
@click.argument("text")
@click.option("--adapter", default="", metavar="ID", help="NAME or NAME@sha256:…; without it the base's own vector.")
@server_options
@text_options
@click.option("--pooling", type=click.Choice(_POOLINGS), help="Of the last hidden states. Default: the server's.")
@click.option("--raw", is_flag=True, help="Do not bring the vector to length 1.")
def embed(
    text: str, adapter: str, server: Endpoint, timeout: float | None, pooling: str | None, raw: bool, **options: Any
) -> None:
    """Print the vector of TEXT as JSON (`-`: of each line of standard input, in a line each)."""
    wanted = f"POOLING_{pooling.upper()}" if pooling else None
    with connected(server) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for each in texts_of(text):
            request = pb2.EmbedRequest(adapter_id=adapter, text=each, pooling=wanted, normalize=not raw, **options)
            click.echo(json.dumps([*stub.Embed(request, timeout=timeout).values]))
