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
