"""Rank pages: who holds which, and the rows in them."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from weft.adapters.base import Base
from weft.adapters.classes import Classes
from weft.adapters.content import LoraWeights, is_finite
from weft.adapters.effect import has_effect
from weft.adapters.fold import Folded, fold
from weft.adapters.rows import HeldRows, RowForm, rounding_error
from weft.errors import InvalidAdapter, OutOfCapacity, Problem
from weft.kernels.heads import Head
from weft.kernels.native import Native
from weft.kernels.patches import Patch, tensors_of
from weft.kernels.plan import PAGE_ROWS, PagedAdapter
from weft.kernels.site import Site, SiteGroup

Runs = tuple[tuple[int, int], ...]


class PageAllocator:
    """Pages 1 … num_pages - 1, handed out as few runs of consecutive ids as possible. Page 0 stays zero for ever."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages - 1
        self._gaps: list[tuple[int, int]] = [(1, num_pages)] if num_pages > 1 else []

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
        fitting = next((gap for gap in self._gaps if gap[1] - gap[0] >= count), None)
        for first, last in [fitting] if fitting else sorted(self._gaps, key=lambda gap: gap[0] - gap[1]):
            taken = min(count, last - first)
            runs.append((first, first + taken))
            count -= taken
            if count == 0:
                break
        for run in runs:
            self._take(run)
        return tuple(runs)

    def free(self, runs: Runs) -> None:
        for first, last in runs:
            self.num_free += last - first
            at = bisect(self._gaps, (first, last))
            if at < len(self._gaps) and self._gaps[at][0] == last:
                last = self._gaps.pop(at)[1]  # noqa: PLW2901 - the run grows into its neighbours
            if at > 0 and self._gaps[at - 1][1] == first:
                at -= 1
                first = self._gaps.pop(at)[0]  # noqa: PLW2901
            self._gaps.insert(at, (first, last))

    def _take(self, run: tuple[int, int]) -> None:
        """Take the beginning of a gap."""
        first, last = run
        self.num_free -= last - first
        at = bisect(self._gaps, (first, self.num_pages)) - 1
        gap = self._gaps.pop(at)
        if gap[1] > last:
            self._gaps.insert(at, (last, gap[1]))

    def check(self, held: Sequence[Runs]) -> None:
        """Audit: every page is free or held by exactly one of `held`. Raises AssertionError."""
        owned = [page for runs in held for first, last in runs for page in range(first, last)]
        free = [page for first, last in self._gaps for page in range(first, last)]
        assert len(owned) == len(set(owned)), "a page has two owners"
        assert len(free) == self.num_free, "pages are miscounted"
        assert set(owned) | set(free) == set(range(1, self.num_pages)), "a page is lost"
        assert not set(owned) & set(free), "a page is both free and held"


class Recall(Protocol):
    """Reads one content again without validating it, as long as its files are the same. See `recall.py`."""

    @property
    def source(self) -> str: ...

    def read(self, folder: Path) -> HostAdapter | None:
        """None where the files are not those that they were. Raises OSError."""


@dataclass(frozen=True, slots=True, eq=False)
class HostAdapter:
    """An adapter in host memory, in the dtype and the layout of the pages.

    patches, invocation: as a `PagedAdapter` has them. modules: all that it changes. num_row_pages: that hold its rows.
    num_pages: that it takes on the device, those included whose place its patches take. num_bytes: that it takes here.
    disk_bytes: of its tensors in the file. probe_error: of the parity probe, None where it was not run.
    rounding_error: that 8 bits make of its deltas, relative; 0 where rows are of the base's dtype. head, classes: of a
    sequence classifier, its own, and what its logits stand for.
    recall: reads it again; None where that takes a validation.
    """

    digest: str
    rows: HeldRows
    scale: float
    patches: Mapping[str, tuple[Patch, ...]]
    invocation: tuple[int, ...]
    ranks: tuple[int, ...]
    modules: tuple[str, ...]
    num_row_pages: int
    num_pages: int
    num_bytes: int
    disk_bytes: int
    has_effect: bool
    probe_error: float | None = None
    rounding_error: float = 0.0
    head: Head | None = None
    classes: Classes | None = None
    recall: Recall | None = None

    @property
    def is_sum(self) -> bool:
        """Whether all that it does is a sum of terms that a weight can scale, so that it may be mixed with others."""
        return all(patch.is_sum for patches in self.patches.values() for patch in patches)


