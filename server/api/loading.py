"""Adapter loads on threads of their own, timed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN, Span, Tracer, set_span_in_context

from weft.adapters.locations import is_remote
from weft.adapters.records import AdapterChange, AdapterInfo, AdapterState, Allow, NewAdapter, allow_all
from weft.adapters.report import AdapterReport
from weft.adapters.state import Recorder
from weft.adapters.store import AdapterStore, Reservation
from weft.errors import AdapterNotFound, Unavailable, WeftError
from weft.server.calls import this_call
from weft.server.metrics import Metrics
from weft.server.threads import full_pool

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

NUM_THREADS = 2
"""Loads of local files at a time: one reads while the other copies."""

NUM_DOWNLOADS = 4
"""Loads from other machines at a time, of which most wait for bytes; and as many of those that are restored."""

NUM_CHECKS = 1
"""Dry runs at a time, of local files and from other machines. Loads do not wait behind them."""

FIRST_RETRY_S = 10.0
LONGEST_RETRY_S = 300.0
"""How long what is restored waits before a source that can't be read is tried again: twice as long each time."""


@dataclass(frozen=True, slots=True)
class _Threads:
    """For one kind of work. What needs this machine alone never waits behind what needs another."""

    local: ThreadPoolExecutor
    remote: ThreadPoolExecutor

    @classmethod
    def of(cls, name: str, num_local: int, num_remote: int) -> _Threads:
        return cls(full_pool(num_local, name), full_pool(num_remote, f"{name}-remote"))

    def of_source(self, source: str) -> ThreadPoolExecutor:
        return self.remote if is_remote(source) else self.local

    def shutdown(self) -> None:
        """Drop what is in line."""
        for pool in (self.local, self.remote):
            pool.shutdown(wait=False, cancel_futures=True)


