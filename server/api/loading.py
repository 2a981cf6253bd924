"""Adapter loads on threads of their own, timed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from weft.adapters.store import AdapterInfo, AdapterStore, NewAdapter, Reservation
from weft.errors import Unavailable, WeftError
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
        self._loads: set[Future[AdapterInfo]] = set()
        self._refusal: str | None = None

    @property
    def is_loading(self) -> bool:
        """Whether a thread is at work: one that reads or copies weights can't be stopped."""
        return self._store.is_moving or any(load.running() for load in self._loads)

    async def create(self, new: NewAdapter) -> AdapterInfo:
        """Register and load. Raises what `AdapterStore.create` raises, and Unavailable; the name is free again then."""
        self._check_open()
        return await self._on_thread(lambda: self._store.create(new))

    def start(self, new: NewAdapter) -> AdapterInfo:
        """Register now and load in the background; a failed load leaves the adapter FAILED, with the reason.

        Raises what `AdapterStore.reserve` raises, and Unavailable.
        """
        self._check_open()
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
        except Exception:  # noqa: BLE001 - one folder, however odd, must not keep the others from being served
            _log.exception("%s was not loaded", new.source)
            return False
        return True

    async def drain(self, grace_s: float) -> None:
        """Take no more loads, and wait for those under way for up to `grace_s`; drop those in line."""
        self._refusal = "the server is draining"
        under_way: list[asyncio.Future[Any]] = [*self._background, *map(asyncio.wrap_future, self._loads)]
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*under_way, return_exceptions=True), grace_s)
        if self.is_loading:
            _log.warning("drain: an adapter was still loading after %g s", grace_s)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise Unavailable(self._refusal)

    async def _load(self, reservation: Reservation) -> None:
        try:
            await self._on_thread(lambda: self._store.load(reservation))
        except WeftError as error:
            _log.warning("adapter %s was not loaded: %s", reservation.entry.name, error)

    async def _on_thread(self, load: Callable[[], AdapterInfo]) -> AdapterInfo:
        future = self._threads.submit(self._timed, load)
        self._loads.add(future)
        future.add_done_callback(self._loads.discard)
        return await asyncio.wrap_future(future)

    def _timed(self, load: Callable[[], AdapterInfo]) -> AdapterInfo:
        started = time.monotonic()
        outcome = "failed"
        try:
            info = load()
            outcome = "ok"
        finally:
            self._metrics.adapter_loaded(time.monotonic() - started, outcome)
        return info
