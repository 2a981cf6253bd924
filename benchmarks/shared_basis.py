"""One basis for many adapters, beside a smaller rank for each: the error and the speed of the same bytes, in one run.

    python benchmarks/shared_basis.py          # prints the tables and writes docs/performance.md
    python benchmarks/shared_basis.py --quick  # fewer and smaller; prints the tables only

"Compress then Serve" (Brüel-Gabrielsson et al., arXiv 2407.00066), its joint diagonalisation with full cores: of one
module, each adapter's D_i ~ U S_i V^T with U [d_out, c] and V [d_in, c] shared, S_i [c, c] its own. Found by turns: U
spans the leading directions of all D_i V, then V those of all D_i^T U. Against it stands what `weft compress --bytes`
does: each adapter's own SVD, cut where that loses least. Adapters count alike, each by its own energy, in both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from report import Samples, machine, table, write_section
from rich.progress import track

import weft
from weft.kernels.lora import available
from weft.kernels.measure import Sweep
from weft.kernels.measure import measure as measure_kernels
from weft.kernels.native import find_native
from weft.making.budget import Adapter, ranks_within
from weft.making.compression import Spectrum
from weft.making.peft_folder import Lora, read_folder

ROOT = Path(weft.__file__).parents[2]
SHARES = (1 / 2, 1 / 4, 1 / 8)
TURNS = 8
COLD_BYTES = 64 << 20
"""Of what calls go through in turn, as `weft.kernels.measure` has it."""

Family = Mapping[str, Sequence[Lora]]
"""The adapters of each module, of energy 1 each."""


def unit(lora: Lora) -> Lora:
    a, b = lora.a.double(), lora.b.double()
    norm = float(torch.linalg.matrix_norm(torch.linalg.qr(b).R @ torch.linalg.qr(a.t()).R.t()))
    return Lora(a, b / norm, 1.0)


def demo() -> Family:
    """The adapters of `make demo`, by their modules."""
    found: dict[str, list[Lora]] = {}
    for folder in sorted((ROOT / "src" / "weft" / "demo" / "adapters").iterdir()):
        for name, lora in read_folder(folder).modules.items():
            found.setdefault(name, []).append(unit(lora))
    return found


def drawn(count: int, width: int, rank: int, common: float) -> Family:
    """One module; common: how much of each adapter's factors is a draw that all share, times a matrix of its own."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a, b = draw(rank, width), draw(width, rank)
    own = 1 - common
    loras = [
        Lora(
            common * draw(rank, rank) @ a / rank**0.5 + own * draw(rank, width),
            common * b @ draw(rank, rank) / rank**0.5 + own * draw(width, rank),
            1.0,
        )
        for _ in range(count)
    ]
    return {"module": [unit(lora) for lora in loras]}


def basis_width(loras: Sequence[Lora], num_numbers: int) -> int:
    """The widest basis that, with a core for each adapter, is made of so many numbers: w c + n c^2."""
    width = loras[0].row_numbers
    fitting = int((math.sqrt(width**2 + 4 * len(loras) * num_numbers) - width) / (2 * len(loras)))
    return min(fitting, loras[0].a.shape[1], loras[0].b.shape[0])


def shared_loss(loras: Sequence[Lora], c: int) -> float:
    """The sum of ||D_i - U S_i V^T||^2."""
    if c == 0:
        return float(len(loras))
    v = leading([lora.a.t() @ torch.linalg.qr(lora.b).R.t() for lora in loras], c)
    u = v
    for _ in range(TURNS):
        u = leading([lora.b @ (lora.a @ v) for lora in loras], c)
        v = leading([lora.a.t() @ (lora.b.t() @ u) for lora in loras], c)
    kept = sum(float(((u.t() @ lora.b) @ (lora.a @ v)).square().sum()) for lora in loras)
    return len(loras) - kept


def leading(parts: Sequence[torch.Tensor], c: int) -> torch.Tensor:
    """The c leading left singular vectors of the parts side by side."""
    whole = torch.cat(list(parts), dim=1)
    return torch.linalg.eigh(whole @ whole.t()).eigenvectors[:, -c:]


