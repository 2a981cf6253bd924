"""Adapters at a lower rank, without ever forming what they add to a weight.

Of B A, with B = Q_B R_B and A^T = Q_A R_A, all is in the small core R_B R_A^T = U S V^T: the singular values of B A are
those of the core, and cutting S cuts B A as Eckart and Young say (`weft.making.low_rank`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from weft.adapters.rows import RowForm, rounding_error
from weft.errors import InvalidAdapter, Problem
from weft.making.budget import Adapter, Ranks, Values, ranks_for, ranks_within
from weft.making.low_rank import Wanted
from weft.making.peft_folder import Lora, PeftFolder, write_folder

REPORT_FILE = "compression.json"

Source = Callable[[], PeftFolder]
"""Reads an adapter, each time anew: of many, one is in memory at a time."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """b a of one module by its singular triplets, float64: u [d_out, r], s [r] descending, vt [r, d_in]."""

    lora: Lora
    u: torch.Tensor
    s: torch.Tensor
    vt: torch.Tensor

    @classmethod
    def of(cls, lora: Lora) -> Spectrum:
        q_b, r_b = torch.linalg.qr(lora.b.double())
        q_a, r_a = torch.linalg.qr(lora.a.double().t())
        u, s, vt = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
        s[s <= lora.row_numbers * torch.finfo(torch.float64).eps * s.max()] = 0.0
        return cls(lora, q_b @ u, s, vt @ q_a.t())

    @property
    def values(self) -> Values:
        return Values((self.s * self.lora.scale).square(), self.lora.rank, self.lora.row_numbers)

    def cut(self, rank: int, dtype: torch.dtype) -> Lora:
        """The scale stays as it is, and so right for what else PEFT multiplies with it."""
        roots = self.s[:rank].sqrt()
        a, b = roots[:, None] * self.vt[:rank], self.u[:, :rank] * roots
        return replace(self.lora, a=a.to(dtype).contiguous(), b=b.to(dtype).contiguous())


@dataclass(frozen=True, slots=True)
class Compressed:
    """One module. rank: 0 where it is gone. error: ||D' - D|| / ||D|| of what is saved; norm: ||D||, scale and all.

    int8_error: what 8-bit rows would add to that, as `weft serve --adapter-dtype int8` makes them of what is saved.
    """

    name: str
    rank_before: int
    rank: int
    error: float
    norm: float
    int8_error: float


@dataclass(frozen=True, slots=True)
class Compression:
    """One adapter. num_bytes: of all its tensors."""

    source: str
    modules: tuple[Compressed, ...]
    bytes_before: int
    num_bytes: int

    @property
    def error(self) -> float:
        """Over all modules together."""
        whole = math.fsum(module.norm**2 for module in self.modules)
        return math.sqrt(math.fsum((module.error * module.norm) ** 2 for module in self.modules) / whole)

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "error": self.error}


def choose_ranks(
    sources: Sequence[Source], wanted: Wanted | None, budget: int | None, dtype: torch.dtype | None
) -> list[Ranks]:
    """For each adapter. budget: of the bytes of all tensors of all of them; where it is given, wanted is not.

    dtype: of what is saved, None for each adapter's own. Raises InvalidAdapter, InvalidConfig.
    """
    adapters, itemsizes, rest = [], [], 0
    for source in sources:
        adapter = source()
        modules = {name: Spectrum.of(lora).values for name, lora in adapter.modules.items()}
        adapters.append(Adapter(modules, least=1 if adapter.keeps_modules else 0))
        itemsizes.append((dtype or adapter.dtype).itemsize)
        rest += sum(tensor.nbytes for tensor in adapter.rest.values())
        if not adapters[-1].energy:
            raise InvalidAdapter(adapter.source, [Problem("lora_A, lora_B", "add nothing")], "compressed")
    if budget is not None:
        return ranks_within(adapters, budget - rest, itemsizes)
    assert wanted is not None, "a rank, an energy or a budget"
    return ranks_for(adapters, wanted)


def compress(
    adapter: PeftFolder, ranks: Mapping[str, int], dtype: torch.dtype | None
) -> tuple[PeftFolder, Compression]:
    """The adapter at these ranks, and what that did to each module; a module of rank 0 goes."""
    modules, report = {}, []
    for name, lora in adapter.modules.items():
        spectrum = Spectrum.of(lora)
        cut = spectrum.cut(ranks[name], dtype or adapter.dtype)
        if cut.rank:
            modules[name] = cut
        norm = math.sqrt(float(spectrum.values.squares.sum()))
        report.append(Compressed(name, lora.rank, cut.rank, _relative_error(lora, cut), norm, _int8_error(cut)))
    compressed = replace(adapter, modules=modules)
    return compressed, Compression(adapter.source, tuple(report), adapter.num_bytes, compressed.num_bytes)


def write_compressed(
    adapter: PeftFolder, ranks: Mapping[str, int], dtype: torch.dtype | None, folder: Path
) -> Compression:
    """The same as a PEFT folder with its report."""
    compressed, report = compress(adapter, ranks, dtype)
    write_folder(compressed, folder)
    (folder / REPORT_FILE).write_text(json.dumps(report.to_json(), indent=2) + "\n")
    return report


def _relative_error(exact: Lora, cut: Lora) -> float:
    """||b' a' - b a|| / ||b a||, each by the triangles of its factors: of [b', -b] and of [a'; a]."""

    def norm(b: torch.Tensor, a: torch.Tensor) -> float:
        return float(torch.linalg.matrix_norm(torch.linalg.qr(b).R @ torch.linalg.qr(a.t()).R.t()))

    a, b = exact.a.double(), exact.b.double()
    whole = norm(b, a)
    off = norm(torch.cat([cut.b.double(), -b], dim=1), torch.cat([cut.a.double(), a]))
    return off / whole if whole else 0.0


def _int8_error(lora: Lora) -> float:
    rows = {"": (lora.a.float(), lora.b.float().t().contiguous())}
    return rounding_error(rows, RowForm(torch.float32, torch.int8, pinned=False).hold(rows))
