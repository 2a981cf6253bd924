"""`weft bench kernels`: measure the backends of the adapters' part, and write the table that "auto" chooses by."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

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

    threads = threads or torch.get_num_threads()
    native = find_native(threads)
    torch.set_num_threads(threads)
    backends = [backend for backend in available(native) if backend.name != "reference"]
    sweep = Sweep(widths=((576, 960),), repeats=1) if quick else Sweep()
    with torch.inference_mode():
        found = list(tqdm(measure(sweep, backends, torch.device(device)), total=sweep.num_measurements, leave=False))
    click.echo(_summary(found))
    if output is not None:
        machine = _machine(device, threads, torch.__version__, "none" if native is None else native.level)
        output.write_text(_merged(output, device, machine, found), encoding="utf-8")


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


def _merged(path: Path, device: str, machine: dict[str, str | int], found: Sequence[Measurement]) -> str:
    """The table with these measurements in place of those it had of this kind of device; one to a line."""
    kind = device.partition(":")[0]
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    machines = {**old.get("machines", {}), kind: machine}
    kept = [entry for entry in old.get("measurements", []) if entry["device"] != kind]
    rounded = [{**asdict(each), "ms": {name: float(f"{ms:.3g}") for name, ms in each.ms.items()}} for each in found]
    lines = ",\n".join(f"    {json.dumps(entry)}" for entry in (*kept, *rounded))
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
