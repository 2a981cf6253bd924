"""Where the commands write their tables."""

from __future__ import annotations

from rich.console import Console

_WIDTH_OF_FILES = 400
"""Columns where the output is no terminal: wide enough that nothing is cut."""


def wide_console() -> Console:
    """Standard output, as wide as the terminal, or as wide as it takes."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=_WIDTH_OF_FILES)
