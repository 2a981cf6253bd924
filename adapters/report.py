"""What a source holds and what it would cost, said without loading it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from weft.adapters.base import Base, ModuleKind
from weft.adapters.classes import Classes
from weft.adapters.content import LoraWeights, Part
from weft.errors import Problem
from weft.kernels.plan import PAGE_ROWS


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One part of an adapter.

    name: of the module, or the parameter. kind: the module's, and what is done to it. applied: False where a problem
    keeps it from being served. rank, scale: 0 where there is no low-rank term. dtype: in the file. num_pages: the rank
    pages that its rows need. num_bytes: in the file.
    """

    name: str
    kind: str
    applied: bool
    rank: int
    scale: float
    dtype: str
    num_pages: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """A dry run. What it would take, and the digest, are empty where there are problems.

    num_pages, device_bytes: that it would take on the device. host_bytes: in host memory, in the base's dtype.
    probe_error: of the parity probe, None where it was not run. classes: of a sequence classifier.
    """

    source: str
    modules: tuple[ModuleReport, ...]
    problems: tuple[Problem, ...] = ()
    digest: str = ""
    num_pages: int = 0
    device_bytes: int = 0
    host_bytes: int = 0
    probe_error: float | None = None
    classes: Classes | None = None


def module_reports(weights: LoraWeights, base: Base, problems: Iterable[Problem]) -> tuple[ModuleReport, ...]:
    """A line for each part that would be applied, and one for each module that a problem keeps from it; by name."""
    reports = [_report(part, base) for part in weights.parts()]
    refused = {name for name in base.modules for problem in problems if _is_of(problem.subject, name)}
    for name in refused - {report.name for report in reports}:
        kind = base.modules[name].kind.value
        reports.append(ModuleReport(name, kind, applied=False, rank=0, scale=0.0, dtype="", num_pages=0, num_bytes=0))
    return tuple(sorted(reports, key=lambda report: report.name))


def _report(part: Part, base: Base) -> ModuleReport:
    module = base.modules.get(part.name) or base.modules.get(part.name.rpartition(".")[0])
    kind = "own head" if module is None else module.kind.value
    return ModuleReport(
        name=part.name,
        kind=f"{kind}: {part.what}",
        applied=True,
        rank=part.rank,
        scale=part.scale,
        dtype=", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in part.tensors})),
        num_pages=-(-part.rank // PAGE_ROWS) if module is not None and module.kind is ModuleKind.LINEAR else 0,
        num_bytes=sum(tensor.nbytes for tensor in part.tensors),
    )


def _is_of(subject: str, module: str) -> bool:
    return subject == module or subject.startswith(f"{module}.")
