"""`weft generate`: one prompt to a running server."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from weft.server.cli.client import Endpoint, connected, server_options
from weft.v1 import inference_pb2 as pb2
from weft.v1 import inference_pb2_grpc

MAX_TIMEOUT_S = 7 * 86400

_SAMPLING: Mapping[str, tuple[Any, str]] = {
    "temperature": (float, "0 is greedy."),
    "top_k": (int, "Draw from the k likeliest tokens."),
    "top_p": (float, "Draw from the likeliest tokens that make up this share."),
    "min_p": (float, "Draw from tokens at least this times as likely as the likeliest."),
    "typical_p": (float, "Draw from the most typical tokens that make up this share."),
    "repetition_penalty": (float, "Above 1 makes tokens that are there already less likely."),
    "presence_penalty": (float, "Off the logit of each token that the answer holds."),
    "frequency_penalty": (float, "The same, for each time that it holds it."),
    "seed": (int, "Draws the same tokens again."),
}
_STOPPING: Mapping[str, tuple[Any, str]] = {
    "max_tokens": (int, "The longest answer."),
    "min_tokens": (int, "The shortest answer."),
}
_REQUEST: Mapping[str, tuple[Any, str]] = {
    "n": (int, "So many answers, each by a seed of its own; needs a temperature."),
    "priority": (int, "Higher goes first."),
    "cache_salt": (str, "Share what is computed for prompts that begin alike only where this is the same."),
}


def _with_fields(fields: Mapping[str, tuple[Any, str]]) -> Callable[[Any], Callable[..., Any]]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name, (kind, text) in reversed(list(fields.items())):
            function = click.option(f"--{name.replace('_', '-')}", name, type=kind, help=text)(function)
        return function

    return decorate


def check_timeout(_context: click.Context, _option: click.Parameter, timeout_s: float | None) -> float | None:
    """Of `--timeout`. Raises UsageError."""
    if timeout_s is not None and not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise click.UsageError(f"--timeout is {timeout_s:g}; must be above 0 and at most {MAX_TIMEOUT_S}")
    return timeout_s


@click.command()
@click.argument("prompt")
@click.option("--adapter", default="", metavar="ID", help="NAME or NAME@sha256:…; without it the base answers.")
@server_options
@click.option("--stream", is_flag=True, help="Print the answer as it comes.")
@click.option("--chat", is_flag=True, help="Send the prompt as a user's message.")
@_with_fields(_SAMPLING)
@_with_fields(_STOPPING)
@_with_fields(_REQUEST)
@click.option("--stop", multiple=True, metavar="TEXT", help="Ends the answer; may be given several times.")
@click.option("--json-schema", metavar="TEXT|FILE", help="The answer is JSON that this schema holds for.")
@click.option("--regex", metavar="PATTERN", help="The answer matches this regular expression.")
@click.option("--grammar", metavar="TEXT|FILE", help="The answer follows this grammar, in Lark's notation.")
@click.option("--choice", multiple=True, metavar="TEXT", help="The answer is this; give it for each that it may be.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the model's own end.")
@click.option("--timeout", type=float, callback=check_timeout, metavar="SECONDS", help="Give up after that.")
def generate(prompt: str, server: Endpoint, stream: bool, timeout: float | None, **options: Any) -> None:
    """Answer PROMPT (`-` reads it from standard input)."""
    if stream and (options["n"] or 1) > 1:
        raise click.UsageError("--stream shows one answer as it comes; --n asks for several")
    text = sys.stdin.read() if prompt == "-" else prompt
    request = _request(text, options)
    with connected(server) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        if stream:
            twin = pb2.StreamGenerateRequest()
            twin.ParseFromString(request.SerializeToString())
            for message in stub.StreamGenerate(twin, timeout=timeout):
                click.echo(message.text, nl=False)
            click.echo()
        else:
            _show(stub.Generate(request, timeout=timeout))


def _show(response: pb2.GenerateResponse) -> None:
    """The answer; of several, each under a line that numbers it."""
    answers: list[pb2.GenerateResponse | pb2.Alternative] = [response, *response.alternatives]
    for number, answer in enumerate(answers, 1):
        if len(answers) > 1:
            click.echo(f"--- {number} of {len(answers)}")
        click.echo(answer.text)


def _constraint(options: dict[str, Any]) -> dict[str, Any]:
    """The field of the one constraint that was given, if one was."""
    texts = {name: options[name] for name in ("json_schema", "regex", "grammar") if options[name] is not None}
    fields = {name: text if name == "regex" else _text_or_file(name, text) for name, text in texts.items()}
    if options["choice"]:
        fields["choice"] = pb2.Choice(options=options["choice"])
    if len(fields) > 1:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in fields)
        raise click.UsageError(f"{names} are given; an answer can be held to one of them")
    return fields


def _text_or_file(field: str, given: str) -> str:
    try:
        if not Path(given).is_file():
            return _text(field, given)
    except OSError:  # too long for a name
        return _text(field, given)
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{given} can't be read: {error}") from None


def _text(field: str, given: str) -> str:
    """A schema or a grammar; what can be none, as the name of a file that is not there, is told here."""
    can_be = ":" in given if field == "grammar" else "{" in given or given.strip() in ("true", "false")
    if not can_be:
        kind = "grammar" if field == "grammar" else "JSON schema"
        raise click.UsageError(f"--{field.replace('_', '-')} is {given!r}, which is no file and no {kind}")
    return given


def _request(text: str, options: dict[str, Any]) -> pb2.GenerateRequest:
    """The request; ranges are the server's to check, and what is not given is not set."""
    prompt: dict[str, Any] = {"text": text}
    if options["chat"]:
        prompt = {"chat": pb2.ChatPrompt(messages=[pb2.ChatMessage(role="user", content=text)])}
    constraint = _constraint(options)
    try:
        sampling = pb2.Sampling(**{name: options[name] for name in _SAMPLING})
        stopping = pb2.Stopping(
            **{name: options[name] for name in _STOPPING},
            stop_sequences=options["stop"],
            ignore_eos=options["ignore_eos"],
        )
        return pb2.GenerateRequest(
            adapter_id=options["adapter"],
            sampling=sampling,
            stopping=stopping,
            **{name: options[name] for name in _REQUEST},
            **constraint,
            **prompt,
        )
    except UnicodeError:
        raise
    except ValueError as error:
        raise click.UsageError(f"a number is too large or too small to be sent ({error})") from None
