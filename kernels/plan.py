"""What a step asks of the batched gather-matmul: which rows of the flat row use which pages, at which scale.

Adapters live in *rank pages*: a page holds `PAGE_ROWS` rank rows of one adapter at every site (adapted module) of the
model, so the same page id names the adapter's rows everywhere and a step's plan is built once for all layers.
Page 0 is all zeros and belongs to no adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

PAGE_ROWS = 8
"""Rank rows a page: an adapter of rank r takes ceil(r / 8) pages."""


@dataclass(frozen=True, slots=True, eq=False)
class PagedAdapter:
    """One resident adapter, as the kernels see it.

    runs: half-open ranges of consecutive page ids that together hold its rank rows, in order.
    scale: alpha / r (or alpha / sqrt(r)), float32 precision.
    sites: the sites it has rows at; at every other site its page rows are zero.
    """

    runs: tuple[tuple[int, int], ...]
    scale: float
    sites: frozenset[int]


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows of the step that share one run of pages: y[rows] += scale * (x[rows] A[first:last]^T) B[first:last].

    rows: a slice where the rows are adjacent, else an int64 index tensor without repeats.
    """

    rows: slice | torch.Tensor
    first: int
    last: int
    scale: float
    sites: frozenset[int]


@dataclass(frozen=True, slots=True)
class Plan:
    """One step's work for every site. Rows that appear in no segment are base rows and are never touched."""

    num_tokens: int
    segments: tuple[Segment, ...]


Weighted = tuple[PagedAdapter, float]
"""An adapter and its weight in a request's mix (1.0 for a single adapter)."""


def build_plan(spans: Iterable[tuple[int, Sequence[Weighted]]], device: torch.device) -> Plan | None:
    """Lay out one step.

    spans: for each sequence in row order, how many tokens it has in the step and the adapters it uses.
    Returns None where no span uses an adapter: such a step costs nothing at any site.
    """
    ranges: dict[tuple[PagedAdapter, float], list[range]] = {}
    start = 0
    for num_tokens, adapters in spans:
        for weighted in adapters:
            ranges.setdefault(weighted, []).append(range(start, start + num_tokens))
        start += num_tokens
    if not ranges:
        return None
    segments = []
    for (adapter, weight), parts in ranges.items():
        rows = _rows(parts, device)
        scale = adapter.scale * weight
        segments += [Segment(rows, first, last, scale, adapter.sites) for first, last in adapter.runs]
    return Plan(num_tokens=start, segments=tuple(segments))


def _rows(parts: Sequence[range], device: torch.device) -> slice | torch.Tensor:
    adjacent = all(left.stop == right.start for left, right in pairwise(parts))
    if adjacent:
        return slice(parts[0].start, parts[-1].stop)
    return torch.tensor([row for part in parts for row in part], dtype=torch.int64, device=device)
