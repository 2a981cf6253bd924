"""`weft compress`: adapters at a lower rank, within a number of bytes, or several made one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from weft.server.cli.making import Share, cut_options, dtype_option, needing_extra, read_dtype
from weft.server.cli.output import wide_console

if TYPE_CHECKING:
    from weft.making.compression import Compression, Source

THINNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Ways that drop some of the numbers."""

WAYS = ("cat", "linear", "svd", *THINNING, *(f"{way}_svd" for way in THINNING))
"""peft's `combination_type`."""


class _Weights(click.ParamType[tuple[float, ...]]):
    """Numbers with commas between."""

    name = "number,…"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            numbers = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(map(math.isfinite, numbers)):
            self.fail(f"is {value!r}; must be numbers with commas between, such as 0.7,0.3", param, ctx)
        return numbers


@click.command()
@click.argument("adapters", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="ADAPTER…")
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="The new PEFT folder; of several, one that has all.",
)
@cut_options
@click.option(
    "--bytes", "budget", type=click.IntRange(1), help="Of all adapters' tensors together, spent where it keeps most."
)
@dtype_option(None)
@click.option("--report-int8", is_flag=True, help="Show what `weft serve --adapter-dtype int8` would add to the error.")
@click.option("--combine", "way", type=click.Choice(WAYS), help="Make the adapters one first, as peft does.")
@click.option("--weights", type=_Weights(), help="Of the adapters in --combine.  [default: 1 each]")
@click.option("--density", type=Share(), help="The share of numbers that ties, dare and magnitude_prune keep.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of dare's choice.")
def compress(
    adapters: tuple[Path, ...],
    output: Path,
    rank: int | None,
    energy: float | None,
    budget: int | None,
    dtype: str | None,
    report_int8: bool,
    way: str | None,
    weights: tuple[float, ...] | None,
    density: float | None,
    seed: int,
) -> None:
    """Cut adapters down to a lower rank, each module by its singular values; or make several one."""
    _check_cut((rank, energy, budget), is_needed=way is None)
    _check_combination(adapters, way, weights, density)
    # Bring torch, which no other command should wait for.
    from weft.making.compression import choose_ranks, write_compressed  # noqa: PLC0415
    from weft.making.destination import complete_folder  # noqa: PLC0415
    from weft.making.low_rank import Wanted  # noqa: PLC0415
    from weft.making.peft_folder import read_folder  # noqa: PLC0415

    sources: list[Source] = [partial(read_folder, path) for path in adapters]
    if way is not None:
        sources = [_combined(sources, way, weights, density, rank, seed)]
    wanted = Wanted(rank, 1.0 if rank is None and energy is None else energy) if budget is None else None
    saved_as = None if dtype is None else read_dtype(dtype)
    done = []
    with complete_folder(output) as folder:
        ranks = choose_ranks(sources, wanted, budget, saved_as)
        for path, source, each in zip(adapters, sources, ranks, strict=False):
            place = folder / _name(path) if len(sources) > 1 else folder
            place.mkdir(exist_ok=True)
            done.append(write_compressed(source(), each, saved_as, place))
    for report in done:
        _show(report, report_int8=report_int8)


def _check_cut(cuts: Sequence[float | None], *, is_needed: bool) -> None:
    num_given = sum(cut is not None for cut in cuts)
    if num_given > 1 or (is_needed and not num_given):
        raise click.UsageError("give one of --rank, --energy and --bytes")


def _check_combination(
    adapters: Sequence[Path], way: str | None, weights: Sequence[float] | None, density: float | None
) -> None:
    twice = [name for name, count in Counter(map(_name, adapters)).items() if count > 1]
    if way is None:
        if weights is not None or density is not None:
            raise click.UsageError("--weights and --density go with --combine")
        if twice:
            raise click.UsageError(f"two adapters are called {', '.join(twice)}: compress them one by one")
        return
    if len(adapters) < 2:
        raise click.UsageError("--combine takes two adapters or more")
    if weights is not None and len(weights) != len(adapters):
        raise click.UsageError(f"--weights has {len(weights)} numbers for {len(adapters)} adapters")
    if way.startswith(THINNING) != (density is not None):
        raise click.UsageError(f"--combine {way} takes {'a' if density is None else 'no'} --density")


def _name(path: Path) -> str:
    return path.resolve().name


def _combined(
    sources: Sequence[Source],
    way: str,
    weights: Sequence[float] | None,
    density: float | None,
    rank: int | None,
    seed: int,
) -> Source:
    needing_extra()
    from weft.making.combining import Combination, combine  # noqa: PLC0415

    how = Combination(way, weights or [1.0] * len(sources), density, rank if way.endswith("svd") else None, seed)
    combined = combine([source() for source in sources], how)
    return lambda: combined


def _show(report: Compression, *, report_int8: bool) -> None:
    console = wide_console()
    table = Table("module", "rank before", "rank", "relative error", box=None)
    if report_int8:
        table.add_column("and in int8")
    for module in report.modules:
        errors = [f"{module.error:.2e}", *([f"{module.int8_error:.2e}"] if report_int8 else [])]
        table.add_row(Text(module.name), str(module.rank_before), str(module.rank), *errors)
    console.print(table)
    size = f"{report.bytes_before:,} bytes before, {report.num_bytes:,} now"
    console.print(Text(f"{report.source}: {size}; relative error of all modules together: {report.error:.2e}"))