def errors(family: Family, share: float) -> list[str]:
    """Of a share of all bytes: the basis's width and error, and the error of each adapter's own SVD."""
    shared, own, count, widths = 0.0, 0.0, 0, []
    for loras in family.values():
        numbers = int(share * sum(lora.rank * lora.row_numbers for lora in loras))
        widths.append(basis_width(loras, numbers))
        shared += shared_loss(loras, widths[-1])
        spectra = {str(i): Spectrum.of(lora).values for i, lora in enumerate(loras)}
        (ranks,) = ranks_within([Adapter(spectra, least=0)], numbers, [1])  # of energy 1 each, they are weighed alike
        own += sum(float(values.squares[ranks[name] :].sum()) for name, values in spectra.items())
        count += len(loras)
    width = f"{min(widths)}" if min(widths) == max(widths) else f"{min(widths)} to {max(widths)}"
    return [f"1/{round(1 / share)}", width, f"{math.sqrt(shared / count):.3f}", f"{math.sqrt(own / count):.3f}"]


@dataclass(frozen=True, slots=True)
class Step:
    """A decode step at one module of d_in = d_out: rows, all of different adapters, of so many that there are."""

    width: int
    rank: int
    rows: int
    adapters: int

    def row(self, repeats: int) -> list[str]:
        own = self.time_own(repeats)
        shared, c = self.time_shared(repeats)
        name = f"{self.rows} rows, {self.adapters} adapters, {self.width} wide"
        return [name, f"{self.rank}", f"{own:.2f}", f"{c}", shared.show(1e3, 2), f"{shared.low * 1e3 / own:.1f}"]

    def time_own(self, repeats: int) -> float:
        """Milliseconds of Weft's kernel, the best of its turns."""
        steps = ((self.rows, min(self.rows, self.adapters)),)
        widths = ((self.width, self.width),)
        sweep = Sweep(steps, (self.rank,), widths, (torch.float32,), repeats)
        backends = [backend for backend in available(find_native(1)) if backend.name != "reference"]
        (measured,) = measure_kernels(sweep, [each for each in backends if each.name != "triton"], torch.device("cpu"))
        return min(measured.ms.values())

    def time_shared(self, repeats: int) -> tuple[Samples, int]:
        """Two products of the whole row and one of each row's own core."""
        lora = Lora(torch.empty(self.rank, self.width), torch.empty(self.width, self.rank), 1.0)
        c = basis_width([lora] * self.adapters, self.adapters * self.rank * lora.row_numbers)
        num_bytes = 4 * c * (2 * self.width + min(self.rows, self.adapters) * c)
        copies = 2 + COLD_BYTES // num_bytes
        bases = torch.randn(copies, 2, self.width, c)
        cores = torch.randn(copies, min(self.rows, self.adapters), c, c)
        x, y = torch.randn(2, self.rows, self.width)
        samples = Samples()
        for turn in range(repeats + 1):
            (u, v), core = bases[turn % copies], cores[turn % copies]
            started_s = time.perf_counter()
            inner = torch.bmm((x @ v)[:, None], core[torch.arange(self.rows) % len(core)])[:, 0]
            torch.addmm(y, inner, u.t(), out=y)
            samples.values.append(time.perf_counter() - started_s)
        del samples.values[0]
        return samples, c


@click.command(help=__doc__)
@click.option("--quick", is_flag=True)
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "docs" / "performance.md", show_default=False)
def main(quick: bool, output: Path) -> None:
    torch.set_num_threads(1)
    count, width = (12, 96) if quick else (96, 384)
    families = {
        "the demo's 12": demo(),
        f"{count} at random": drawn(count, width, 16, 0.0),
        f"{count}, half of each from one draw": drawn(count, width, 16, 0.5),
        f"{count}, 0.95 of each from one draw": drawn(count, width, 16, 0.95),
    }
    cases = [(name, family, share) for name, family in families.items() for share in SHARES]
    rows = [[name, *errors(family, share)] for name, family, share in track(cases, "factoring", transient=True)]
    wide = 256 if quick else 2048
    steps = [Step(wide, 16, rows_, adapters) for rows_ in (1, 16) for adapters in (16, 96)]
    speeds = [step.row(3 if quick else 15) for step in steps]
    head = ["adapters", "of the bytes", "width of the basis", "error, shared basis", "error, each its own SVD"]
    report = (
        f"{table(head, rows)}\n\n"
        f"{table(['a step', 'rank', 'own, ms', 'basis of the same bytes', 'shared, ms', 'over own'], speeds)}\n\n"
        f"Machine: {machine()}.\n"
    )
    click.echo(report)
    if not quick:
        write_section(output, "shared_basis", report)


if __name__ == "__main__":
    main()
