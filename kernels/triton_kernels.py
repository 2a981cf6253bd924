"""The two Triton kernels of the batched gather-matmul: shrink (x A^T) and expand (the rest), each over a work list.

Both have a fixed grid: programs loop over items whose number is read from the device, so that a captured launch serves
any number of adapters. No item shares a place that it writes to with another one; sums run in an order that depends on
the shape alone. So results repeat bit for bit, and a row's does not depend on rows that use other adapters. A tile of
one row, which distinct adapters make of every row of a decode step, is done without tensor cores: the fifteen rows that
are none would be most of the work.

The layout of `work`, int32, is `kernels.work_list`'s:
header [HEADER]: number of entries, number of tiles
tiles [capacity, TILE_RECORD]: first entry, one past the last, rows [16]
entries [capacity, record], from entries_at on: tile, two pages, 0, rows [16], scales [16] (float32 bits), and the
sites it adds to, one bit each
A row below 0 stands for none. WIDEN has products made in float32 of the same numbers: Triton's interpreter has none of
bfloat16.

OVERLAPS, on GPUs that have it (programmatic dependent launch, compute capability 9): a kernel begins while the one
before it ends, reads its work and what is never written by a step, and waits for the other to be done before it reads
anything else. Every program waits, one without work, too: who waits for this kernel waits for all before it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

HEADER = tl.constexpr(4)
TILE = tl.constexpr(16)
"""Rows of x an item works on, and rank rows: two pages. What tensor cores want at the least."""

ROWS_AT = tl.constexpr(4)
SCALES_AT = tl.constexpr(20)
SITES_AT = tl.constexpr(36)
TILE_RECORD = tl.constexpr(18)


@triton.jit(do_not_specialize=["entries_at", "record", "first_site"])
def shrink(
    x,
    x_stride,
    a,
    a_slice_stride,
    a_scale,
    planes,
    work,
    entries_at,
    record,
    first_site,
    num_pages,
    D_IN: tl.constexpr,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_SIZE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    WIDEN: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """planes[entry, slice, split] = x[rows of the tile, part of d_in] (A[pages, part])^T, float32 [16, 16].

    x: [T, d_in]; a: [slices, pages, 8, d_in]; a_scale: float32 [slices, pages, 8], of int8 rows; slice i is the site
    first_site + i. An item is one (entry, slice, split); one at a site that the entry's adapter leaves alone is passed
    over.
    """
    rank = tl.arange(0, TILE)
    member = tl.arange(0, TILE)
    ks = tl.arange(0, SPLIT_SIZE)
    if OVERLAPS:
        gdc_launch_dependents()
    total = tl.load(work) * (SLICES * SPLITS)
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        split = item % SPLITS
        part = item // SPLITS % SLICES
        entry = work + entries_at + item // (SLICES * SPLITS) * record
        site = first_site + part
        is_touched = (tl.load(entry + SITES_AT + site // 32) >> (site % 32)) & 1
        rows = tl.load(entry + ROWS_AT + member)
        page_rows = tl.load(entry + 1 + rank // 8).to(tl.int64) * 8 + rank % 8
        if is_touched != 0:
            a_rows = a + tl.cast(part, tl.int64) * a_slice_stride + page_rows * D_IN
            k = split * SPLIT_SIZE + ks
            if D_IN % SPLIT_SIZE == 0:
                inside = tl.full((SPLIT_SIZE,), True, tl.int1)
                a_part = tl.load(a_rows[:, None] + k[None, :])
            else:
                inside = k < D_IN
                a_part = tl.load(a_rows[:, None] + k[None, :], mask=inside[None, :], other=0)
            a_scales = _row_scales(a_scale, part, num_pages, page_rows, is_touched, HAS_SCALES)
            plane = planes + tl.cast(item, tl.int64) * (TILE * TILE)
            x_rows = x + rows.to(tl.int64) * x_stride
            if OVERLAPS:
                gdc_wait()
            if tl.load(entry + ROWS_AT + 1) < 0:
                x_row = tl.load(x + tl.load(entry + ROWS_AT).to(tl.int64) * x_stride + k, mask=inside, other=0.0)
                made_row = tl.sum(a_part.to(tl.float32) * x_row.to(tl.float32)[None, :], axis=1)
                tl.store(plane + rank, made_row * a_scales)
            else:
                wanted = (rows[:, None] >= 0) & inside[None, :]
                x_part = tl.load(x_rows[:, None] + k[None, :], mask=wanted, other=0.0)
                if WIDEN:
                    made = tl.dot(x_part.to(tl.float32), tl.trans(a_part.to(tl.float32)), input_precision="ieee")
                else:
                    made = tl.dot(x_part, tl.trans(a_part.to(x_part.dtype)), input_precision="ieee")
                made *= a_scales[None, :]
                tl.store(plane + member[:, None] * TILE + rank[None, :], made, mask=rows[:, None] >= 0)
    if OVERLAPS:
        gdc_wait()


@triton.jit(do_not_specialize=["entries_at", "record"])
def expand(
    y,
    y_stride,
    b,
    b_scale,
    planes,
    work,
    entries_at,
    record,
    columns,
    num_pages,
    COLUMN_TILES: tl.constexpr,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
    IS_EVEN: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    WIDEN: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """y[rows, columns] += sum over the tile's entries of  scale * (sum of the splits' planes) B[pages, columns].

    y: [T, columns of all slices]; b: all rows B of the group; b_scale: float32 [slices, pages, 8], of int8 rows;
    columns: int64 [COLUMN_TILES, 6], of each: slice, first column in y, where its first page row begins in b, how
    many columns, elements between two page rows, site. ALIGN divides all of these that are places. An item is one
    (tile, column tile). y is read and written once.
    """
    rank = tl.arange(0, TILE)
    member = tl.arange(0, TILE)
    ns = tl.arange(0, BLOCK_N)
    total = tl.load(work + 1) * COLUMN_TILES
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        tile = work + HEADER + item // COLUMN_TILES * TILE_RECORD
        column = columns + item % COLUMN_TILES * 6
        part = tl.load(column).to(tl.int32)
        y_at = tl.multiple_of(tl.load(column + 1), ALIGN)
        b_at = tl.multiple_of(tl.load(column + 2), ALIGN)
        b_stride = tl.multiple_of(tl.load(column + 4), ALIGN)
        inside = (ns < tl.load(column + 3)) | IS_EVEN
        site = tl.load(column + 5).to(tl.int32)
        first = tl.load(tile)
        last = tl.load(tile + 1)
        rows = tl.load(tile + 2 + member)
        if OVERLAPS:
            gdc_wait()
        is_touched = first * 0
        if tl.load(tile + 3) < 0:
            made_row = tl.zeros((BLOCK_N,), tl.float32)
            for index in range(first, last):
                entry = work + entries_at + index * record
                touches = (tl.load(entry + SITES_AT + site // 32) >> (site % 32)) & 1
                is_touched = is_touched | touches
                page_rows = tl.load(entry + 1 + rank // 8).to(tl.int64) * 8 + rank % 8
                b_part = _load_b(b + b_at, page_rows, b_stride, ns, inside, touches)
                plane = planes + tl.cast(index * SLICES + part, tl.int64) * (SPLITS * TILE * TILE) + rank
                shrunk_row = tl.zeros((TILE,), tl.float32)
                for split in tl.static_range(SPLITS):
                    shrunk_row += tl.load(plane + split * (TILE * TILE), mask=(rank >= 0) & (touches != 0), other=0.0)
                shrunk_row *= tl.load(entry + SCALES_AT).to(tl.float32, bitcast=True)
                shrunk_row *= _row_scales(b_scale, part, num_pages, page_rows, touches, HAS_SCALES)
                made_row += tl.sum(shrunk_row[:, None] * b_part.to(tl.float32), axis=0)
            if is_touched != 0:
                _add(y + tl.load(tile + 2).to(tl.int64) * y_stride + y_at + ns, made_row, inside)
        else:
            made = tl.zeros((TILE, BLOCK_N), tl.float32)
            for index in range(first, last):
                entry = work + entries_at + index * record
                touches = (tl.load(entry + SITES_AT + site // 32) >> (site % 32)) & 1
                is_touched = is_touched | touches
                page_rows = tl.load(entry + 1 + rank // 8).to(tl.int64) * 8 + rank % 8
                b_part = _load_b(b + b_at, page_rows, b_stride, ns, inside, touches)
                plane = planes + tl.cast(index * SLICES + part, tl.int64) * (SPLITS * TILE * TILE)
                plane = plane + member[:, None] * TILE + rank[None, :]
                wanted = (rows[:, None] >= 0) & (touches != 0)
                shrunk = tl.zeros((TILE, TILE), tl.float32)
                for split in tl.static_range(SPLITS):
                    shrunk += tl.load(plane + split * (TILE * TILE), mask=wanted, other=0.0)
                shrunk *= tl.load(entry + SCALES_AT + member).to(tl.float32, bitcast=True)[:, None]
                shrunk *= _row_scales(b_scale, part, num_pages, page_rows, touches, HAS_SCALES)[None, :]
                made = _add_product(made, shrunk, b_part, WIDEN)
            if is_touched != 0:
                y_here = y + rows.to(tl.int64)[:, None] * y_stride + y_at + ns[None, :]
                _add(y_here, made, (rows[:, None] >= 0) & inside[None, :])
    if OVERLAPS:
        gdc_wait()


@triton.jit
def _row_scales(scales, part, num_pages, page_rows, touches, HAS_SCALES: tl.constexpr):
    """What each of the pages' rows is multiplied by, float32 [16]: 1 where they are not of int8."""
    made = tl.full((TILE,), 1.0, tl.float32)
    if HAS_SCALES:
        at = scales + tl.cast(part, tl.int64) * num_pages * 8 + page_rows
        made = tl.load(at, mask=(page_rows >= 0) & (touches != 0), other=0.0)
    return made


