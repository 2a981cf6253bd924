"""The two Triton kernels of the batched gather-matmul: shrink (x A^T) and expand (the rest), each over a work list.

Both have a fixed grid: programs loop over items whose number is read from the device, so that a captured launch serves
any number of adapters. No item shares a place that it writes to with another one; sums run in an order that depends on
the shape alone. So results repeat bit for bit, and a row's does not depend on what else is in the step.

The layout of `work`, int32, is `kernels.work_list`'s:
header [HEADER]: number of entries, number of tiles
tiles [capacity, TILE_RECORD]: first entry, one past the last, rows [16]
entries [capacity, record], from entries_at on: tile, two pages, 0, rows [16], scales [16] (float32 bits), and the
sites it adds to, one bit each
A row below 0 stands for none. WIDEN has products made in float32 of the same numbers: Triton's interpreter has none of
bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl

HEADER = tl.constexpr(4)
TILE = tl.constexpr(16)
"""Rows of x an item works on, and rank rows: two pages. What tensor cores want at the least."""

ROWS_AT = tl.constexpr(4)
SCALES_AT = tl.constexpr(20)
SITES_AT = tl.constexpr(36)
TILE_RECORD = tl.constexpr(18)


@triton.jit(do_not_specialize=["entries_at", "record"])
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
    sites,
    num_pages,
    D_IN: tl.constexpr,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """planes[entry, slice, split] = x[rows of the tile, part of d_in] (A[pages, part])^T, float32 [16, 16].

    x: [T, d_in]; a: [slices, pages, 8, d_in]; a_scale: float32 [slices, pages, 8], of int8 rows. An item is one
    (entry, slice, split); one at a site that the entry's adapter leaves alone is passed over.
    """
    rank = tl.arange(0, TILE)
    member = tl.arange(0, TILE)
    ks = tl.arange(0, BLOCK_K)
    total = tl.load(work) * (SLICES * SPLITS)
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        split = item % SPLITS
        part = item // SPLITS % SLICES
        entry = work + entries_at + item // (SLICES * SPLITS) * record
        site = tl.load(sites + part)
        is_touched = (tl.load(entry + SITES_AT + site // 32) >> (site % 32)) & 1
        if is_touched != 0:
            rows = tl.load(entry + ROWS_AT + member)
            page_rows = tl.load(entry + 1 + rank // 8).to(tl.int64) * 8 + rank % 8
            a_rows = a + tl.cast(part, tl.int64) * a_slice_stride + page_rows * D_IN
            x_rows = x + rows.to(tl.int64) * x_stride
            begin = split * SPLIT_SIZE
            made = tl.zeros((TILE, TILE), tl.float32)
            for start in range(0, SPLIT_SIZE, BLOCK_K):
                k = begin + start + ks
                if D_IN % SPLIT_SIZE == 0:
                    x_part = tl.load(x_rows[:, None] + k[None, :], mask=rows[:, None] >= 0, other=0.0)
                    a_part = tl.load(a_rows[:, None] + k[None, :])
                else:
                    inside = (k < D_IN)[None, :]
                    x_part = tl.load(x_rows[:, None] + k[None, :], mask=(rows[:, None] >= 0) & inside, other=0.0)
                    a_part = tl.load(a_rows[:, None] + k[None, :], mask=inside, other=0)
                if WIDEN:
                    x_part, a_part = x_part.to(tl.float32), a_part.to(tl.float32)
                else:
                    a_part = a_part.to(x_part.dtype)
                made = tl.dot(x_part, tl.trans(a_part), made, input_precision="ieee")
            if HAS_SCALES:
                made *= tl.load(a_scale + tl.cast(part, tl.int64) * num_pages * 8 + page_rows)[None, :]
            plane = planes + tl.cast(item, tl.int64) * (TILE * TILE)
            tl.store(plane + member[:, None] * TILE + rank[None, :], made, mask=rows[:, None] >= 0)


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
    sites,
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
):
    """y[rows, columns] += sum over the tile's entries of  scale * (sum of the splits' planes) B[pages, columns].

    y: [T, columns of all slices]; b: all rows B of the group; b_scale: float32 [slices, pages, 8], of int8 rows;
    columns: int64 [COLUMN_TILES, 5], of each: slice, first column in y, where its first page row begins in b, how
    many columns, elements between two page rows. ALIGN divides all of these that are places. An item is one (tile,
    column tile). y is read and written once.
    """
    rank = tl.arange(0, TILE)
    member = tl.arange(0, TILE)
    ns = tl.arange(0, BLOCK_N)
    total = tl.load(work + 1) * COLUMN_TILES
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        tile = work + HEADER + item // COLUMN_TILES * TILE_RECORD
        column = columns + item % COLUMN_TILES * 5
        part = tl.load(column).to(tl.int32)
        y_at = tl.multiple_of(tl.load(column + 1), ALIGN)
        b_at = tl.multiple_of(tl.load(column + 2), ALIGN)
        b_stride = tl.multiple_of(tl.load(column + 4), ALIGN)
        inside = ns < tl.load(column + 3)
        site = tl.load(sites + part)
        first = tl.load(tile)
        last = tl.load(tile + 1)
        rows = tl.load(tile + 2 + member)
        is_touched = first * 0
        made = tl.zeros((TILE, BLOCK_N), tl.float32)
        for index in range(first, last):
            entry = work + entries_at + index * record
            touches = (tl.load(entry + SITES_AT + site // 32) >> (site % 32)) & 1
            is_touched = is_touched | touches
            page_rows = tl.load(entry + 1 + rank // 8).to(tl.int64) * 8 + rank % 8
            here = b + b_at + page_rows[:, None] * b_stride + ns[None, :]
            if IS_EVEN:
                b_part = tl.load(here, mask=touches != 0, other=0)
            else:
                b_part = tl.load(here, mask=(touches != 0) & inside[None, :], other=0)
            scales = tl.load(entry + SCALES_AT + member).to(tl.float32, bitcast=True)
            plane = planes + tl.cast(index * SLICES + part, tl.int64) * (SPLITS * TILE * TILE)
            plane = plane + member[:, None] * TILE + rank[None, :]
            wanted = (rows[:, None] >= 0) & (touches != 0)
            shrunk = tl.zeros((TILE, TILE), tl.float32)
            for split in tl.static_range(SPLITS):
                shrunk += tl.load(plane + split * (TILE * TILE), mask=wanted, other=0.0)
            shrunk *= scales[:, None]
            if HAS_SCALES:
                b_scales = b_scale + tl.cast(part, tl.int64) * num_pages * 8 + page_rows
                shrunk *= tl.load(b_scales, mask=(rank >= 0) & (touches != 0), other=0.0)[None, :]
            # Nearly float32's precision: the left factor goes in two parts that a tensor core takes exactly. Whole
            # numbers and bfloat16 go as bfloat16, which has float32's range; float16 has not, and goes as TF32.
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
        if is_touched != 0:
            y_here = y + rows.to(tl.int64)[:, None] * y_stride + y_at + ns[None, :]
            mask = (rows[:, None] >= 0) & inside[None, :]
            if IS_EVEN:
                mask = rows[:, None] >= 0
            before = tl.load(y_here, mask=mask, other=0.0).to(tl.float32)
            tl.store(y_here, (before + made).to(y.dtype.element_ty), mask=mask)
