"""Blocks of the KV cache: who holds which. Plain bookkeeping; the tensors live in `attention.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class BlockPool:
    """Blocks 1 … num_blocks - 1 of `block_tokens` tokens each. Block 0 stays zero for ever: it pads block tables."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._free = list(range(num_blocks - 1, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Blocks that sequences can hold in all."""
        return self.num_blocks - 1

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_tokens)

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; the caller has asked `can_allocate`."""
        return [self._free.pop() for _ in range(count)]

    def free(self, blocks: Sequence[int]) -> None:
        self._free.extend(reversed(blocks))

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Audit: every block is free or held by exactly one of `held`. Raises AssertionError."""
        owned = [block for blocks in held for block in blocks]
        assert len(owned) == len(set(owned)), "a block has two owners"
        assert len(self._free) == len(set(self._free)), "a block is free twice"
        assert set(owned).isdisjoint(self._free), "a block is both free and held"
        assert set(owned) | set(self._free) == set(range(1, self.num_blocks)), "a block is lost"
