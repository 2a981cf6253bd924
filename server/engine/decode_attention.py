"""Attention of single rows over the paged cache, on a GPU: from tensors of fixed places, as captured steps need it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch

from weft.server.engine.batch import Batch
from weft.server.engine.gathering import Gathering, attend
from weft.server.engine.kv_cache import KvCache
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


class InPlaceDecodes(Gathering):
    """A step that is run as it comes: decode rows in place, as in a captured step, and chunks over copies."""

    def __init__(self, batch: Batch, cache: KvCache) -> None:
        super().__init__(batch, cache)
        rows = [row for row, _, _ in batch.decodes]
        device = batch.input_ids.device
        self._rows: torch.Tensor | slice = slice(None)
        if rows != list(range(batch.num_tokens)):
            self._rows = torch.tensor(rows, dtype=torch.int64, device=device)
        used = [blocks[: -(-context // batch.block_tokens)] for _, context, blocks in batch.decodes]
        tables = numpy.zeros((max(map(len, used), default=0), len(rows)), dtype=numpy.int32)
        for column, blocks in enumerate(used):
            tables[: len(blocks), column] = blocks
        contexts = torch.tensor([context for _, context, _ in batch.decodes], dtype=torch.int32, device=device)
        self._where = DecodeRows(torch.from_numpy(tables).to(device), contexts, batch.block_tokens)

    def attend_decodes(
        self,
        out: torch.Tensor,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        options: AttentionOptions,
    ) -> None:
        if len(self._where.contexts):
            out[self._rows] = attend_in_place(query[:, self._rows], keys, values, self._where, options)
