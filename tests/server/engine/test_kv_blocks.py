"""The block pool: no block with two owners, none lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.server.engine.kv_blocks import BlockPool


def test_block_zero_is_never_given_out() -> None:
    pool = BlockPool(5, 16)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert not pool.can_allocate(1)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert BlockPool(5, 16).blocks_for(tokens) == blocks


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=60))
def test_any_history_audits_clean(history: list[tuple[bool, int]]) -> None:
    pool, held = BlockPool(20, 4), []
    for give_back, size in history:
        if give_back and held:
            pool.free(held.pop(size % len(held)))
        elif pool.can_allocate(size):
            held.append(pool.allocate(size))
        pool.check(held)


@pytest.mark.parametrize("held", [[[1], [1]], [[1]], [[2]]])
def test_the_audit_sees_what_is_wrong(held: list[list[int]]) -> None:
    pool = BlockPool(3, 4)
    pool.allocate(2)
    with pytest.raises(AssertionError):
        pool.check(held)


def key(number: int) -> bytes:
    return bytes([number])


def test_what_was_published_is_found_by_its_key_until_its_block_is_needed() -> None:
    pool = BlockPool(1 + 3, 4)
    one, two, private = pool.allocate(3)
    pool.publish(one, key(1))
    pool.publish(two, key(2))
    assert pool.match([key(1), key(2), key(3)]) == [one, two]
    assert pool.match([key(3), key(1)]) == []
    pool.free([one, two, private])
    assert pool.num_free == 3
    assert pool.match([key(1), key(2)]) == [one, two]
    assert pool.allocate(1) == [private], "what nobody knows goes first"
    assert pool.allocate(1) == [two], "then the end of a prefix"
    assert pool.match([key(1), key(2)]) == [one]
    pool.check([[private, two]])


def test_blocks_that_are_found_are_held_by_many_and_are_the_last_to_go() -> None:
    pool = BlockPool(1 + 4, 4)
    for number in (1, 2):
        (block,) = pool.allocate(1)
        pool.publish(block, key(number))
        pool.free([block])
    found = pool.match([key(1)])
    assert pool.can_allocate(3, beside=found)
    assert not pool.can_allocate(4, beside=found)
    pool.hold(found)
    pool.hold(found)
    assert not pool.can_allocate(4, beside=found), "held, and counted once"
    pool.check([found, found])
    pool.free(found)
    assert pool.num_free == 3
    pool.free(found)
    taken = pool.allocate(3)
    assert (pool.match([key(1)]), pool.match([key(2)])) == (found, []), "the longest idle goes first"
    pool.check([taken])


def test_the_first_block_under_a_key_stays_and_the_second_remains_private() -> None:
    pool = BlockPool(1 + 2, 4)
    first, second = pool.allocate(2)
    pool.publish(first, key(1))
    pool.publish(second, key(1))
    assert pool.match([key(1)]) == [first]
    assert pool.unpublished([first, second]) == [second]
    pool.free([first, second])
    pool.check([])


@pytest.mark.parametrize("held", [[[1, 2], [2]], [[1, 1], [2]], [[1]], [[1, 2], [1], [1]]])
def test_the_audit_counts_the_holders_of_published_blocks(held: list[list[int]]) -> None:
    pool = BlockPool(3, 4)
    pool.allocate(2)
    pool.publish(1, key(1))
    pool.hold([1])
    pool.check([[1, 2], [1]])
    with pytest.raises(AssertionError):
        pool.check(held)


prefixes = st.lists(st.integers(0, 1), min_size=1, max_size=5).map(
    lambda path: [bytes(path[: i + 1]) for i in range(len(path))]
)


@given(st.lists(st.tuples(prefixes, st.booleans(), st.integers(0, 9)), max_size=60))
def test_no_history_of_sharing_changes_or_loses_a_block(history: list[tuple[list[bytes], bool, int]]) -> None:
    """Each entry is a sequence with a prefix that begins, may publish what it computed, and ends some time."""
    pool, held = BlockPool(12, 4), []
    content: dict[int, bytes] = {}
    for keys, publishes, leaver in history:
        found = pool.match(keys)
        assert [content[block] for block in found] == keys[: len(found)], "another content under the key"
        if pool.can_allocate(len(keys) - len(found), beside=found):
            pool.hold(found)
            new = pool.allocate(len(keys) - len(found))
            assert not set(new) & {block for blocks in held for block in blocks}, "somebody else's block"
            content.update(zip(new, keys[len(found) :], strict=True))
            held.append(found + new)
            for block, name in zip(new, keys[len(found) :], strict=True) if publishes else ():
                pool.publish(block, name)
        elif held:
            pool.free(held.pop(leaver % len(held)))
        pool.check(held)
    for blocks in held:
        pool.free(blocks)
    assert pool.num_free == pool.capacity
