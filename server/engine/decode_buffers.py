"""What a captured decode step reads: one buffer of fixed places on the device, and its twin in host memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from weft.server.engine.batch import Batch
from weft.server.engine.decode_attention import DecodeRows
from weft.server.engine.kv_cache import KvCache


class DecodeBuffers:
    """The numbers of up to `max_rows` rows, each a sequence's next token.

    ids, positions, slots: int64 [max_rows]; contexts: int32 [max_rows]; tables: int32 [width, max_rows]. Each step
    copies them in one go, the tables as deep as its longest needs them.
    """

    def __init__(self, max_rows: int, width: int, cache: KvCache, device: torch.device) -> None:
        self.max_rows = max_rows
        self.width = width
        self._block_tokens = cache.block_tokens
        self._spare_slot = cache.spare_slot
        size = max_rows * (7 + width)
        pinned = device.type == "cuda"
        self._staging = torch.zeros(size, dtype=torch.int32, pin_memory=pinned)
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]
        self._host = _Parts.of(self._staging, max_rows)
        self.parts = _Parts.of(self._device, max_rows)
        self._tables = self._host.tables.numpy()
        self._known: list[list[int]] = [[] for _ in range(max_rows)]
        self.clear()

    def clear(self) -> None:
        """Rows that see nothing, all of them."""
        self._pad(0)
        self._copy(0)

    def load(self, batch: Batch) -> None:
        """Take over a step's rows."""
        if self._copied is not None:
            self._copied.synchronize()  # of the step before: long past
        n = batch.num_tokens
        self._host.ids[:n] = batch.input_ids[0]
        self._host.positions[:n] = batch.positions[0]
        self._host.slots[:n] = batch.slots
        contexts = self._host.contexts.numpy()
        depth = 0
        for row, context, blocks in _rows(batch):
            contexts[row] = context
            used = -(-context // self._block_tokens)
            depth = max(depth, used)
            self._put(row, blocks[:used])
        self._pad(n)
        self._copy(depth)
        if batch.fed is not None:
            self.parts.ids[:n].copy_(batch.fed)

    def rows(self, count: int) -> DecodeRows:
        """The first rows' contexts."""
        return DecodeRows(self.parts.tables[:, :count], self.parts.contexts[:count], self._block_tokens)

    def _put(self, row: int, blocks: list[int]) -> None:
        """A row's table; as a rule, what is there already and perhaps one more block."""
        known = self._known[row]
        if blocks[: len(known)] != known:
            known = []
        if len(blocks) > len(known):
            self._tables[len(known) : len(blocks), row] = blocks[len(known) :]
        self._known[row] = blocks

    def _pad(self, first: int) -> None:
        self._host.ids[first:] = 0
        self._host.positions[first:] = 0
        self._host.slots[first:] = self._spare_slot
        self._host.contexts[first:] = 0

    def _copy(self, depth: int) -> None:
        upto = self.max_rows * (7 + depth)
        self._device[:upto].copy_(self._staging[:upto], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


@dataclass(frozen=True, slots=True)
class _Parts:
    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    contexts: torch.Tensor
    tables: torch.Tensor

    @classmethod
    def of(cls, numbers: torch.Tensor, rows: int) -> _Parts:
        """Views of an int32 array of rows * (7 + width) numbers."""
        ids, positions, slots = numbers[: 6 * rows].view(torch.int64).view(3, rows)
        return cls(ids, positions, slots, numbers[6 * rows : 7 * rows], numbers[7 * rows :].view(-1, rows))


def _rows(batch: Batch) -> Iterator[tuple[int, int, list[int]]]:
    """Each row: its index, the tokens it sees, and the blocks that hold them."""
    yield from batch.decodes
    for chunk in batch.chunks:
        blocks = chunk.blocks.tolist()
        for i in range(chunk.num_tokens):
            yield chunk.start + i, chunk.context - chunk.num_tokens + 1 + i, blocks
