"""What a step asks of the batched gather-matmul: which rows of the flat row use which pages, at which scale.

Adapters live in *rank pages*: a page holds `PAGE_ROWS` rank rows of one adapter at every site (adapted module) of the
model, so the same page id names the adapter's rows everywhere and a step's plan is built once for all layers.
Page 0 is all zeros and belongs to no adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TypeVar, cast

import torch

from weft.kernels.heads import Head
from weft.kernels.patches import Patch

PAGE_ROWS = 8
"""Rank rows a page: an adapter of rank r takes ceil(r / 8) pages."""


@dataclass(frozen=True, slots=True, eq=False)
class PagedAdapter:
    """One resident adapter, as the kernels see it.

    runs: half-open ranges of consecutive page ids that together hold its rank rows, in order.
    rank: how many of their rows are its own, the first; those behind are zero. None: they are not told apart.
    scale: alpha / r (or alpha / sqrt(r)), float32 precision.
    sites: the sites it has rows at; at every other site its page rows are zero.
    patches: what else it does, by the name of the module, in the order in which it is done.
    invocation: of an activated LoRA, the tokens from whose last occurrence in the prompt on it adapts.
    head: of a sequence classifier, its own.
    """

    runs: tuple[tuple[int, int], ...]
    scale: float
    sites: frozenset[int]
    patches: Mapping[str, tuple[Patch, ...]] = field(default_factory=dict)
    invocation: tuple[int, ...] = ()
    rank: int | None = None
    head: Head | None = None

    @property
    def runs_with_ranks(self) -> list[tuple[int, int, int]]:
        """Each run (first, last), and how many of its rows are the adapter's own."""
        found: list[tuple[int, int, int]] = []
        left = self.rank
        for first, last in self.runs:
            rows = (last - first) * PAGE_ROWS
            own = rows if left is None else min(rows, left)
            left = None if left is None else left - own
            found.append((first, last, own))
        return found


Weighted = tuple[PagedAdapter, float]
"""An adapter and its weight in a request's mix (1.0 for a single adapter)."""


RowIndex = slice | torch.Tensor

_L = TypeVar("_L")


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows of the step that share one run of pages: y[rows] += scale * (x[rows] A[first:last]^T) B[first:last].

    rows: a slice where the rows are adjacent, else an int64 index tensor without repeats. rank: the rows of the pages
    that need be read, the first; those behind are zero.
    """

    rows: RowIndex
    first: int
    last: int
    scale: float
    sites: frozenset[int]
    rank: int


@dataclass(frozen=True, slots=True)
class PatchedRows:
    """Rows of the step that one adapter's patch of a module is for, and the adapter's weight in their mix."""

    rows: RowIndex
    patch: Patch
    weight: float


@dataclass(frozen=True, slots=True)
class Plan:
    """One step's work for every site. Rows that appear in no segment or patch are base rows and are never touched.

    patches: by the name of the module. mixes: the same work by rows: which use which adapters, each named once.
    """

    num_tokens: int
    segments: tuple[Segment, ...]
    patches: Mapping[str, Sequence[PatchedRows]] = field(default_factory=dict)
    mixes: Sequence[tuple[range, Sequence[Weighted]]] = ()
    _layouts: dict[object, object] = field(default_factory=dict)

    def layout(self, make: Callable[[Plan], _L]) -> _L:
        """What a backend makes of the plan, made once for all sites."""
        if make not in self._layouts:
            self._layouts[make] = make(self)
        return cast("_L", self._layouts[make])

    def to(self, device: torch.device) -> Plan:
        """The same for rows on a device."""
        return replace(
            self,
            segments=tuple(replace(segment, rows=_to(segment.rows, device)) for segment in self.segments),
            patches={
                name: [replace(each, rows=_to(each.rows, device)) for each in patched]
                for name, patched in self.patches.items()
            },
            _layouts={},
        )


Span = tuple[int, Sequence[Weighted]]
"""Adjacent rows, how many, that use the same adapters."""


def build_plan(spans: Iterable[Span], device: torch.device) -> Plan | None:
    """Lay out one step.

    spans: in row order; one without rows does no harm. Segments and patches come by their places in the rows' mixes, so
    that a row's terms are added in the order of its own mix, whatever the mixes beside it are.
    Returns None where no span uses an adapter: such a step costs nothing at any site.
    """
    ranges: dict[tuple[int, PagedAdapter, float], list[range]] = {}
    mixes: list[tuple[range, Sequence[Weighted]]] = []
    start = 0
    for num_tokens, adapters in spans:
        if num_tokens and adapters:
            rows_of_span = range(start, start + num_tokens)
            mixes.append((rows_of_span, _summed(adapters)))
            for place, (adapter, weight) in enumerate(mixes[-1][1]):
                ranges.setdefault((place, adapter, weight), []).append(rows_of_span)
        start += num_tokens
    if not ranges:
        return None
    segments: list[Segment] = []
    patches: dict[str, list[PatchedRows]] = {}
    for (_, adapter, weight), parts in sorted(ranges.items(), key=lambda entry: entry[0][0]):
        rows = _rows(parts, device)
        scale = adapter.scale * weight
        segments += [
            Segment(rows, first, last, scale, adapter.sites, rank) for first, last, rank in adapter.runs_with_ranks
        ]
        for name, own in adapter.patches.items():
            patches.setdefault(name, []).extend(PatchedRows(rows, patch, weight) for patch in own)
    return Plan(num_tokens=start, segments=tuple(segments), patches=patches, mixes=mixes)


class Plans:
    """Makes plans, and gives the last one again where a step is laid out like the one before: most decode steps are.

    So what a backend made of it is made once for all of them. An adapter that went and came again is another one.
    """

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._device: torch.device | None = None
        self._plan: Plan | None = None

    def __call__(self, spans: Iterable[Span], device: torch.device) -> Plan | None:
        """As `build_plan`."""
        wanted = list(spans)
        if wanted != self._spans or device != self._device:
            self._spans, self._device, self._plan = wanted, device, build_plan(wanted, device)
        return self._plan


def _summed(adapters: Sequence[Weighted]) -> Sequence[Weighted]:
    """Each adapter once: patches are done once a row, so one that is named twice must count with both weights."""
    weights: dict[PagedAdapter, float] = {}
    for adapter, weight in adapters:
        weights[adapter] = weights.get(adapter, 0.0) + weight
    return tuple(weights.items())


def _rows(parts: Sequence[range], device: torch.device) -> slice | torch.Tensor:
    adjacent = all(left.stop == right.start for left, right in pairwise(parts))
    if adjacent:
        return slice(parts[0].start, parts[-1].stop)
    return torch.tensor([row for part in parts for row in part], dtype=torch.int64, device=device)


def all_rows(rows: RowIndex, num_tokens: int) -> Sequence[int]:
    """The rows one by one, ascending."""
    if isinstance(rows, slice):
        return range(num_tokens)[rows]
    found: list[int] = rows.tolist()
    return found


def _to(rows: RowIndex, device: torch.device) -> RowIndex:
    return rows if isinstance(rows, slice) else rows.to(device)
