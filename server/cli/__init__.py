"""The command line."""

from __future__ import annotations

from collections.abc import Sequence

import click

from weft.errors import InvalidConfig, WeftError
from weft.server.cli.adapters import adapters
from weft.server.cli.demo import demo
from weft.server.cli.generate import generate
from weft.server.cli.serve import serve

INTERRUPTED = 130
"""The exit code that shells give to what Ctrl-C ended."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="weft")
def cli() -> None:
    """One frozen base model, many LoRA adapters, one batch."""


for command in (serve, generate, adapters, demo):
    cli.add_command(command)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

    An error is one line on stderr.
    """
    try:
        result = cli.main(args, prog_name="weft", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except InvalidConfig as error:
        return _fail(str(error), 2)
    except WeftError as error:
        return _fail(str(error), 1)
    except click.Abort:
        return INTERRUPTED
    return result if isinstance(result, int) else 0


def _fail(message: str, exit_code: int) -> int:
    click.echo(f"weft: {' '.join(message.split())}", err=True)
    return exit_code
