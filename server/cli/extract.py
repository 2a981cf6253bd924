"""`weft extract`: a full fine-tune -> an adapter of its base."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from weft.server.cli.making import cut_options, dtype_option, needing_extra, read_dtype, read_wanted
from weft.server.cli.output import wide_console

if TYPE_CHECKING:
    from weft.making.divergence import Divergence
    from weft.making.extraction import Extraction


@click.command()
@click.option("--base", required=True, help="The base: a folder in Hugging Face's format, or a hub id.")
@click.option("--tuned", required=True, help="Its full fine-tune, likewise.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The new PEFT folder.")
@cut_options
@click.option(
    "--others",
    type=click.Choice(["refuse", "keep", "drop"]),
    default="refuse",
    show_default=True,
    help="Norms, biases, embeddings and heads that changed: stop, keep them whole, or leave the base's.",
)
@dtype_option("float32")
@click.option("--prompts", type=click.Path(path_type=Path), help="A text a line: measure KL(tuned || adapter) on them.")
def extract(
    base: str,
    tuned: str,
    output: Path,
    rank: int | None,
    energy: float | None,
    others: str,
    dtype: str,
    prompts: Path | None,
) -> None:
    """Turn a full fine-tune into an adapter: the difference of the weights, each module's at a low rank."""
    wanted = read_wanted(rank, energy)
    needing_extra()
    # Bring torch, transformers and peft, which no other command should wait for.
    from weft.making.destination import complete_folder  # noqa: PLC0415
    from weft.making.divergence import measure_divergence, read_prompts  # noqa: PLC0415
    from weft.making.extraction import REPORT_FILE, Extractor  # noqa: PLC0415
    from weft.server.cli.quiet import quiet_transformers  # noqa: PLC0415

    quiet_transformers()
    asked = read_prompts(prompts) if prompts is not None else []
    with complete_folder(output) as folder:
        extractor = Extractor(base, tuned, _track)
        extractor.check(wanted, others)
        extraction = extractor.write(wanted, keep=others == "keep", dtype=read_dtype(dtype), folder=folder)
        measured = measure_divergence(base, tuned, folder, asked) if asked else []
        if measured:
            report = {**extraction.to_json(), "prompts": [_to_json(each) for each in measured], "kl": _mean(measured)}
            (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
    _show(extraction, measured)


def _track(names: Sequence[str], doing: str) -> Iterable[str]:
    console = Console(stderr=True)
    return track(names, doing, console=console, transient=True, disable=not console.is_terminal)


def _show(extraction: Extraction, measured: Sequence[Divergence]) -> None:
    console = wide_console()
    table = Table("module", "shape", "rank", "energy kept", "relative error", box=None)
    for module in extraction.modules:
        shape = "x".join(map(str, module.shape))
        table.add_row(Text(module.name), shape, str(module.rank), f"{module.energy:.4%}", f"{module.error:.2e}")
    console.print(table)
    for what, names in (("kept whole", extraction.kept), ("left as the base's", extraction.dropped)):
        if names:
            console.print(Text(f"{what}: {', '.join(names)}"))
    console.print(Text(f"relative error of all modules together: {extraction.error:.2e}"))
    if measured:
        table = Table("prompt", "tokens", "KL, nats a token", "same top token", box=None)
        for each in measured:
            shown = Text(each.prompt, overflow="ellipsis", no_wrap=True)
            table.add_row(shown, str(each.tokens), f"{each.kl:.2e}", f"{each.same_top:.0%}")
        console.print(table)
        console.print(Text(f"mean KL: {_mean(measured):.2e}"))


def _to_json(divergence: Divergence) -> dict[str, object]:
    return {name: getattr(divergence, name) for name in ("prompt", "tokens", "kl", "same_top")}


def _mean(measured: Sequence[Divergence]) -> float:
    return sum(each.kl for each in measured) / len(measured)
