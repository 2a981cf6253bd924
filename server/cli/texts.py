"""What the commands share that send texts, one or a line each of standard input."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from weft.server.cli.generate import check_timeout

_MOST = (1 << 31) - 1


_TRUNCATE = click.option(
    "--truncate",
    is_flag=False,
    flag_value=0,
    type=click.IntRange(0, _MOST),
    metavar="[TOKENS]",
    help="Leave out the end of what is longer: than so many tokens, or than the model's context.",
)
_REQUEST = (
    click.option("--priority", type=click.IntRange(-_MOST, _MOST), help="Higher goes first."),
    click.option("--cache-salt", default="", help="Share what is computed only where this is the same."),
    click.option("--timeout", type=float, callback=check_timeout, metavar="SECONDS", help="Give up after that."),
)


def request_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds what every request may have, and `timeout`."""
    for option in reversed(_REQUEST):
        command = option(command)
    return command


def text_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds what a request has beside its text, and `timeout`."""
    return _TRUNCATE(request_options(command))


def texts_of(text: str) -> Iterator[str]:
    """The text; for `-` the lines of standard input as they come, but empty ones."""
    if text != "-":
        yield text
        return
    for line in sys.stdin:
        if stripped := line.rstrip("\r\n"):
            yield stripped
