"""Attention of a decode step's rows over the paged cache, from tensors of fixed places: what a captured step calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from weft.server.engine.gathering import attend
from weft.server.engine.step import AttentionOptions


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Where each row of a step finds its context.

    tables: int32 [width, T], its blocks, one below the other; contexts: int32 [T], tokens it sees, its own among them,
    0 for a row that is none. block_tokens: tokens a block.
    """

    tables: torch.Tensor
    contexts: torch.Tensor
    block_tokens: int


DecodeAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, DecodeRows, AttentionOptions], torch.Tensor]
"""query [heads, T, d], keys [slots, kv_heads, d], values [slots, kv_heads, d_v] -> [T, heads, d_v]."""


def attend_in_place(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: DecodeRows, options: AttentionOptions
) -> torch.Tensor:
    """By Triton, without a copy of the cache."""
    from weft.kernels.triton_attention import attend_paged  # noqa: PLC0415 - Triton is not everywhere

    return attend_paged(
        query,
        keys,
        values,
        rows.tables,
        rows.contexts,
        rows.block_tokens,
        scaling=options.scaling if options.scaling is not None else query.shape[-1] ** -0.5,
        window=options.window,
        softcap=options.softcap,
        sinks=options.sinks,
    )


def attend_gathered(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: DecodeRows, options: AttentionOptions
) -> torch.Tensor:
    """By PyTorch, over a copy of every block that a table has room for: its cost is that of the longest context."""
    heads, num_rows, dim = query.shape
    blocks = rows.tables.t().long()
    key, value = (
        cache.view(-1, rows.block_tokens, *cache.shape[1:])[blocks].flatten(1, 2).transpose(1, 2)
        for cache in (keys, values)
    )
    at = torch.arange(key.shape[2], device=query.device)
    contexts = rows.contexts.clamp(min=1)[:, None]
    visible = at < contexts
    if options.window is not None:
        visible = visible & (at >= contexts - options.window)
    kv_heads = heads if options.sinks is not None else key.shape[1]
    packed = query.transpose(0, 1).reshape(num_rows, kv_heads, heads // kv_heads, dim)
    return attend(packed, key, value, visible[:, None, None], options).reshape(num_rows, heads, -1)
