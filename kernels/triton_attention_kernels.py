"""The two Triton kernels of `triton_attention`: one part of one row's context, and the parts' combination."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["table_stride", "window"])
def attend_part(
    query,
    head_stride,
    row_stride,
    keys,
    values,
    tables,
    table_stride,
    contexts,
    partial,
    sums,
    scaling,
    softcap,
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_SIZE: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """For the heads of one KV head: sum of exp(score - peak) v over the part, float32 [T, heads, PARTS, VALUE_DIM].

    sums: float32 [T, heads, PARTS, 2], peak and sum of exp(score - peak). A part without tokens writes nothing.
    """
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    context = tl.load(contexts + row)
    start = context * 0
    if HAS_WINDOW:
        start = tl.maximum(context - window, 0)
    size = tl.cdiv(tl.cdiv(context - start, PARTS), BLOCK) * BLOCK
    begin = start + part * size
    end = tl.minimum(begin + size, context)
    if begin < end:
        member = tl.arange(0, GROUP_SIZE)
        dims = tl.arange(0, DIM_SIZE)
        value_dims = tl.arange(0, VALUE_SIZE)
        tokens = tl.arange(0, BLOCK)
        head = kv_head * GROUP + member
        queries = query + row.to(tl.int64) * row_stride + head.to(tl.int64)[:, None] * head_stride + dims[None, :]
        q = tl.load(queries, mask=(member < GROUP)[:, None] & (dims < DIM)[None, :], other=0.0)
        peak = tl.full((GROUP_SIZE,), float("-inf"), tl.float32)
        total = tl.zeros((GROUP_SIZE,), tl.float32)
        made = tl.zeros((GROUP_SIZE, VALUE_SIZE), tl.float32)
        for at in range(begin, end, BLOCK):
            token = at + tokens
            inside = token < end
            block = tl.load(tables + (token // BLOCK_TOKENS).to(tl.int64) * table_stride + row, mask=inside, other=0)
            slot = (block.to(tl.int64) * BLOCK_TOKENS + token % BLOCK_TOKENS) * KV_HEADS + kv_head
            k = tl.load(
                keys + slot[:, None] * DIM + dims[None, :], mask=inside[:, None] & (dims < DIM)[None, :], other=0.0
            )
            v = tl.load(
                values + slot[:, None] * VALUE_DIM + value_dims[None, :],
                mask=inside[:, None] & (value_dims < VALUE_DIM)[None, :],
                other=0.0,
            )
            if WIDEN:
                q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
            if HAS_SOFTCAP:
                scores = (2 * tl.sigmoid(2 * scores / softcap) - 1) * softcap
            scores = tl.where(inside[None, :], scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, 1))
            weights = tl.exp(scores - higher[:, None])
            shrink = tl.exp(peak - higher)
            total = total * shrink + tl.sum(weights, 1)
            made = tl.dot(weights.to(v.dtype), v, made * shrink[:, None], input_precision="ieee")
            peak = higher
        at_part = ((row.to(tl.int64) * KV_HEADS * GROUP + head) * PARTS + part).to(tl.int64)
        mine = member < GROUP
        tl.store(
            partial + at_part[:, None] * VALUE_DIM + value_dims[None, :],
            made,
            mask=mine[:, None] & (value_dims < VALUE_DIM)[None, :],
        )
        tl.store(sums + at_part * 2, peak, mask=mine)
        tl.store(sums + at_part * 2 + 1, total, mask=mine)


@triton.jit(do_not_specialize=["window"])
def combine(
    partial,
    sums,
    contexts,
    sinks,
    out,
    window,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """out[row, head] = the parts' sums over their total, a head's sink counted in; 0 where the row has no context."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    parts = tl.arange(0, PARTS)
    dims = tl.arange(0, VALUE_SIZE)
    length = tl.load(contexts + row)
    if HAS_WINDOW:
        length = tl.minimum(length, window)
    size = tl.cdiv(tl.cdiv(length, PARTS), BLOCK) * BLOCK
    there = parts * size < length
    at_part = (row.to(tl.int64) * HEADS + head) * PARTS + parts
    peaks = tl.load(sums + at_part * 2, mask=there, other=float("-inf"))
    totals = tl.load(sums + at_part * 2 + 1, mask=there, other=0.0)
    made = tl.load(
        partial + at_part[:, None] * VALUE_DIM + dims[None, :],
        mask=there[:, None] & (dims < VALUE_DIM)[None, :],
        other=0.0,
    )
    peak = tl.max(peaks, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        peak = tl.maximum(peak, sink)
    if length == 0:
        peak = 0.0
    weights = tl.where(there, tl.exp(peaks - peak), 0.0)
    total = tl.sum(totals * weights, 0)
    if HAS_SINKS:
        total += tl.exp(sink - peak)
    if length == 0:
        total = 1.0
    result = tl.sum(made * weights[:, None], 0) / total
    place = out + (row.to(tl.int64) * HEADS + head) * VALUE_DIM + dims
    tl.store(place, result.to(out.dtype.element_ty), mask=dims < VALUE_DIM)
