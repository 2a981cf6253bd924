"""Rank pages: who holds which, and the rows in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from weft.adapters.base import Base, ModuleKind
from weft.adapters.content import LoraWeights
from weft.adapters.fold import fold
from weft.errors import InvalidAdapter, OutOfCapacity, Problem
from weft.kernels.plan import PAGE_ROWS, PagedAdapter
from weft.kernels.site import Site

Runs = tuple[tuple[int, int], ...]


class PageAllocator:
    """Pages 1 … num_pages - 1, handed out as few runs of consecutive ids as possible. Page 0 stays zero for ever."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = set(range(1, num_pages))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - 1 - self.num_free

    def allocate(self, count: int) -> Runs:
        """Take `count` pages: the first run that fits, else the longest runs there are.

        Raises OutOfCapacity, with the numbers, when fewer are free.
        """
        if count > self.num_free:
            raise OutOfCapacity(
                f"the adapter needs {count} pages and {self.num_free} of {self.num_pages - 1} are free: "
                "unload an adapter, or start the server with a larger --adapter-pages"
            )
        runs: list[tuple[int, int]] = []
        gaps = self._gaps()
        fitting = next((gap for gap in gaps if gap[1] - gap[0] >= count), None)
        for first, last in [fitting] if fitting else sorted(gaps, key=lambda gap: gap[0] - gap[1]):
            taken = min(count, last - first)
            runs.append((first, first + taken))
            count -= taken
            if count == 0:
                break
        for first, last in runs:
            self._free -= set(range(first, last))
        return tuple(runs)

    def free(self, runs: Runs) -> None:
        for first, last in runs:
            self._free |= set(range(first, last))

    def _gaps(self) -> list[tuple[int, int]]:
        gaps: list[tuple[int, int]] = []
        for page in sorted(self._free):
            if gaps and gaps[-1][1] == page:
                gaps[-1] = (gaps[-1][0], page + 1)
            else:
                gaps.append((page, page + 1))
        return gaps

    def check(self, held: Sequence[Runs]) -> None:
        """Audit: every page is free or held by exactly one of `held`. Raises AssertionError."""
        owned = [page for runs in held for first, last in runs for page in range(first, last)]
        assert len(owned) == len(set(owned)), "a page has two owners"
        assert set(owned) | self._free == set(range(1, self.num_pages)), "a page is lost"
        assert not set(owned) & self._free, "a page is both free and held"


@dataclass(frozen=True, slots=True)
class PageConfig:
    """How much adapter memory there is, and of what kind."""

    num_pages: int
    dtype: torch.dtype
    device: torch.device


class PagePool:
    """The device memory of all adapters: one `Site` a module, and the allocator of their common pages."""

    def __init__(self, base: Base, config: PageConfig) -> None:
        self.base = base
        self._dtype = config.dtype
        self._device = config.device
        self.allocator = PageAllocator(config.num_pages)
        self.sites: Mapping[str, Site] = {
            name: Site(index, module.d_in, module.d_out, config.num_pages, config.dtype, config.device)
            for index, (name, module) in enumerate(base.of_kind(ModuleKind.LINEAR).items())
        }

    @property
    def page_bytes(self) -> int:
        """Bytes one page takes over all sites."""
        return sum(site.a[0].nbytes + site.b[0].nbytes for site in self.sites.values())

    def check_range(self, weights: LoraWeights, source: str) -> None:
        """Raises InvalidAdapter where values that are finite in the file would not be in the pages."""
        dtype = self._dtype
        beyond = [
            Problem(name, f"has values beyond the range of {str(dtype).removeprefix('torch.')}, the base's type")
            for name, tensor in weights.tensors()
            if not torch.isfinite(tensor.to(dtype)).all()
        ]
        if beyond:
            raise InvalidAdapter(source, beyond)

    def allocate(self, weights: LoraWeights) -> Runs:
        """Take the pages an adapter needs. Raises OutOfCapacity."""
        rank = max((module.rank for name, module in weights.modules.items() if name in self.sites), default=0)
        return self.allocator.allocate(-(-rank // PAGE_ROWS))

    def write(self, runs: Runs, weights: LoraWeights) -> PagedAdapter:
        """Copy an adapter into pages it was given.

        May run beside a step in flight: no plan knows these pages until the adapter is returned.
        """
        folded = fold(weights, self.base, self._dtype)
        for name, site in self.sites.items():
            site.write(runs, *folded.rows.get(name, (None, None)))
        return PagedAdapter(
            runs=runs,
            scale=folded.scale,
            sites=frozenset(self.sites[name].index for name in folded.rows),
            patches={name: tuple(patch.to(self._device) for patch in those) for name, those in folded.patches.items()},
            invocation=weights.invocation,
        )

    def free(self, runs: Runs) -> None:
        """Give pages back; the caller knows that no step in flight reads them."""
        self.allocator.free(runs)
