"""Will these adapters fit? Arithmetic on reports and on what the store says that there is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weft.adapters.records import AdapterInfo, Capacity
from weft.adapters.report import AdapterReport
from weft.server.api.resources import to_problems
from weft.server.api.violations import Range, Violations
from weft.v1 import adapter_pb2 as pb2

MAX_SOURCES = 64
MAX_SHAPES = 64
RANKS = Range(1, 65536)
COUNTS = Range(1, 100_000)


@dataclass(frozen=True, slots=True)
class Shape:
    """So many adapters of one rank."""

    rank: int
    count: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be planned for. ranks: of adapters that may come besides."""

    sources: tuple[str, ...]
    shapes: tuple[Shape, ...]
    ranks: tuple[int, ...]


def to_wanted(request: pb2.PlanCapacityRequest) -> Wanted:
    """Raises InvalidRequest with every violation but those of a source's form, which the store knows."""
    violations = Violations()
    sources, ranks = request.sources, request.ranks
    if violations.fits(sources, "sources", MAX_SOURCES):
        for index, source in enumerate(sources):
            if not source:
                violations.add(f"sources[{index}]", "is empty; give a source")
    shapes = [
        _shape(shape, f"shapes[{index}]", violations)
        for index, shape in enumerate(request.shapes if violations.fits(request.shapes, "shapes", MAX_SHAPES) else ())
    ]
    if violations.fits(ranks, "ranks", MAX_SHAPES):
        for index, rank in enumerate(ranks):
            violations.value(rank, f"ranks[{index}]", RANKS)
    violations.raise_any()
    return Wanted(tuple(sources), tuple(shapes), tuple(ranks))


def to_plan(
    wanted: Wanted,
    reports: Sequence[AdapterReport],
    present: Iterable[AdapterInfo],
    capacity: Capacity,
    kv_tokens: tuple[int, int],
) -> pb2.PlanCapacityResponse:
    """The answer. reports: of `wanted.sources`. present: the registered adapters. kv_tokens: in all, and free."""
    pinned = {info.digest for info in present if info.pinned}
    contents = {report.digest: report for report in reports if not report.problems}
    pages_of_shapes = sum(_pages(shape.rank, capacity) * shape.count for shape in wanted.shapes)
    pages_needed = sum(report.num_pages for report in contents.values()) + pages_of_shapes
    pages_pinned_already = sum(report.num_pages for digest, report in contents.items() if digest in pinned)
    room = capacity.pages_total - capacity.pages_pinned - (pages_needed - pages_pinned_already)
    can_all_be_served = not any(report.problems for report in reports)
    return pb2.PlanCapacityResponse(
        fits=room >= 0 and can_all_be_served,
        pages_needed=pages_needed,
        pages_total=capacity.pages_total,
        pages_free=capacity.pages_free,
        pages_pinned=capacity.pages_pinned,
        host_bytes_needed=sum(report.host_bytes for report in contents.values())
        + sum(_host_bytes_of_rank(shape.rank, capacity) * shape.count for shape in wanted.shapes),
        host_bytes_total=capacity.host_bytes_total,
        host_bytes_used=capacity.host_bytes_used,
        kv_tokens_total=kv_tokens[0],
        kv_tokens_free=kv_tokens[1],
        sources=[_planned(report) for report in reports],
        rooms=[pb2.RankRoom(rank=rank, count=max(0, room) // _pages(rank, capacity)) for rank in wanted.ranks],
    )


def _shape(shape: pb2.AdapterShape, path: str, violations: Violations) -> Shape:
    violations.value(shape.rank, f"{path}.rank", RANKS)
    return Shape(shape.rank, violations.number(shape, f"{path}.count", 1, COUNTS))


def _planned(report: AdapterReport) -> pb2.PlannedSource:
    return pb2.PlannedSource(
        source=report.source,
        digest=report.digest,
        num_pages=report.num_pages,
        host_bytes=report.host_bytes,
        problems=to_problems(report.problems),
    )


def _pages(rank: int, capacity: Capacity) -> int:
    return -(-rank // capacity.page_rows)


def _host_bytes_of_rank(rank: int, capacity: Capacity) -> int:
    """Of an adapter that changes every linear module: rows on the host are not padded to pages."""
    return rank * capacity.page_bytes // capacity.page_rows
