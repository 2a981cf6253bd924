"""The batched gather-matmul on a GPU: two Triton kernels over a work list that is made once a step.

On a CPU the kernels run under Triton's interpreter (TRITON_INTERPRET=1), which is for tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from weft.kernels import triton_kernels
from weft.kernels.plan import Plan
from weft.kernels.site import SiteGroup
from weft.kernels.triton_launch import Launch, is_interpreted, launch
from weft.kernels.work_list import TILE, Room, WorkList, make_work_list

_PROGRAMS_A_PROCESSOR = 8
"""Of the fixed grid, as many as run at once; one that finds no item ends at once."""

_ENTRIES_A_ROW = 4
"""That the grid has a program for, at the most: rank 64. Programs go round where a step has more."""

_INTERPRETED_PROGRAMS = 3

_MANY_SPLITS = 16
"""Their sums take registers that columns would need."""

# As few threads as hold their part of an item: most of what a thread does is there for each of them.
_SHRINK_WARPS = 2
_EXPAND_WARPS = 1


@dataclass(frozen=True, slots=True)
class Blocking:
    """How a group's work is cut up. It depends on the group's shape alone, so that a row's sums do, too.

    splits: of d_in, of split_size numbers each. block_n: columns of an expand's item.
    """

    splits: int
    split_size: int
    block_n: int

    @classmethod
    def of(cls, d_in: int, d_outs: tuple[int, ...], itemsize: int) -> Blocking:
        """itemsize: bytes of a number of x."""
        split_size = min(1024 // itemsize, max(16, 1 << (d_in - 1).bit_length()))
        splits = -(-d_in // split_size)
        widest = (512 if splits <= _MANY_SPLITS else 256) // itemsize
        return cls(splits, split_size, min(widest, max(16, 1 << (max(d_outs) - 1).bit_length())))


@dataclass(frozen=True, slots=True)
class GroupTables:
    """What the kernels need to know of a group; columns: as `triton_kernels` has them, on the device."""

    blocking: Blocking
    columns: torch.Tensor
    align: int
    is_even: bool

    @classmethod
    def of(cls, group: SiteGroup) -> GroupTables:
        blocking = Blocking.of(group.d_in, group.d_outs, max(2, group.a.element_size()))
        first = group.sites[0].b
        columns, y_at = [], 0
        for i, site in enumerate(group.sites):
            b_at = site.b.storage_offset() - first.storage_offset()
            width = site.b.shape[2]
            columns += [
                (i, y_at + at, b_at + at, min(blocking.block_n, width - at), site.b.stride(1), site.index)
                for at in range(0, width, blocking.block_n)
            ]
            y_at += width
        places = [place for _, y, b, _, stride, _ in columns for place in (y, b, stride)]
        align = next(n for n in (16, 8, 4, 2, 1) if all(place % n == 0 for place in places))
        return cls(
            blocking,
            torch.tensor(columns, dtype=torch.int64, device=first.device),
            align,
            all(width == blocking.block_n for _, _, _, width, _, _ in columns),
        )


class DeviceWork:
    """A work list in device memory, and room for what lies between the two kernels.

    The list is copied from page-locked memory, in one go, without waiting for the device.
    """

    def __init__(self, room: Room, device: torch.device) -> None:
        self.room = room
        self.numbers = torch.zeros(room.size, dtype=torch.int32, device=device)
        self._staging = torch.zeros(room.size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._planes = torch.empty(0, device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def load(self, work: WorkList) -> None:
        """Have the kernels that are launched from now on read this list."""
        if self._copied is not None:
            self._copied.synchronize()  # of the list before: long past, but for a host that runs far ahead
        end = work.write(self._staging.numpy(), self.room)
        self.numbers[:end].copy_(self._staging[:end], non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def plan(self, num_tokens: int) -> Plan:
        """One for so many rows, whose work is what was loaded last: for steps that are captured."""
        return Plan(num_tokens, (), _layouts={MakeWork(self.numbers.device): self})

    def planes(self, per_entry: int) -> torch.Tensor:
        """Space for so many planes an entry; kept from call to call, for none is read after its own group."""
        wanted = self.room.entries * per_entry * TILE * TILE
        if len(self._planes) < wanted:
            self._planes = torch.empty(wanted, device=self.numbers.device)
        return self._planes


@dataclass(frozen=True, slots=True)
class MakeWork:
    """Makes the work list of a plan on a device."""

    device: torch.device

    def __call__(self, plan: Plan) -> DeviceWork:
        work = make_work_list(plan)
        made = DeviceWork(work.room, self.device)
        made.load(work)
        return made


def add_lora(y: torch.Tensor, x: torch.Tensor, group: SiteGroup, plan: Plan) -> torch.Tensor:
    """As `reference.add_lora`, for x of float32, bfloat16 or float16; sums run in float32, y is rounded once."""
    return run(y, x, group, plan.layout(MakeWork(y.device)))


def run(y: torch.Tensor, x: torch.Tensor, group: SiteGroup, work: DeviceWork) -> torch.Tensor:
    """The same over a work list that is on the device."""
    if x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError("the rows of x and y must be contiguous")
    shrink(x, group, work)
    return expand(y, group, work)


def shrink(x: torch.Tensor, group: SiteGroup, work: DeviceWork, launch: Launch = launch) -> None:
    """Fill the planes from x; the first of the two kernels."""
    tables = group.layout(GroupTables.of)
    blocking, slices = tables.blocking, len(group.sites)
    planes = work.planes(slices * blocking.splits)
    entries = min(work.room.entries, len(x) * _ENTRIES_A_ROW)
    launch(
        triton_kernels.shrink,
        (_programs(x.device, entries * slices * blocking.splits),),
        x,
        x.stride(0),
        group.a,
        group.a.stride(0),
        group.a_scale,
        planes,
        work.numbers,
        work.room.entries_at,
        work.room.record,
        group.sites[0].index,
        group.a.shape[1],
        D_IN=group.d_in,
        SLICES=slices,
        SPLITS=blocking.splits,
        SPLIT_SIZE=blocking.split_size,
        HAS_SCALES=group.a_scale is not None,
        WIDEN=is_interpreted(),
        num_warps=_SHRINK_WARPS,
        num_stages=1,
        **_overlap(x.device),
    )


def expand(y: torch.Tensor, group: SiteGroup, work: DeviceWork, launch: Launch = launch) -> torch.Tensor:
    """Add to y from the planes; the second."""
    tables = group.layout(GroupTables.of)
    blocking, slices = tables.blocking, len(group.sites)
    planes = work.planes(slices * blocking.splits)
    launch(
        triton_kernels.expand,
        (_programs(y.device, min(work.room.tiles, len(y)) * len(tables.columns)),),
        y,
        y.stride(0),
        group.sites[0].b,
        group.b_scale,
        planes,
        work.numbers,
        work.room.entries_at,
        work.room.record,
        tables.columns,
        group.a.shape[1],
        COLUMN_TILES=len(tables.columns),
        SLICES=slices,
        SPLITS=blocking.splits,
        BLOCK_N=blocking.block_n,
        ALIGN=tables.align,
        IS_EVEN=tables.is_even,
        HAS_SCALES=group.b_scale is not None,
        WIDEN=is_interpreted(),
        num_warps=_EXPAND_WARPS,
        num_stages=1,
        **_overlap(y.device),
    )
    return y


def _programs(device: torch.device, most: int) -> int:
    if device.type != "cuda":
        return min(most, _INTERPRETED_PROGRAMS)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(most, _PROGRAMS_A_PROCESSOR * processors)


def _overlap(device: torch.device) -> dict[str, bool]:
    """How a kernel is compiled and launched for the kernel before it: see `triton_kernels`."""
    overlaps = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"OVERLAPS": overlaps, "launch_pdl": overlaps}