@triton.jit
def _load_b(b, page_rows, b_stride, ns, inside, touches):
    """B[pages, columns] of one slice, zeros where the entry leaves it alone."""
    here = b + page_rows[:, None] * b_stride + ns[None, :]
    return tl.load(here, mask=(touches != 0) & inside[None, :], other=0)


@triton.jit
def _add_product(made, shrunk, b_part, WIDEN: tl.constexpr):
    """made + shrunk b_part, nearly in float32's precision: shrunk goes in two parts that a tensor core takes exactly.

    Whole numbers and bfloat16 go as bfloat16, which has float32's range; float16 has not, and goes as TF32.
    """
    if b_part.dtype == tl.float32:
        made = tl.dot(shrunk, b_part, made, input_precision="ieee")
    elif b_part.dtype == tl.float16:
        high = (shrunk.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        made = tl.dot(high, b_part.to(tl.float32), made, input_precision="tf32")
        made = tl.dot(shrunk - high, b_part.to(tl.float32), made, input_precision="tf32")
    else:
        high = shrunk.to(tl.bfloat16)
        low = (shrunk - high.to(tl.float32)).to(tl.bfloat16)
        if WIDEN:
            high, low, b_part = high.to(tl.float32), low.to(tl.float32), b_part.to(tl.float32)
        else:
            b_part = b_part.to(tl.bfloat16)
        made = tl.dot(high, b_part, made)
        made = tl.dot(low, b_part, made)
    return made


@triton.jit
def _add(y, made, mask):
    """y += made, rounded once."""
    before = tl.load(y, mask=mask, other=0.0).to(tl.float32)
    tl.store(y, (before + made).to(y.dtype.element_ty), mask=mask)
