"""What `weft train`, `weft extract` and `weft compress` have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

    from weft.making.low_rank import Wanted

_EXTRA = ("peft", "accelerate", "datasets", "matplotlib")
"""The packages of `weft[train]`."""

DTYPES = ("float32", "bfloat16", "float16")


class Number(click.FloatRange):
    """A finite one; nan is within every range by click's comparisons."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class Share(Number):
    """From more than 0 to 1."""

    def __init__(self) -> None:
        super().__init__(0, 1, min_open=True)


def cut_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--rank` and `--energy`."""
    energy = click.option("--energy", type=Share(), help="Keep this share of each module's energy.")
    return click.option("--rank", type=click.IntRange(1), help="Give each module this rank.")(energy(command))


def dtype_option(default: str | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--dtype`; None: the adapter's own."""
    shown = True if default else "the adapter's own"
    return click.option(
        "--dtype", type=click.Choice(DTYPES), default=default, show_default=shown, help="Of what is saved."
    )


def read_wanted(rank: int | None, energy: float | None) -> Wanted:
    """Raises click.UsageError unless one of the two is given."""
    from weft.making.low_rank import Wanted  # noqa: PLC0415 - brings torch

    if (rank is None) == (energy is None):
        raise click.UsageError("give one of --rank and --energy")
    return Wanted(rank, energy)


def read_dtype(name: str) -> torch.dtype:
    """A type by its name."""
    import torch  # noqa: PLC0415

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def needing_extra() -> None:
    """Raises click.ClickException where the extra `train` is not installed."""
    for name in _EXTRA:
        if find_spec(name) is None:
            raise click.ClickException(f"this needs {name}: pip install 'weft[train]'")
