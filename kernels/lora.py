"""The one way into the batched gather-matmul, and the choice of what computes it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from weft.kernels import reference, segments
from weft.kernels.lora_native import NativeLora
from weft.kernels.native import Native
from weft.kernels.plan import Plan
from weft.kernels.site import SiteGroup

AddLora = Callable[[torch.Tensor, torch.Tensor, SiteGroup, Plan], torch.Tensor]

BACKENDS = ("auto", "reference", "torch", "cpu", "triton")
"""What may be asked for; all obey `reference.add_lora`'s docstring."""

MEASURED = Path(__file__).with_name("measured.json")
"""What `weft bench kernels` measured: the table that "auto" chooses by."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to compute it. takes: whether it is for this group's pages and rows of this dtype."""

    name: str
    add_lora: AddLora
    takes: Callable[[SiteGroup, torch.dtype], bool] = lambda group, dtype: True


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a call took by each backend, in ms.

    device: its type. dtype: of the pages. rows: of the step, of `distinct` adapters of one rank.
    """

    device: str
    dtype: str
    rows: int
    distinct: int
    rank: int
    d_in: int
    d_out: int
    ms: Mapping[str, float]


def available(native: Native | None) -> list[Backend]:
    """All that can run here."""
    found = [Backend("reference", reference.add_lora), Backend("torch", segments.add_lora)]
    if native is not None:
        found.append(Backend("cpu", NativeLora(native), NativeLora.takes))
    if has_triton():
        found.append(Backend("triton", _triton, _triton_takes))
    return found


def has_triton() -> bool:
    """Whether it is installed; loading it takes long."""
    return find_spec("triton") is not None


def _triton(y: torch.Tensor, x: torch.Tensor, group: SiteGroup, plan: Plan) -> torch.Tensor:
    from weft.kernels import triton_lora  # noqa: PLC0415 - slow to load

    return triton_lora.add_lora(y, x, group, plan)


def _triton_takes(group: SiteGroup, dtype: torch.dtype) -> bool:
    return group.a.device.type == "cuda" and dtype in (torch.float32, torch.bfloat16, torch.float16)


def find_backend(name: str, native: Native | None) -> AddLora:
    """The backend of a name in `BACKENDS`; "torch" where that can't run here, or not on these pages."""
    found = available(native)
    if name == "triton" and has_triton() and os.environ.get("TRITON_INTERPRET") == "1":
        return _triton  # on any device: this is how tests run it
    if name == "auto":
        return Choosing(found[1:], read_measured(MEASURED))
    return Choosing([backend for backend in found if backend.name in ("torch", name)], (), name)


def read_measured(path: Path) -> list[Measurement]:
    """A table as `weft bench kernels` writes it."""
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return [Measurement(**entry) for entry in table["measurements"]]


class Choosing:
    """For each group of sites the backend that was fastest on groups of its shape, or the one that is wanted.

    It is chosen by what never changes, not by the step: a request's numbers must not depend on who else is in the
    batch, and backends round differently.
    """

    def __init__(self, backends: Sequence[Backend], measured: Sequence[Measurement], wanted: str = "") -> None:
        """backends: the first takes all."""
        self._backends = backends
        self._measured = measured
        self._wanted = wanted

    def __call__(self, y: torch.Tensor, x: torch.Tensor, group: SiteGroup, plan: Plan) -> torch.Tensor:
        chosen = group.layout(self._choices)
        add_lora = chosen.get(y.dtype)
        if add_lora is None:
            add_lora = chosen[y.dtype] = self.choose(group, y.dtype).add_lora
        return add_lora(y, x, group, plan)

    def choose(self, group: SiteGroup, dtype: torch.dtype) -> Backend:
        """For rows of a dtype."""
        able = [backend for backend in self._backends if backend.takes(group, dtype)]
        costs = [(self._cost(backend.name, group), i) for i, backend in enumerate(able)]
        return able[min(costs)[1]]

    def _choices(self, group: SiteGroup) -> dict[torch.dtype, AddLora]:
        return {}

    def _cost(self, name: str, group: SiteGroup) -> float:
        """The logarithm of what calls on groups of the most similar shape took, in all."""
        if self._wanted:
            return float(name != self._wanted)
        kind = group.a.device.type, str(group.a.dtype).removeprefix("torch.")
        alike = [each for each in self._measured if (each.device, each.dtype) == kind]
        nearest = min((_distance(each, group) for each in alike), default=0.0)
        costs = [math.log(each.ms.get(name, math.inf)) for each in alike if _distance(each, group) == nearest]
        return sum(costs, 0.0)


def _distance(measured: Measurement, group: SiteGroup) -> float:
    return abs(math.log(measured.d_in / group.d_in)) + abs(math.log(measured.d_out / group.d_out))
