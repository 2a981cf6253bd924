"""Blocks of the KV cache: who holds which, and which are kept for later. Bookkeeping; the tensors: `kv_cache.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class BlockPool:
    """Blocks 1 … num_blocks - 1 of `block_tokens` tokens each. Block 0 stays zero for ever: it pads block tables.

    A block is free, held, or idle: published under a key, and held by nobody. A published block never changes and may
    have several holders. Idle blocks are given out like free ones, but last, the one longest idle first; their keys are
    forgotten then.
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._free = list(range(num_blocks - 1, 0, -1))
        self._holders: dict[int, int] = {}
        self._idle: dict[int, None] = {}
        self._keys: dict[int, bytes] = {}
        self._published: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds: the free and the idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_published(self) -> int:
        return len(self._published)

    @property
    def capacity(self) -> int:
        """Blocks that sequences can hold in all."""
        return self.num_blocks - 1

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_tokens)

    def can_allocate(self, count: int, beside: Sequence[int] = (), without: Iterable[Sequence[int]] = ()) -> bool:
        """Whether `count` blocks could be taken once those of `beside`, which are published, are held.

        without: what some that hold blocks would have given up by then.
        """
        given_up = Counter(block for blocks in without for block in blocks)
        freed = {block for block, num_holders in given_up.items() if num_holders == self._holders[block]}
        return count + sum(block in self._idle or block in freed for block in beside) <= self.num_free + len(freed)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; the caller has asked `can_allocate`."""
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        self._holders.update(dict.fromkeys(blocks, 1))
        return blocks

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The published blocks of the longest run of known keys from the first on; they must be held to be kept."""
        blocks: list[int] = []
        for key in keys:
            block = self._published.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def hold(self, blocks: Iterable[int]) -> None:
        """Be one more holder of published blocks."""
        for block in blocks:
            self._idle.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1

    def publish(self, block: int, key: bytes) -> None:
        """Make a held block, which is full and changes no more, known by its key; the first one under a key stays."""
        if key not in self._published:
            self._published[key] = block
            self._keys[block] = key

    def unpublished(self, blocks: Iterable[int]) -> list[int]:
        """Those that are known by no key, so that they have one holder."""
        return [block for block in blocks if block not in self._keys]

    def free(self, blocks: Sequence[int]) -> None:
        """Hold blocks no more. Of published ones the last is given out again first: a prefix needs its head."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if block in self._keys:
                self._idle[block] = None
            else:
                self._free.append(block)

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Audit: every block is free, idle or held, as often as `held` says. Raises AssertionError."""
        holders: Counter[int] = Counter()
        for blocks in held:
            assert len(blocks) == len(set(blocks)), "a block is held twice by one"
            holders.update(blocks)
        assert holders == self._holders, "the holders of a block are not those that it counts"
        assert all(count == 1 or block in self._keys for block, count in holders.items()), "a private block is shared"
        assert len(self._free) == len(set(self._free)), "a block is free twice"
        assert set(self._free).isdisjoint(self._keys), "a free block has a key"
        assert self._published == {key: block for block, key in self._keys.items()}, "a key leads to another block"
        assert set(self._keys) == set(self._idle) | (set(self._keys) & set(holders)), "a published block is lost"
        assert set(self._idle).isdisjoint(holders), "a block is both idle and held"
        assert set(holders).isdisjoint(self._free), "a block is both free and held"
        assert set(holders) | set(self._free) | set(self._idle) == set(range(1, self.num_blocks)), "a block is lost"

    def _evict(self) -> int:
        block = next(iter(self._idle))
        del self._idle[block]
        del self._published[self._keys.pop(block)]
        return block
