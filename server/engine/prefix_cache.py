"""What a sequence need not compute, because its beginning was computed before or is being computed just now.

A block is known by the SHA-256 of all that its content depends on: the blocks before it, its tokens, and the adapters
at work in it by the digest of their content and their weights in the mix. Names are not in it, so a name that moves to
new content finds nothing of the old. An activated LoRA counts from its invocation on: what comes before is the base's.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable

from weft.server.engine.kv_blocks import BlockPool
from weft.server.engine.sequence import Sequence


class PrefixCache:
    """Finds published blocks for sequences that begin, and publishes what they computed.

    Only full blocks are shared, and only those from which finite logits were seen to come: at the end of each chunk of
    a prompt. Of two sequences that begin alike, the second waits while the first computes what both need, no longer,
    and only if that is at least half of its own work.
    """

    def __init__(self, pool: BlockPool, *, enabled: bool) -> None:
        self.enabled = enabled
        self._pool = pool
        self._coming: dict[bytes, Sequence] = {}
        """Keys of blocks that are not published, and the running sequence that computes each."""

    def hits(self, sequence: Sequence) -> list[int]:
        """The published blocks that a sequence which holds none can begin with."""
        if not self.enabled:
            return []
        return self._pool.match(self._keys(sequence)[: self._num_reusable(sequence)])

    def comes_from(self, sequence: Sequence) -> Sequence | None:
        """The running sequence that one which waits should let compute what both need.

        Whom it waits for, it waits for until the last block that both need is there, or comes no more.
        """
        if not self._coming or sequence.awaited_key in self._coming:
            return self._coming.get(sequence.awaited_key)
        keys, end = self._keys(sequence), self._num_reusable(sequence)
        first = len(self._pool.match(keys[:end]))
        at = first
        while at < end and keys[at] in self._coming:
            at += 1
        block_tokens = self._pool.block_tokens
        is_worth_it = at > first and 2 * (at - first) * block_tokens >= len(sequence.tokens) - first * block_tokens
        sequence.awaited_key = keys[at - 1] if is_worth_it else b""
        return self._coming.get(sequence.awaited_key)

    def begin(self, sequence: Sequence) -> None:
        """A sequence that holds no blocks starts to run: it gets the blocks that it can begin with."""
        if not self.enabled:
            return
        sequence.awaited_key = b""
        sequence.blocks = self.hits(sequence)
        self._pool.hold(sequence.blocks)
        sequence.num_published = len(sequence.blocks)
        sequence.num_computed = sequence.num_published * self._pool.block_tokens
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
        for key in self._keys(sequence)[sequence.num_published :]:
            self._coming.setdefault(key, sequence)

    def publish(self, sequence: Sequence) -> None:
        """Finite logits came from all that a sequence has computed."""
        full = sequence.num_computed // self._pool.block_tokens
        if not self.enabled or full == sequence.num_published:
            return
        keys = self._keys(sequence)
        for at in range(sequence.num_published, full):
            self._pool.publish(sequence.blocks[at], keys[at])
            self._coming.pop(keys[at], None)
        sequence.num_published = full

    def end(self, sequence: Sequence) -> None:
        """A sequence gives up its blocks: what it has not published by now will not come from it."""
        if self.enabled and sequence.blocks:
            for key in self._keys(sequence)[sequence.num_published :]:
                if self._coming.get(key) is sequence:
                    del self._coming[key]
        sequence.num_published = 0

    def check(self, running: Iterable[Sequence]) -> None:
        """Audit: what is awaited is being computed. Raises AssertionError."""
        owners = set(self._coming.values())
        assert owners <= set(running), "a block is awaited from a sequence that does not run"
        due = {owner: set(self._keys(owner)[owner.num_published :]) for owner in owners}
        assert all(key in due[owner] for key, owner in self._coming.items()), "a block is awaited that is there"

    def _num_reusable(self, sequence: Sequence) -> int:
        """Blocks before the first position whose logits are wanted."""
        return sequence.first_wanted // self._pool.block_tokens

    def _keys(self, sequence: Sequence) -> list[bytes]:
        """Of every full block; what was made before stays as it is, since tokens are only added."""
        keys, size = sequence.block_keys, self._pool.block_tokens
        for start in range(len(keys) * size, len(sequence.tokens) - size + 1, size):
            parent = keys[-1] if keys else _root(sequence.request.cache_salt)
            tokens = array("q", sequence.tokens[start : start + size])
            keys.append(hashlib.sha256(parent + tokens.tobytes() + _adapters(sequence, start, start + size)).digest())
        return keys


def _root(salt: str) -> bytes:
    return hashlib.sha256(salt.encode()).digest()


def _adapters(sequence: Sequence, start: int, stop: int) -> bytes:
    """The adapters at work in a block [start, stop): content, weight, and the token of the block where each begins."""
    active = []
    for ref, (_, weight) in zip(sequence.adapters, sequence.request.adapters, strict=True):
        begins = sequence.start_of(ref.version.paged.invocation)
        if begins < stop:
            active.append((ref.version.digest, weight, max(0, begins - start)))
    return repr(active).encode() if active else b""
