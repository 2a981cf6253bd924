"""Adapter loads on threads of their own, timed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from weft.adapters.state import Recorder
from weft.adapters.store import AdapterChange, AdapterInfo, AdapterStore, NewAdapter, Reservation
from weft.errors import AdapterNotFound, Unavailable, WeftError
from weft.server.metrics import Metrics

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

NUM_THREADS = 2
"""Loads at a time: one reads while the other copies."""


class AdapterLoader:
    """Loads into a store and tells the metrics how long it took.

    Its threads are its own: tokenizing, on those of the event loop, must not wait behind a slow disk. What `create`,
    `start`, `update` and `delete` have changed is recorded when they return.
    """

    def __init__(self, store: AdapterStore, metrics: Metrics, recorder: Recorder | None = None) -> None:
        """recorder: keeps what is changed; None, nothing does."""
        self._store = store
        self._metrics = metrics
        self._recorder = recorder
        self._records = ThreadPoolExecutor(1, thread_name_prefix="weft-state")
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="weft-load")
        self._background: set[asyncio.Task[None]] = set()
        self._loads: set[Future[Any]] = set()
        self._refusal: str | None = None

    @property
    def is_loading(self) -> bool:
        """Whether a thread is at work: one that reads or copies weights can't be stopped."""
        return self._store.is_moving or any(load.running() for load in self._loads)

    async def create(self, new: NewAdapter) -> AdapterInfo:
        """Register and load. Raises what `AdapterStore.create` raises, and Unavailable; the name is free again then."""
        self._check_open()
        try:
            return await self._on_thread(lambda: self._timed(lambda: self._store.create(new)))
        finally:
            await self._record(new.name)

    async def update(self, name: str, change: AdapterChange) -> AdapterInfo:
        """Raises what `AdapterStore.update` raises, and Unavailable."""
        self._check_open()
        info = await self._on_thread(lambda: self._timed(lambda: self._store.update(name, change)))
        await self._record(name)
        return info

    async def delete(self, name: str) -> AdapterInfo:
        """Raises AdapterNotFound, and Unavailable."""
        info = self._store.delete(name)
        await self._record(name)
        return info

    async def start(self, new: NewAdapter) -> AdapterInfo:
        """Register now and load in the background; a failed load leaves the adapter FAILED, with the reason.

        Raises what `AdapterStore.reserve` raises, and Unavailable.
        """
        self._check_open()
        reservation = self._store.reserve(new)
        info = self._store.get(new.name)
        task = asyncio.create_task(self._load(reservation), name=f"load {new.name}")
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        await self._record(new.name)
        return info

    async def run(self, work: Callable[[], None]) -> None:
        """Do other work that loads, on the threads of the loads. Raises what it raises, and Unavailable."""
        self._check_open()
        await self._on_thread(work)

    def load_now(self, new: NewAdapter, *, restored: bool = False) -> bool:
        """Register and load on this thread; what fails is logged in one line and stays FAILED. True: loaded.

        restored: it was registered before, and stays so even if its source is not allowed any more.
        """
        try:
            reservation = self._store.reserve(new, restored=restored)
            self._timed(lambda: self._store.load(reservation))
        except WeftError as error:
            _log.warning("%s was not loaded: %s", new.source, error)
            return False
        except Exception:  # noqa: BLE001 - one folder, however odd, must not keep the others from being served
            _log.exception("%s was not loaded", new.source)
            return False
        return True

    def update_now(self, name: str, change: AdapterChange) -> None:
        """Update on this thread; what fails is logged in one line, and the adapter is as it was."""
        try:
            self._timed(lambda: self._store.update(name, change))
        except WeftError as error:
            _log.warning("adapter %s was not updated: %s", name, error)
        except Exception:  # noqa: BLE001 - as in load_now
            _log.exception("adapter %s was not updated", name)

    def delete_now(self, name: str) -> None:
        """Delete and record on this thread. Raises Unavailable."""
        with suppress(AdapterNotFound):
            self._store.delete(name)
        if self._recorder is not None:
            self._recorder.record(name)

    async def drain(self, grace_s: float) -> None:
        """Take no more loads, and wait for those under way for up to `grace_s`; drop those in line."""
        self._refusal = "the server is draining"
        under_way: list[asyncio.Future[Any]] = [*self._background, *map(asyncio.wrap_future, self._loads)]
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*under_way, return_exceptions=True), grace_s)
        if self.is_loading:
            _log.warning("drain: an adapter was still loading after %g s", grace_s)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Wait until everything is recorded; nothing may be changed after."""
        self._records.shutdown()

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise Unavailable(self._refusal)

    async def _load(self, reservation: Reservation) -> None:
        try:
            await self._on_thread(lambda: self._timed(lambda: self._store.load(reservation)))
        except WeftError as error:
            _log.warning("adapter %s was not loaded: %s", reservation.entry.name, error)

    async def _record(self, name: str) -> None:
        """On a thread of its own: a change that is made must not wait behind a download to be kept."""
        if self._recorder is not None:
            await asyncio.wrap_future(self._records.submit(self._recorder.record, name))

    async def _on_thread(self, work: Callable[[], Result]) -> Result:
        future = self._threads.submit(work)
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
