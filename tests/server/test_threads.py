"""Pools whose threads are there from the start."""

from __future__ import annotations

import threading

from weft.server.threads import full_pool


def test_every_thread_has_begun_and_none_comes_later() -> None:
    def named() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("a-pool")}

    with full_pool(3, "a-pool") as pool:
        before = named()
        assert len(before) == 3
        assert list(pool.map(lambda number: number + 1, range(50))) == list(range(1, 51))
        assert named() == before
    assert not named()