@dataclass(frozen=True, slots=True)
class PageConfig:
    """How much adapter memory there is, and of what kind.

    dtype: of the base, and of whatever an adapter has that is not in pages. row_dtype: of the rows in pages, the
    same or int8. native: the C library, where it computes on the device.
    """

    num_pages: int
    dtype: torch.dtype
    device: torch.device
    row_dtype: torch.dtype | None = None
    native: Native | None = None

    @property
    def row_form(self) -> RowForm:
        """How adapters are held on the host."""
        return RowForm(self.dtype, self.row_dtype or self.dtype, pinned=self.device.type == "cuda")


class PagePool:
    """The device memory of all adapters: one `Site` a module, and the allocator of their common pages.

    groups: of sites, by the names of their modules, which read the same input.
    page_bytes: that one page takes over all sites.
    """

    def __init__(self, base: Base, config: PageConfig) -> None:
        self.base = base
        self._dtype = config.dtype
        self._native = config.native
        self.row_form = config.row_form
        self._device = config.device
        self.allocator = PageAllocator(config.num_pages)
        self.groups: Mapping[tuple[str, ...], SiteGroup] = self._make_groups(config)
        self.sites: Mapping[str, Site] = {
            name: site for names, group in self.groups.items() for name, site in zip(names, group.sites, strict=True)
        }
        self.page_bytes = sum(pool[0].nbytes for site in self.sites.values() for pool in site.pools)
        self._flat = {name: [pool.flatten(0, 1) for pool in site.pools] for name, site in self.sites.items()}
        self._stream: torch.cuda.Stream | None = None
        if config.device.type == "cuda":
            self._stream = torch.cuda.Stream(config.device)  # type: ignore[no-untyped-call]

    def _make_groups(self, config: PageConfig) -> dict[tuple[str, ...], SiteGroup]:
        groups: dict[tuple[str, ...], SiteGroup] = {}
        index = 0
        for names in self.base.groups:
            first, *_ = modules = [self.base.modules[name] for name in names]
            d_outs = [module.d_out for module in modules]
            groups[names] = SiteGroup(index, first.d_in, d_outs, config.num_pages, config.row_form.dtype, config.device)
            index += len(names)
        return groups

    @property
    def num_pages(self) -> int:
        """Pages that adapters can hold in all."""
        return self.allocator.num_pages - 1

    def prepare(self, weights: LoraWeights, source: str) -> HostAdapter:
        """Bring a validated adapter into the form that `write` takes.

        Patches and a head are not in pages, but take the place of as many as would hold them: one budget covers all.
        Raises InvalidAdapter where values that are finite in the file would not be in the pages.
        """
        folded = fold(weights, self.base, self._dtype, self._native)
        self._check_range(folded, source)
        rows = self.row_form.hold(folded.rows)
        own = weights.head
        head = None if own is None else Head.of(own.weight, own.bias)
        patch_bytes = sum(t.nbytes for patches in folded.patches.values() for each in patches for t in tensors_of(each))
        patch_bytes += 0 if head is None else head.num_bytes
        num_row_pages = -(-max((len(halves[0]) for halves in rows.values()), default=0) // PAGE_ROWS)
        return HostAdapter(
            digest=weights.digest,
            rows=rows,
            scale=folded.scale,
            patches=folded.patches,
            invocation=weights.invocation,
            ranks=weights.ranks,
            modules=weights.touched if own is None else (*weights.touched, own.name),
            num_row_pages=num_row_pages,
            num_pages=num_row_pages - (-patch_bytes // max(self.page_bytes, 1)),
            num_bytes=sum(half.nbytes for halves in rows.values() for half in halves) + patch_bytes,
            disk_bytes=weights.num_bytes,
            has_effect=own is not None or has_effect(folded, self.base),
            rounding_error=rounding_error(folded.rows, rows) if self.row_form.dtype == torch.int8 else 0.0,
            head=head,
            classes=None if own is None else own.classes,
        )

    def allocate(self, host: HostAdapter) -> Runs:
        """Take the pages an adapter needs. Raises OutOfCapacity."""
        return self.allocator.allocate(host.num_pages)

    def write(self, runs: Runs, host: HostAdapter) -> PagedAdapter:
        """Copy an adapter into pages it was given; blocks until it is there.

        May run beside a step in flight: no plan knows these pages until the adapter is returned. Every row of them is
        written: what a former owner left there never survives.
        """
        runs = _first(runs, host.num_row_pages)
        targets: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        blanks: list[torch.Tensor] = []
        for name, pools in self._flat.items():
            if name in host.rows:
                for pool, rows in zip(pools, host.rows[name], strict=True):
                    self._lay_out(runs, pool, rows, targets, values, blanks)
            else:
                blanks += [pool[first * PAGE_ROWS : last * PAGE_ROWS] for pool in pools for first, last in runs]
        with self._copying():
            # One call for all: it holds Python's lock only to begin with, while the engine's thread wants it.
            if targets:
                torch._foreach_copy_(targets, values, non_blocking=True)
            if blanks:
                torch._foreach_zero_(blanks)
            patches = {name: tuple(patch.to(self._device) for patch in those) for name, those in host.patches.items()}
            head = None if host.head is None else host.head.to(self._device)
        sites = frozenset(self.sites[name].index for name in host.rows)
        rank = max((len(halves[0]) for halves in host.rows.values()), default=0)
        return PagedAdapter(runs, host.scale, sites, patches, host.invocation, rank, head)

    def free(self, runs: Runs) -> None:
        """Give pages back; the caller knows that no step to come reads them."""
        self.allocator.free(runs)

    @staticmethod
    def _lay_out(
        runs: Runs,
        pool: torch.Tensor,
        rows: torch.Tensor,
        targets: list[torch.Tensor],
        values: list[torch.Tensor],
        blanks: list[torch.Tensor],
    ) -> None:
        """Append what goes where in one part of a site. pool: [pages * PAGE_ROWS, ...]; rows: [rank, ...]."""
        at, rank = 0, rows.shape[0]
        for first, last in runs:
            start, stop = first * PAGE_ROWS, last * PAGE_ROWS
            filled = min(stop - start, rank - at)
            if filled > 0:
                targets.append(pool[start : start + filled])
                values.append(rows if filled == rank else rows[at : at + filled])
                at += filled
                start += filled
            if start < stop:
                blanks.append(pool[start:stop])

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """On CUDA, a stream of its own, behind the steps that may still read these pages; waits until it is done."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
            done = self._stream.record_event()
        done.synchronize()

    def _check_range(self, folded: Folded, source: str) -> None:
        parts = {name: [*rows] for name, rows in folded.rows.items()}
        for name, patches in folded.patches.items():
            parts.setdefault(name, []).extend(tensor for patch in patches for tensor in tensors_of(patch))
        dtype = str(self._dtype).removeprefix("torch.")
        beyond = [
            Problem(name, f"has values beyond the range of {dtype}, the base's type")
            for name, tensors in parts.items()
            if not all(map(is_finite, tensors))
        ]
        if beyond:
            raise InvalidAdapter(source, beyond)


def _first(runs: Runs, count: int) -> Runs:
    """The first pages of runs."""
    taken: list[tuple[int, int]] = []
    for first, last in runs:
        if count > 0:
            taken.append((first, min(last, first + count)))
            count -= last - first
    return tuple(taken)
