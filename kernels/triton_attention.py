"""Attention of single queries over a paged cache, in place: for decode steps on a GPU.

PyTorch's own paged attention (`varlen_attn` with `block_table`) wants FlashAttention 3, which PyTorch does not bring:
https://github.com/pytorch/pytorch/pull/175924. A gather before scaled_dot_product_attention copies the cache.

Each row's context is cut into the same number of parts, whatever else is in the step, and the parts are combined in
order: a row's result depends on nothing but the row. What varies from step to step is read from the device, so that a
captured launch serves any contexts.
"""

from __future__ import annotations

import torch
import triton

from weft.kernels import triton_attention_kernels as kernels
from weft.kernels.triton_launch import Launch, is_interpreted, launch

_PARTS = 16
"""Of a context: with 8 KV heads, enough to fill a GPU with one row."""


def attend_paged(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    contexts: torch.Tensor,
    block_tokens: int,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    launch: Launch = launch,
) -> torch.Tensor:
    """softmax(scaling * q k^T) v for one query a row, over its last `window` tokens; 0 for a row without a context.

    query: [heads, T, d] of any strides; keys: [slots, kv_heads, d], values: [slots, kv_heads, d_v], contiguous.
    tables: int32 [width, T], of each row the blocks of its context, one below the other, of `block_tokens` tokens each;
    contexts: int32 [T], tokens that it sees, its own among them, 0 for a row that is none. Returns [T, heads, d_v].
    Softmax and sums run in float32.
    """
    heads, num_rows, dim = query.shape
    kv_heads, value_dim = values.shape[1:]
    group, wide = heads // kv_heads, max(_power(dim), _power(value_dim))
    bytes_a_token = wide * query.element_size()
    block = 64 if bytes_a_token <= 256 else 32 if query.dtype != torch.float32 else 16
    partial = torch.empty(num_rows, heads, _PARTS, value_dim, dtype=torch.float32, device=query.device)
    sums = torch.empty(num_rows, heads, _PARTS, 2, dtype=torch.float32, device=query.device)
    out = torch.empty(num_rows, heads, value_dim, dtype=query.dtype, device=query.device)
    launch(
        kernels.attend_part,
        (num_rows, kv_heads, _PARTS),
        query,
        *query.stride()[:2],
        keys,
        values,
        tables,
        tables.stride(0),
        contexts,
        partial,
        sums,
        scaling,
        softcap or 0.0,
        window or 0,
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_SIZE=_power(group),
        DIM=dim,
        DIM_SIZE=_power(dim),
        VALUE_DIM=value_dim,
        VALUE_SIZE=_power(value_dim),
        BLOCK_TOKENS=block_tokens,
        BLOCK=block,
        PARTS=_PARTS,
        HAS_SOFTCAP=softcap is not None,
        HAS_WINDOW=window is not None,
        WIDEN=is_interpreted(),
        num_warps=4 if query.dtype != torch.float32 else 8,
        num_stages=2,
    )
    launch(
        kernels.combine,
        (num_rows, heads),
        partial,
        sums,
        contexts,
        sinks,
        out,
        window or 0,
        HEADS=heads,
        VALUE_DIM=value_dim,
        VALUE_SIZE=_power(value_dim),
        BLOCK=block,
        PARTS=_PARTS,
        HAS_SINKS=sinks is not None,
        HAS_WINDOW=window is not None,
        num_warps=2,
    )
    return out


def _power(number: int) -> int:
    """The power of two that is at least so large, and what a tensor core takes."""
    return max(16, int(triton.next_power_of_2(number)))
