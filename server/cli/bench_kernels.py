"""`weft bench kernels`: measure the backends of the adapters' part, and write the table that "auto" chooses by."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from weft.kernels.lora import Measurement


@click.command("kernels")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Of a CPU; else one a core.")
@click.option("--quick", is_flag=True, help="One width and one repeat: to see that it runs.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The table, JSON; what it holds of other devices stays. The one that Weft goes by is kernels/measured.json.",
)
def kernels(device: str, threads: int | None, quick: bool, output: Path | None) -> None:
    """Measure every backend over rows, adapters, ranks, widths and dtypes, and write a table."""
    import torch  # noqa: PLC0415 - takes seconds
    from tqdm import tqdm  # noqa: PLC0415

    from weft.kernels.lora import available  # noqa: PLC0415
    from weft.kernels.measure import Sweep, measure  # noqa: PLC0415
    from weft.kernels.native import find_native  # noqa: PLC0415

    kind = device.partition(":")[0]
    known = None if output is None else _read(output, kind)
    if device != "cpu" and not (kind == "cuda" and torch.cuda.is_available()):
        raise click.ClickException(f"--device is {device!r}, which this machine does not have")
    threads = threads or torch.get_num_threads()
    native = find_native(threads)
    torch.set_num_threads(threads)
    backends = [backend for backend in available(native) if backend.name != "reference"]
    sweep = Sweep(widths=((576, 960),), repeats=1) if quick else Sweep()
    with torch.inference_mode():
        found = list(tqdm(measure(sweep, backends, torch.device(device)), total=sweep.num_measurements, leave=False))
    click.echo(_summary(found))
    if output is not None and known is not None:
        machine = _machine(device, threads, torch.__version__, "none" if native is None else native.level)
        output.write_text(_merged(known, kind, machine, found), encoding="utf-8")


def check_can_write(path: Path) -> None:
    """Raises ClickException. Before a run, so that none is for nothing."""
    if not path.parent.is_dir():
        raise click.ClickException(f"{path} can't be written: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise click.ClickException(f"{path} can't be written")


def _read(path: Path, kind: str) -> dict[str, Any]:
    """What the table that is there, if any, holds of other kinds of devices.

    Raises ClickException where it is no table, or can't be replaced.
    """
    check_can_write(path)
    if not path.exists():
        return {"machines": {}, "measurements": []}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        machines = {name: machine for name, machine in table.get("machines", {}).items() if name != kind}
        measurements = [entry for entry in table.get("measurements", []) if entry["device"] != kind]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise click.ClickException(f"{path} is no table of measurements: remove it, or write to another file") from None
    return {"machines": machines, "measurements": measurements}


def _machine(device: str, threads: int, version: str, level: str) -> dict[str, str | int]:
    import torch  # noqa: PLC0415

    if device != "cpu":
        return {"name": torch.cuda.get_device_name(device), "torch": version}
    return {"name": _processor(), "threads": threads, "torch": version, "library": level}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _merged(known: dict[str, Any], kind: str, machine: dict[str, str | int], found: Sequence[Measurement]) -> str:
    """The table with these measurements of this kind of device beside what is known of others; one to a line."""
    machines = {**known["machines"], kind: machine}
    rounded = [{**asdict(each), "ms": {name: float(f"{ms:.3g}") for name, ms in each.ms.items()}} for each in found]
    lines = ",\n".join(f"    {json.dumps(entry)}" for entry in (*known["measurements"], *rounded))
    head = json.dumps({"command": "weft bench kernels", "machines": machines}, indent=2).removesuffix("\n}")
    return f'{head},\n  "measurements": [\n{lines}\n  ]\n}}\n'


def _summary(found: Sequence[Measurement]) -> str:
    """For each dtype and step, how long each backend takes over the fastest, on average over ranks and widths."""
    lines = ["dtype     rows  distinct  backend: its time over the fastest's (geometric mean)"]
    for dtype, rows, distinct in dict.fromkeys((each.dtype, each.rows, each.distinct) for each in found):
        alike = [each for each in found if (each.dtype, each.rows, each.distinct) == (dtype, rows, distinct)]
        ratios = {
            name: math.exp(sum(math.log(each.ms[name] / min(each.ms.values())) for each in alike) / len(alike))
            for name in alike[0].ms
        }
        told = "  ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
        lines.append(f"{dtype:<9} {rows:>4}  {distinct:>8}  {told}")
    return "\n".join(lines)
