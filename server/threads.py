"""Threads that are there from the start. A leaf.

One that is begun late finds no memory where that has run out, and looks like a leak where it has not.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from threading import Barrier


def full_pool(size: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads have all begun."""
    pool, all_there = ThreadPoolExecutor(size, thread_name_prefix=name), Barrier(size)
    wait([pool.submit(all_there.wait) for _ in range(size)])
    return pool
