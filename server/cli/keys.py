"""`weft keys`: API keys, and what the server is to know of them."""

from __future__ import annotations

import json
import re
import sys

import click

from weft.server.api.access.access_file import EVERYBODY_ELSE
from weft.server.api.access.keys import MIN_CHARACTERS, can_be_sent, digest_of, new_key

MAX_NAME_CHARACTERS = 256


@click.group()
def keys() -> None:
    """Make API keys for the access file of `weft serve --access`, which holds their hashes alone."""


@keys.command()
@click.argument("name")
def new(name: str) -> None:
    """Print a new key for the caller NAME, this once, and the lines for the access file."""
    if not 1 <= len(name) <= MAX_NAME_CHARACTERS or not name.isprintable():
        raise click.UsageError(f"NAME must have 1 to {MAX_NAME_CHARACTERS} printable characters")
    if name == EVERYBODY_ELSE:
        raise click.UsageError(
            f"NAME is {EVERYBODY_ELSE!r}, which stands for the callers of tokens and can't have a key: give a name"
        )
    key = new_key()
    table = name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)
    click.echo(f"The key of {name}, shown this once:\n\n    {key}\n\nFor the access file:\n")
    click.echo(f'    [callers.{table}]\n    key_sha256 = ["{digest_of(key)}"]')


@keys.command(name="hash")
def hash_() -> None:
    """Print the SHA-256 of the key on standard input, for `key_sha256`."""
    key = sys.stdin.read().strip()
    if not can_be_sent(key):
        raise click.UsageError("standard input holds no key: one is a single word of letters, digits and signs")
    if len(key) < MIN_CHARACTERS:
        raise click.UsageError(
            f"the key has {len(key)} characters, and could be guessed from its hash: make one of at least "
            f"{MIN_CHARACTERS} with `weft keys new`"
        )
    click.echo(digest_of(key))
