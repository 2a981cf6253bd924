"""Attention by PyTorch: over copies of a paged cache's blocks, and over a whole prompt.

The maths is scaled_dot_product_attention, or the same written out where a model wants soft-capped scores or attention
sinks.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from weft.server.engine.batch import Batch, Chunk, DecodeGroup
from weft.server.engine.kv_cache import KvCache
from weft.server.engine.step import AttentionOptions


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    options: AttentionOptions,
    *,
    causal: bool = False,
) -> torch.Tensor:
    """softmax(scaling * q k^T) v with grouped queries.

    query: [n, heads, q, d], key: [n, kv_heads, k, d], value: [n, kv_heads, k, d_v]; mask: bool, broadcast to
    [n, 1, q, k], True where a query sees a key. Returns [n, heads, q, d_v].
    """
    if options.softcap is None and options.sinks is None:
        grouped = key.shape[1] != query.shape[1]
        return scaled_dot_product_attention(
            query, key, value, mask, is_causal=causal, scale=options.scaling, enable_gqa=grouped
        )
    return _attend_written_out(query, key, value, _causal_mask(query, key) if causal else mask, options)


def _causal_mask(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    num_queries, num_keys = query.shape[2], key.shape[2]
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)


def _attend_written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    options: AttentionOptions,
) -> torch.Tensor:
    """As `attend`, with soft cap (Gemma 2) and sinks (gpt-oss), softmax in float32."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (options.scaling if options.scaling is not None else query.shape[-1] ** -0.5)
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    scores = scores.float()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return weights.to(value.dtype) @ value


class Gathering:
    """A step over copies of the blocks that it sees: decodes of similar length together, chunks one by one."""

    def __init__(self, batch: Batch, cache: KvCache) -> None:
        self._batch = batch
        self._cache = cache
        self._masks: dict[tuple[int, int | None], torch.Tensor | None] = {}

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        keys, values = self._cache.layers[layer]
        keys.index_copy_(0, self._batch.slots, key.transpose(0, 1))
        values.index_copy_(0, self._batch.slots, value.transpose(0, 1))
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
        self.attend_decodes(out, query, keys, values, options)
        for chunk in self._batch.chunks:
            rows = slice(chunk.start, chunk.start + chunk.num_tokens)
            out[rows] = self._chunk(query[:, rows], keys, values, chunk, options)
        return out

    def attend_decodes(
        self,
        out: torch.Tensor,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        options: AttentionOptions,
    ) -> None:
        """Fill the decode rows of out [T, heads, d_v]."""
        for group in self._batch.decode_groups(options.window):
            rows = slice(None) if group.rows is None else group.rows
            out[rows] = self._decode(query[:, rows], keys, values, group, options)

    def _decode(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        group: DecodeGroup,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """query: [heads, n, d] -> [n, heads, d_v]: one query a sequence.

        Without sinks, the query heads of one KV head stand in for a sequence of queries: no key is repeated.
        """
        heads, n, dim = query.shape
        key = self._cache.read(keys, group.blocks).transpose(1, 2)
        value = self._cache.read(values, group.blocks).transpose(1, 2)
        by_row = query.transpose(0, 1)
        kv_heads = heads if options.sinks is not None else key.shape[1]
        packed = by_row.reshape(n, kv_heads, heads // kv_heads, dim)
        return attend(packed, key, value, group.visible, options).reshape(n, heads, -1)

    def _chunk(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        chunk: Chunk,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """query: [heads, n, d] -> [n, heads, d_v]: some tokens of one sequence, over all of it so far."""
        key = self._cache.read(keys, chunk.blocks)[: chunk.context].transpose(0, 1)[None]
        value = self._cache.read(values, chunk.blocks)[: chunk.context].transpose(0, 1)[None]
        mask = self._mask(chunk, options)
        causal = mask is None and options.causal
        return attend(query[None], key, value, mask, options, causal=causal)[0].transpose(0, 1)

    def _mask(self, chunk: Chunk, options: AttentionOptions) -> torch.Tensor | None:
        """What a chunk's rows see, made once for all layers of a kind; None where causality alone says it, or all."""
        key = (chunk.start, options.window)
        if key not in self._masks:
            whole = chunk.num_tokens == chunk.context
            windowed = options.window is not None and chunk.context > options.window
            plain = whole and not windowed
            self._masks[key] = None if plain else _chunk_mask(chunk, options, self._batch.slots.device)
        return self._masks[key]


def _chunk_mask(chunk: Chunk, options: AttentionOptions, device: torch.device) -> torch.Tensor:
    """bool [n, context]: query i of the chunk sees the tokens up to its own, or all, those in the window of them."""
    queries = torch.arange(chunk.context - chunk.num_tokens, chunk.context, device=device)[:, None]
    keys = torch.arange(chunk.context, device=device)[None, :]
    window = chunk.context if options.window is None else options.window
    return (keys > queries - window) & (keys < queries + (1 if options.causal else window))
