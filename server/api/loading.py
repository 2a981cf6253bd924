"""Adapter loads on threads of their own, timed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from weft.adapters.store import AdapterInfo, AdapterStore, NewAdapter, Reservation
from weft.errors import WeftError
from weft.server.metrics import Metrics

_log = logging.getLogger(__name__)


NUM_THREADS = 2
"""Loads at a time: one reads while the other copies."""


class AdapterLoader:
    """Loads into a store and tells the metrics how long it took.

    Its threads are its own: tokenizing, on those of the event loop, must not wait behind a slow disk.
    """

    def __init__(self, store: AdapterStore, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="weft-load")
        self._background: set[asyncio.Task[None]] = set()

    async def create(self, new: NewAdapter) -> AdapterInfo:
        """Register and load. Raises what `AdapterStore.create` raises; the name is free again then."""
        return await self._on_thread(lambda: self._store.create(new))

    def start(self, new: NewAdapter) -> AdapterInfo:
        """Register now and load in the background; a failed load leaves the adapter FAILED, with the reason.

        Raises what `AdapterStore.reserve` raises.
        """
        reservation = self._store.reserve(new)
        info = self._store.get(new.name)
        task = asyncio.create_task(self._load(reservation), name=f"load {new.name}")
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return info

    def load_now(self, new: NewAdapter) -> bool:
        """Register and load on this thread; what fails is logged in one line and stays FAILED. True: loaded."""
        try:
            reservation = self._store.reserve(new)
            self._timed(lambda: self._store.load(reservation))
        except WeftError as error:
            _log.warning("%s was not loaded: %s", new.source, error)
            return False
        return True

    async def close(self) -> None:
        """Wait for the loads in the background, and take no more: a thread that copies weights can't be stopped."""
        while self._background:
            await asyncio.wait(self._background)
        self._threads.shutdown(wait=False)

    async def _load(self, reservation: Reservation) -> None:
        try:
            await self._on_thread(lambda: self._store.load(reservation))
        except WeftError as error:
            _log.warning("adapter %s was not loaded: %s", reservation.entry.name, error)

    async def _on_thread(self, load: Callable[[], AdapterInfo]) -> AdapterInfo:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._timed, load)

    def _timed(self, load: Callable[[], AdapterInfo]) -> AdapterInfo:
        started = time.monotonic()
        outcome = "failed"
        try:
            info = load()
            outcome = "ok"
        finally:
            self._metrics.adapter_loaded(time.monotonic() - started, outcome)
        return info
