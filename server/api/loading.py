"""Adapter loads on threads of their own, timed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from weft.adapters.records import AdapterChange, AdapterInfo, NewAdapter
from weft.adapters.report import AdapterReport
from weft.adapters.state import Recorder
from weft.adapters.store import AdapterStore, Reservation
from weft.errors import AdapterNotFound, Unavailable, WeftError
from weft.server.metrics import Metrics

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

NUM_THREADS = 2
"""Loads at a time: one reads while the other copies."""

NUM_CHECKS = 1
"""Dry runs at a time. Loads do not wait behind them, nor are more weights read at once than these and the loads."""


class AdapterLoader:
    """Loads into a store and tells the metrics how long it took.

    Its threads are its own: tokenizing, on those of the event loop, must not wait behind a slow disk. What `create`,
    `start`, `update` and `delete` have changed is recorded when they return, and also if their caller has given up.
    """

    def __init__(self, store: AdapterStore, metrics: Metrics, recorder: Recorder | None = None) -> None:
        """recorder: keeps what is changed; None, nothing does."""
        self.metrics = metrics
        self._recorder = recorder
        self._records = ThreadPoolExecutor(1, thread_name_prefix="weft-state")
        self._store = store
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="weft-load")
        self._checks = ThreadPoolExecutor(NUM_CHECKS, thread_name_prefix="weft-check")
        self._background: set[asyncio.Task[None]] = set()
        self._loads: set[Future[Any]] = set()
        self._ends: list[Callable[[str], None]] = []
        self._refusal: str | None = None

    @property
    def is_loading(self) -> bool:
        """Whether a thread is at work: one that reads or copies weights can't be stopped."""
        return self._store.is_moving or any(load.running() for load in self._loads)

    async def create(self, new: NewAdapter) -> AdapterInfo:
        """Register and load. Raises what `AdapterStore.create` raises, and Unavailable; the name is free again then."""
        self._check_open()
        return await self._on_thread(
            lambda: self._recorded(new.name, lambda: self._timed(lambda: self._store.create(new)))
        )

    async def update(self, name: str, change: AdapterChange) -> AdapterInfo:
        """Raises what `AdapterStore.update` raises, and Unavailable. What has begun goes on if this is cancelled."""
        self._check_open()
        if change.source is None and not change.pinned:  # nothing is read or moved: it need not wait behind what is
            info = self._store.update(name, change)
            await self._record(name)
            return info

        def update() -> AdapterInfo:
            return self._store.update(name, change)

        return await self._on_thread(
            lambda: self._recorded(name, update if change.source is None else lambda: self._timed(update))
        )

    async def delete(self, name: str) -> AdapterInfo:
        """Raises AdapterNotFound, and Unavailable."""
        info = self._store.delete(name)
        await self._record(name)
        return info

    async def inspect(self, source: str) -> AdapterReport:
        """Raises what `AdapterStore.inspect` raises, and Unavailable."""
        self._check_open()
        return await self._on_thread(lambda: self._store.inspect(source), self._checks)

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

    def when_draining(self, end: Callable[[str], None]) -> None:
        """Say what to call as soon as it drains, with the words that refuse."""
        self._ends.append(end)

    async def drain(self, grace_s: float) -> None:
        """Take no more loads, and wait for those under way for up to `grace_s`; drop those in line."""
        self._refusal = "the server is draining"
        for end in self._ends:
            end(self._refusal)
        under_way: list[asyncio.Future[Any]] = [*self._background, *map(asyncio.wrap_future, self._loads)]
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*under_way, return_exceptions=True), grace_s)
        if self.is_loading:
            _log.warning("drain: an adapter was still loading after %g s", grace_s)
        for threads in (self._threads, self._checks):
            threads.shutdown(wait=False, cancel_futures=True)

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
            await asyncio.shield(asyncio.wrap_future(self._records.submit(self._recorder.record, name)))

    def _recorded(self, name: str, work: Callable[[], AdapterInfo]) -> AdapterInfo:
        """On the thread that does the work, which goes on when whoever asked for it has gone."""
        try:
            return work()
        finally:
            if self._recorder is not None:
                self._recorder.record(name)

    async def _on_thread(self, work: Callable[[], Result], threads: ThreadPoolExecutor | None = None) -> Result:
        """threads: None for those of the loads."""
        future = (threads or self._threads).submit(work)
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
            self.metrics.adapter_loaded(time.monotonic() - started, outcome)
        return info
