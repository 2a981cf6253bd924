"""What adapters take in pages, beside padding each to the largest rank."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass

from report import table
from shapes import module_shapes

from weft.adapters.pages import PageAllocator
from weft.kernels.plan import PAGE_ROWS


@dataclass(frozen=True, slots=True)
class Memory:
    """Adapters of mixed ranks in a pool that others have fragmented; bytes in float32, over all modules.

    most_beyond_exact_pages: of any adapter, pages beyond its own rows. most_runs: into which one adapter was split.
    num_refused: adapters that found no pages although so many were free.
    """

    ranks: tuple[int, ...]
    num_adapters: int
    page_bytes: int
    exact_bytes: int
    paged_bytes: int
    padded_bytes: int
    most_beyond_exact_pages: float
    most_runs: int
    num_refused: int

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def row(self) -> list[str]:
        return [
            "/".join(map(str, self.ranks)),
            f"{self.paged_bytes / 1e6:.0f} MB",
            f"{self.paged_bytes / self.exact_bytes:.3f}",
            f"{self.paged_bytes / self.padded_bytes:.2f}",
            f"{self.most_beyond_exact_pages:.3f}",
            f"{self.most_runs}, {self.num_refused} refused",
        ]


def measure_memory(shape: str, ranks: tuple[int, ...], padded_to: int, num_adapters: int = 300) -> Memory:
    """Fill a pool to the last page, then replace half at random again and again, so that the gaps are scattered."""
    row_bytes = 4 * sum(d_in + d_out for d_in, d_out in module_shapes(shape).values())
    mix = [ranks[i % len(ranks)] for i in range(num_adapters)]
    pages = {rank: -(-rank // PAGE_ROWS) for rank in ranks}
    allocator = PageAllocator(1 + sum(pages[rank] for rank in mix))
    rng, refused = random.Random(0), 0
    held = {i: allocator.allocate(pages[rank]) for i, rank in enumerate(mix)}
    for _ in range(20):
        leaving = rng.sample(range(num_adapters), num_adapters // 2)
        for i in leaving:
            allocator.free(held.pop(i))
        rng.shuffle(leaving)
        for i in leaving:
            if pages[mix[i]] > allocator.num_free:
                refused += 1
            held[i] = allocator.allocate(pages[mix[i]])
    allocator.check(list(held.values()))
    taken = {i: sum(last - first for first, last in runs) for i, runs in held.items()}
    page_bytes = PAGE_ROWS * row_bytes
    return Memory(
        ranks=ranks,
        num_adapters=num_adapters,
        page_bytes=page_bytes,
        exact_bytes=sum(mix) * row_bytes,
        paged_bytes=sum(taken.values()) * page_bytes,
        padded_bytes=num_adapters * padded_to * row_bytes,
        most_beyond_exact_pages=max(taken[i] - rank / PAGE_ROWS for i, rank in enumerate(mix)),
        most_runs=max(map(len, held.values())),
        num_refused=refused,
    )


def show_memory(measured: list[Memory], padded_to: int) -> str:
    head = ["ranks", "in pages", "over the exact rows", f"over padding to {padded_to}"]
    return table([*head, "most pages beyond its rows", "most runs of one adapter"], [each.row() for each in measured])
