"""The command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

import weft.server.cli.environment  # noqa: F401 - before gRPC
from weft.errors import InvalidConfig, WeftError
from weft.server.cli.adapters import adapters
from weft.server.cli.bench import bench
from weft.server.cli.classify import classify
from weft.server.cli.compress import compress
from weft.server.cli.demo import demo
from weft.server.cli.embed import embed
from weft.server.cli.extract import extract
from weft.server.cli.generate import generate
from weft.server.cli.health import health
from weft.server.cli.keys import keys
from weft.server.cli.score import score
from weft.server.cli.serve import serve
from weft.server.cli.sync import sync
from weft.server.cli.top import top
from weft.server.cli.train import train

INTERRUPTED = 130
"""The exit code that shells give to what Ctrl-C ended."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="weft")
def cli() -> None:
    """One frozen base model, many LoRA adapters, one batch."""


for command in (
    serve,
    generate,
    classify,
    embed,
    score,
    adapters,
    train,
    extract,
    compress,
    train,
    sync,
    health,
    keys,
    top,
    bench,
    demo,
):
    cli.add_command(command)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

    An error is one line on stderr.
    """
    try:
        result = cli.main(args, prog_name="weft", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.Abort:
        return INTERRUPTED
    except OSError as error:
        _drop_output()
        return _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 1)
    except (click.ClickException, WeftError, UnicodeError, MemoryError, OverflowError) as error:
        return _fail(*_in_words(error))
    return result if isinstance(result, int) else 0


def _in_words(error: Exception) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    match error:
        case click.ClickException():
            return error.format_message(), error.exit_code
        case UnicodeEncodeError() if error.encoding != "utf-8":
            return f"the output is {error.encoding}, which can't hold all of the text: set PYTHONUTF8=1", 1
        case UnicodeError():
            return f"a text is not UTF-8 ({error})", 2
        case MemoryError() | OverflowError():
            return f"there is not enough memory ({str(error) or type(error).__name__}): ask for less", 1
        case _:
            return str(error), 2 if isinstance(error, InvalidConfig) else 1


def _drop_output() -> None:
    """Where standard output can't be written, drop what it still holds: the interpreter would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, exit_code: int) -> int:
    click.echo(f"weft: {' '.join(message.split())}", err=True)
    return exit_code