class AdapterLoader:
    """Loads into a store and tells the metrics how long it took.

    Its threads are its own: tokenizing, on those of the event loop, must not wait behind a slow disk. What `create`,
    `start`, `update` and `delete` have changed is recorded when they return, and also if their caller has given up.
    """

    def __init__(
        self,
        store: AdapterStore,
        metrics: Metrics,
        recorder: Recorder | None = None,
        first_retry_s: float = FIRST_RETRY_S,
        tracer: Tracer | None = None,
    ) -> None:
        """recorder: keeps what is changed; None, nothing does. tracer: None, nothing is traced."""
        self.metrics = metrics
        self._tracer = tracer
        self._recorder = recorder
        self._records = full_pool(1, "weft-state")
        self._store = store
        self._first_retry_s = first_retry_s
        self._threads = _Threads.of("weft-load", NUM_THREADS, NUM_DOWNLOADS)
        self._restoring = full_pool(NUM_DOWNLOADS, "weft-restore")
        self._checks = _Threads.of("weft-check", NUM_CHECKS, NUM_CHECKS)
        self._reserves = _Threads.of("weft-reserve", 1, 1)
        self._background: set[asyncio.Task[Any]] = set()
        self._restores: set[asyncio.Task[Any]] = set()
        self._loads: set[Future[Any]] = set()
        self._ends: list[Callable[[str], None]] = []
        self._refusal: str | None = None

    @property
    def is_loading(self) -> bool:
        """Whether a thread is at work: one that reads or copies weights can't be stopped."""
        return self._store.is_moving or any(load.running() for load in tuple(self._loads))

    async def create(self, new: NewAdapter) -> AdapterInfo:
        """Register and load. Raises what `AdapterStore.create` raises, and Unavailable; the name is free again then."""
        self._check_open()
        return await self._on_thread(
            lambda: self._recorded(new.name, lambda: self._timed("load", new.name, lambda: self._store.create(new))),
            self._threads.of_source(new.source),
        )

    async def update(self, name: str, change: AdapterChange, allow: Allow = allow_all) -> AdapterInfo:
        """Raises what `AdapterStore.update` raises, and Unavailable. What has begun goes on if this is cancelled."""
        self._check_open()
        if change.source is None and not change.pinned:  # nothing is read or moved: it need not wait behind what is
            info = self._store.update(name, change, allow)
            await self._record(name)
            return info

        def update() -> AdapterInfo:
            return self._store.update(name, change, allow)

        return await self._on_thread(
            lambda: self._recorded(
                name, update if change.source is None else lambda: self._timed("update", name, update)
            ),
            self._threads.of_source(change.source or ""),
        )

    async def delete(self, name: str, allow: Allow = allow_all) -> AdapterInfo:
        """Raises what `AdapterStore.delete` raises, and Unavailable."""
        self._check_open()
        info = self._store.delete(name, allow)
        await self._record(name)
        return info

    async def inspect(self, source: str) -> AdapterReport:
        """Raises what `AdapterStore.inspect` raises, and Unavailable."""
        self._check_open()
        return await self._on_thread(lambda: self._store.inspect(source), self._checks.of_source(source))

    async def start(self, new: NewAdapter) -> AdapterInfo:
        """Register now and load in the background; a failed load leaves the adapter FAILED, with the reason.

        Raises what `AdapterStore.reserve` raises, and Unavailable.
        """
        self._check_open()
        starting = asyncio.create_task(self._start(new), name=f"start {new.name}")
        _keep(self._background, starting)
        return await asyncio.shield(starting)

    async def run(self, work: Callable[[], None]) -> None:
        """Do other work that loads, on the threads of the loads. Raises what it raises, and Unavailable."""
        self._check_open()
        await self._on_thread(work, self._threads.local)

    def reserve_now(self, new: NewAdapter) -> Reservation | None:
        """Take again the name of one that was registered before, to `restore` it; None where it can't have it."""
        try:
            return self._store.reserve(new, restored=True)
        except WeftError as error:
            _log.warning("%s was not loaded: %s", new.source, error)
            return None

    def restore(self, reservation: Reservation) -> None:
        """Load in the background, and while the source can't be read try again, until it is wanted no more."""
        _keep(self._restores, asyncio.create_task(self._restore(reservation), name=f"restore {reservation.entry.name}"))

    def load_now(self, new: NewAdapter, *, restored: bool = False) -> bool:
        """Register and load on this thread; what fails is logged in one line and stays FAILED. True: loaded.

        restored: it was registered before, and stays so even if its source is not allowed any more.
        """
        try:
            reservation = self._store.reserve(new, restored=restored)
            self._timed("load", new.name, lambda: self._store.load(reservation))
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
            self._timed("update", name, lambda: self._store.update(name, change))
        except WeftError as error:
            _log.warning("adapter %s was not updated: %s", name, error)
        except Exception:  # noqa: BLE001 - one folder, however odd, must not end the watch over the others
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
        for restore in self._restores:
            restore.cancel()
        background = (*self._background, *self._restores)
        under_way: list[asyncio.Future[Any]] = [*background, *map(asyncio.wrap_future, tuple(self._loads))]
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*under_way, return_exceptions=True), grace_s)
        if self.is_loading:
            _log.warning("drain: an adapter was still loading after %g s", grace_s)
        for threads in (self._threads, self._checks, self._reserves):
            threads.shutdown()
        self._restoring.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Wait until everything is recorded; nothing may be changed after."""
        self._records.shutdown()

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise Unavailable(self._refusal)

    async def _start(self, new: NewAdapter) -> AdapterInfo:
        """Goes on when whoever asked for it has gone: what is reserved must also be loaded."""

        def reserve() -> tuple[Reservation, AdapterInfo]:
            return self._store.reserve(new), self._store.get(new.name)

        # The check of a source follows its links, which may take for ever on a mount that hangs.
        reservation, info = await self._on_thread(reserve, self._reserves.of_source(new.source))
        self._check_open()
        _keep(self._background, asyncio.create_task(self._load(reservation), name=f"load {new.name}"))
        await self._record(new.name)
        return info

    async def _load(self, reservation: Reservation) -> None:
        try:
            await self._load_once(reservation, self._threads.of_source(reservation.entry.source))
        except WeftError as error:
            _log.warning("adapter %s was not loaded: %s", reservation.entry.name, error)

    async def _load_once(self, reservation: Reservation, threads: ThreadPoolExecutor) -> None:
        load = partial(self._store.load, reservation)
        try:
            await self._on_thread(partial(self._timed, "load", reservation.entry.name, load), threads)
        except Unavailable as error:
            self._store.give_up(reservation, str(error))  # it may not have begun
            raise

    async def _restore(self, reservation: Reservation) -> None:
        """As `_load`, of a source that may be out of reach for a while."""
        name, wait_s = reservation.entry.name, self._first_retry_s
        while True:
            try:
                return await self._load_once(reservation, self._restoring)
            except Unavailable as error:
                if wait_s == self._first_retry_s:
                    _log.warning("adapter %s is not loaded yet, and will be tried again: %s", name, error)
            except WeftError as error:
                return _log.warning("adapter %s was not loaded: %s", name, error)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_RETRY_S)
            if not self._is_wanted(reservation):
                return None

    def _is_wanted(self, reservation: Reservation) -> bool:
        """Whether a load that has failed is still to be mended."""
        with suppress(AdapterNotFound):
            info = self._store.get(reservation.entry.name)
            return info.state is AdapterState.FAILED and info.source == reservation.entry.source
        return False

    async def _record(self, name: str) -> None:
        """On a thread of its own: a change that is made must not wait behind a download to be kept."""
        if self._recorder is not None:
            await asyncio.shield(asyncio.wrap_future(self._records.submit(self._recorder.record, name)))

    def _recorded(self, name: str, work: Callable[[], AdapterInfo]) -> AdapterInfo:
        """On the thread that does the work, which goes on when whoever asked for it has gone.

        What the work raises is told, even where that can't be recorded either.
        """
        try:
            info = work()
        except BaseException:
            if self._recorder is not None:
                with suppress(Unavailable):
                    self._recorder.record(name)
            raise
        if self._recorder is not None:
            self._recorder.record(name)
        return info

    async def _on_thread(self, work: Callable[[], Result], threads: ThreadPoolExecutor) -> Result:
        future = _submit(threads, work)
        self._loads.add(future)
        future.add_done_callback(self._loads.discard)
        return await asyncio.wrap_future(future)

    def _timed(self, operation: str, name: str, load: Callable[[], AdapterInfo]) -> AdapterInfo:
        """For the metrics, and as a span of the RPC that asked for it, if one did."""
        started = time.monotonic()
        outcome = "failed"
        with self._span(operation, name) as span:
            try:
                info = load()
                outcome = "ok"
            finally:
                self.metrics.adapter_loaded(time.monotonic() - started, outcome)
            span.set_attribute("weft.adapter.digest", info.digest)
        return info

    def _span(self, operation: str, name: str) -> AbstractContextManager[Span]:
        if self._tracer is None:
            return nullcontext(INVALID_SPAN)
        asking = this_call().span
        return self._tracer.start_as_current_span(
            f"{operation} adapter",
            set_span_in_context(asking) if asking is not None else Context(),
            attributes={"weft.adapter.name": name},
        )


def _submit(threads: ThreadPoolExecutor, work: Callable[[], Result]) -> Future[Result]:
    """Raises Unavailable where the system gives no thread; the work is not done then, ever."""
    is_dropped = False

    def run() -> Result:
        if is_dropped:
            raise RuntimeError("whoever asked for it was told that it would not be done")
        return work()

    try:
        return threads.submit(copy_context().run, run)
    except (RuntimeError, MemoryError) as error:
        is_dropped = True  # it is in line all the same, and a thread may come
        words = "the system gives no more threads or memory for it, or the server is stopping: try again"
        raise Unavailable(words) from error


def _keep(tasks: set[asyncio.Task[Any]], task: asyncio.Task[Any]) -> None:
    """Among the tasks, until it is done."""
    tasks.add(task)
    task.add_done_callback(tasks.discard)
