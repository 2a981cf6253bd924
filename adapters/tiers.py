"""Where the content of adapters is, and how it moves: disk -> host memory -> device pages, and out again.

A version is one content, known by its digest. It was read and validated once; from then on it may be on disk alone (at
its sources), in host memory, or in device pages besides. Its copy in host memory stays there while it is on the device,
so that leaving the device costs nothing and coming back no reading; the least recently used copies go when the budget
is spent, and those of pinned versions first, since these never come back.

What moves, moves on threads of this module. Disks and devices have their own, so that a disk that hangs holds up no
adapter that is in host memory.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Protocol

from weft.adapters.classes import Classes
from weft.adapters.pages import HostAdapter, PagePool, Recall, Runs
from weft.adapters.reading import Reader
from weft.errors import OutOfCapacity, Unavailable, WeftError
from weft.kernels.plan import PagedAdapter

_log = logging.getLogger(__name__)

NUM_READERS = 8
"""Reads from disk at a time; each holds an adapter in host memory beyond the budget while it lasts."""

NUM_COPIERS = 2
"""Copies to the device at a time."""


class Tier(Enum):
    """The fastest memory that holds a version."""

    DISK = "disk"
    HOST = "host"
    DEVICE = "device"


class TierMetrics(Protocol):
    """What is counted. Called from any thread; tier: of `Tier`'s values."""

    def adapter_moved(self, tier: str, seconds: float, outcome: str) -> None:
        """A move up from this tier ended: outcome "ok" or "failed"."""

    def adapter_evicted(self, tier: str) -> None:
        """A version left this tier to make room."""


@dataclass(eq=False, repr=False, slots=True)
class AdapterVersion:
    """One content, and who wants it where.

    names: each name that stands for it, and the source that name gives. keepers: loads and updates that are about to
    name it. users: requests in flight, queued ones included; with names and keepers they keep the version alive.
    active: requests that run now; with pins they keep its pages. failures: how many moves have failed so far.
    classes: of a sequence classifier, what it tells apart.
    """

    digest: str
    origin: str
    ranks: tuple[int, ...]
    modules: tuple[str, ...]
    num_pages: int
    disk_bytes: int
    is_sum: bool
    probe_error: float | None
    recall: Recall | None
    classes: Classes | None = None
    names: dict[str, str] = field(default_factory=dict)
    keepers: int = 0
    users: int = 0
    active: int = 0
    pins: int = 0
    host: HostAdapter | None = None
    runs: Runs = ()
    resident: PagedAdapter | None = None
    moving_from: Tier | None = None
    failures: int = 0
    failure: WeftError | None = None

    @property
    def tier(self) -> Tier:
        if self.resident is not None:
            return Tier.DEVICE
        return Tier.HOST if self.host is not None else Tier.DISK

    @property
    def paged(self) -> PagedAdapter:
        """As the kernels see it; for who keeps it on the device."""
        assert self.resident is not None, f"{self.digest} is not on the device"
        return self.resident

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for it, or runs with it."""
        return self.users + self.keepers > 0

    @property
    def may_leave_device(self) -> bool:
        return self.resident is not None and self.active + self.pins == 0

    @property
    def may_leave_host(self) -> bool:
        """What waits to be copied to the device stays, beyond the budget if need be."""
        return self.moving_from is None and (self.resident is not None or not self.is_wanted)


class Tiers:
    """All versions. A method that does not say "blocks" is called with `lock` held, and does not take long."""

    def __init__(
        self,
        pool: PagePool,
        reader: Reader,
        host_bytes: int,
        metrics: TierMetrics,
        changed: Callable[[AdapterVersion], None],
    ) -> None:
        """changed is told, with the lock held, of a version that is in another tier now."""
        self.lock = threading.RLock()
        self.host_bytes = host_bytes
        self.host_bytes_used = 0
        self.pages_pinned = 0
        self.versions: dict[str, AdapterVersion] = {}
        self.pages_are_claimed = False
        """Whether free pages are spoken for: nothing but the claim is put on the device then, and what is pinned."""
        self.wake: Callable[[], None] = lambda: None
        """Called, with the lock held, when requests that wait may find something new: a move ended, pages came free."""
        self._pool = pool
        self._reader = reader
        self._metrics = metrics
        self._changed = changed
        self._moved = threading.Condition(self.lock)
        self._on_host: dict[AdapterVersion, None] = {}
        self._on_device: dict[AdapterVersion, None] = {}
        self._readers = _Crew("weft-adapter-read", NUM_READERS)
        self._copiers = _Crew("weft-adapter-copy", NUM_COPIERS)
        self._num_moving = 0

    @property
    def is_moving(self) -> bool:
        """Whether a thread is at work; one that reads or copies can't be stopped."""
        return self._num_moving > 0

    @property
    def may_read(self) -> bool:
        """Whether another read may start for a request that is not the next in line."""
        return self._readers.has_room and self.host_bytes_used <= self.host_bytes

    @property
    def num_pages(self) -> int:
        return self._pool.num_pages

    @property
    def num_free_pages(self) -> int:
        return self._pool.allocator.num_free

    def on_device(self) -> Iterable[AdapterVersion]:
        """What is in pages, the least recently used first."""
        return self._on_device

    def enter(self, host: HostAdapter, source: str) -> AdapterVersion:
        """The version of this content, new or known. It lives on only if the caller is one of its keepers next."""
        version = self.versions.get(host.digest)
        if version is None:
            version = AdapterVersion(
                digest=host.digest,
                origin=source,
                ranks=host.ranks,
                modules=host.modules,
                num_pages=host.num_pages,
                disk_bytes=host.disk_bytes,
                is_sum=host.is_sum,
                probe_error=host.probe_error,
                recall=host.recall,
                classes=host.classes,
            )
            self.versions[host.digest] = version
        if version.host is None:
            self._put_on_host(version, host)
        return version

    def settle(self, version: AdapterVersion, *, pinned: bool) -> None:
        """Put a kept version where it belongs: on the device if pages are free, or if it is pinned. Blocks.

        Pinned, it takes the pages of what nobody runs with, and the caller holds a pin until it calls `unpin`.
        Raises OutOfCapacity where that does not do, and what a move raised.
        """
        with self.lock:
            if pinned:
                self._settle_pinned(version)
            elif not self.pages_are_claimed:
                self._copy_into_free_pages(version)
            if version.moving_from is Tier.HOST:
                self._await_move(version)

    def pin(self, version: AdapterVersion) -> None:
        if version.pins == 0:
            self.pages_pinned += version.num_pages
        version.pins += 1

    def unpin(self, version: AdapterVersion) -> None:
        version.pins -= 1
        if version.pins == 0:
            self.pages_pinned -= version.num_pages
            self.wake()

    def use(self, version: AdapterVersion) -> None:
        """It was used just now."""
        for tier in (self._on_host, self._on_device):
            if version in tier:
                del tier[version]
                tier[version] = None

    def settle_up(self, version: AdapterVersion) -> None:
        """Somebody let go of the version: drop what nobody holds, and what the budget no longer covers."""
        if version.names or version.is_wanted:
            self._trim_host()
        elif version.moving_from is None and version.digest in self.versions:
            del self.versions[version.digest]
            self._take_from_host(version)
            self._take_from_device(version)
            self.wake()

    def make_room(self, num_pages: int, victims: Iterable[AdapterVersion]) -> bool:
        """Have so many pages free, evicting victims in turn; if all would not do, none."""
        chosen, room = [], self.num_free_pages
        for version in victims:
            if room >= num_pages:
                break
            chosen.append(version)
            room += version.num_pages
        if room < num_pages:
            return False
        for version in chosen:
            self._take_from_device(version)
            self._metrics.adapter_evicted(Tier.DEVICE.value)
            self._changed(version)
        return True

    def read(self, version: AdapterVersion) -> None:
        """Start to read it from disk."""
        assert version.moving_from is None and version.tier is Tier.DISK, "read without need"  # noqa: PT018
        sources, recall = [*version.names.values(), version.origin], version.recall
        self._start(version, Tier.DISK, lambda: self._reader.read_again(sources, version.digest, recall))

    def copy(self, version: AdapterVersion) -> None:
        """Start to copy it to the device; the pages are free."""
        host = version.host
        assert host is not None and version.moving_from is None and not version.runs, "copied twice"  # noqa: PT018
        runs = version.runs = self._pool.allocate(host)
        self._start(version, Tier.HOST, lambda: self._pool.write(runs, host))

    def check(self) -> None:
        """Audit. Raises AssertionError."""
        versions = self.versions.values()
        self._pool.allocator.check([version.runs for version in versions])
        on_host = {version for version in versions if version.host is not None}
        assert set(self._on_host) == on_host, "host memory holds what no version does"
        assert set(self._on_device) == {version for version in versions if version.resident is not None}
        assert self.host_bytes_used == sum(version.host.num_bytes for version in on_host if version.host is not None)
        over = self.host_bytes_used > self.host_bytes
        assert not (over and any(version.may_leave_host for version in on_host)), "host memory is over its budget"
        assert self.pages_pinned == sum(version.num_pages for version in versions if version.pins)
        for version in versions:
            assert min(version.keepers, version.users, version.active, version.pins) >= 0, "counted below none"
            assert version.active <= version.users, f"{version.digest} runs for nobody"
            assert version.names or version.is_wanted or version.moving_from, f"{version.digest} is held by nobody"
            assert version.resident is not None or not version.active, f"{version.digest} runs without pages"
            assert bool(version.runs) == (version.resident is not None or version.moving_from is Tier.HOST)

    def _settle_pinned(self, version: AdapterVersion) -> None:
        self.pin(version)
        try:
            while version.resident is None:
                if version.moving_from is None:
                    self._move_up(version)
                self._await_move(version)
        except BaseException:
            self.unpin(version)
            raise

    def _await_move(self, version: AdapterVersion) -> None:
        """Blocks, without the lock, while it moves. Raises what the move raised."""
        failures = version.failures
        while version.moving_from is not None:
            self._moved.wait()
        if version.failures > failures and version.failure is not None:
            raise version.failure

    def _move_up(self, version: AdapterVersion) -> None:
        """One tier up, at the cost of whatever nobody runs with. Raises OutOfCapacity."""
        if version.host is None:
            self.read(version)
            return
        idle = [other for other in self._on_device if other.may_leave_device]
        if not self.make_room(version.num_pages, sorted(idle, key=lambda other: other.is_wanted)):
            raise OutOfCapacity(
                f"the adapter needs {version.num_pages} pages; of {self.num_pages}, {self.num_free_pages} are free and "
                "the others pinned or in use: unpin an adapter, or start the server with a larger --adapter-pages"
            )
        self.copy(version)

    def _copy_into_free_pages(self, version: AdapterVersion) -> None:
        """Start to copy it if it costs nobody anything."""
        if version.tier is Tier.HOST and version.moving_from is None and version.num_pages <= self.num_free_pages:
            self.copy(version)

    def _start(self, version: AdapterVersion, tier: Tier, work: Callable[[], HostAdapter | PagedAdapter]) -> None:
        version.moving_from = tier
        self._num_moving += 1
        crew = self._readers if tier is Tier.DISK else self._copiers
        try:
            crew.submit(lambda: self._move(version, tier, work))
        except Unavailable as none_is_left:
            self._move(version, tier, partial(_fail, none_is_left))

    def _move(self, version: AdapterVersion, tier: Tier, work: Callable[[], HostAdapter | PagedAdapter]) -> None:
        """Run one move, on a thread of a crew, and settle how it ended."""
        started_s = time.perf_counter()
        try:
            outcome: HostAdapter | PagedAdapter | WeftError = work()
        except WeftError as error:
            outcome = error
        except Exception as error:  # noqa: BLE001 - the edge of the thread: who waits must be answered
            _log.exception("adapter %s could not be moved from %s", version.digest, tier.value)
            words = f"the adapter could not be moved from {tier.value} ({type(error).__name__}): try again"
            outcome = Unavailable(words)
        seconds = time.perf_counter() - started_s
        self._metrics.adapter_moved(tier.value, seconds, "failed" if isinstance(outcome, WeftError) else "ok")
        with self.lock:
            version.moving_from = None
            self._num_moving -= 1
            self._land(version, outcome)
            if not isinstance(outcome, WeftError):
                self._changed(version)
            self.settle_up(version)
            self._moved.notify_all()
            self.wake()

    def _land(self, version: AdapterVersion, outcome: HostAdapter | PagedAdapter | WeftError) -> None:
        if isinstance(outcome, WeftError):
            version.failures += 1
            version.failure = outcome
            self._take_from_device(version)
        elif isinstance(outcome, PagedAdapter):
            version.resident = outcome
            self._on_device[version] = None
        else:
            if version.host is None:
                self._put_on_host(version, outcome)
            if version.is_wanted and not self.pages_are_claimed:
                self._copy_into_free_pages(version)

    def _put_on_host(self, version: AdapterVersion, host: HostAdapter) -> None:
        version.host, version.recall = host, host.recall
        self._on_host[version] = None
        self.host_bytes_used += host.num_bytes

    def _trim_host(self) -> None:
        """Drop copies until the budget covers what is left, or what is left is needed."""
        if self.host_bytes_used <= self.host_bytes:
            return
        idle = [version for version in self._on_host if version.may_leave_host]
        for version in sorted(idle, key=lambda version: not (version.pins and version.resident)):
            self._take_from_host(version)
            self._metrics.adapter_evicted(Tier.HOST.value)
            self._changed(version)
            if self.host_bytes_used <= self.host_bytes:
                return

    def _take_from_host(self, version: AdapterVersion) -> None:
        if version.host is not None:
            self.host_bytes_used -= version.host.num_bytes
            version.host = None
            del self._on_host[version]

    def _take_from_device(self, version: AdapterVersion) -> None:
        if version.runs:
            self._pool.free(version.runs)
            version.runs, version.resident = (), None
            self._on_device.pop(version, None)


def _fail(error: WeftError) -> HostAdapter | PagedAdapter:
    raise error


class _Crew:
    """Threads that come when there is work and go when there is none. They hold up nobody's exit."""

    def __init__(self, name: str, size: int) -> None:
        self._name = name
        self._size = size
        self._lock = threading.Lock()
        self._works: deque[Callable[[], None]] = deque()
        self._num_threads = 0

    @property
    def has_room(self) -> bool:
        """Whether work that is handed in now is begun at once."""
        return len(self._works) + self._num_threads < self._size

    def submit(self, work: Callable[[], None]) -> None:
        """Raises Unavailable where nobody will do it: there is no thread, and the system gives none."""
        with self._lock:
            self._works.append(work)
            if self._num_threads == self._size:
                return
            self._num_threads += 1
        try:
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        except (RuntimeError, MemoryError):
            with self._lock:
                self._num_threads -= 1
                if self._num_threads or work not in self._works:
                    return
                self._works.remove(work)
            words = "the adapter could not be moved, for the system gives no more threads or memory: try again"
            raise Unavailable(words) from None

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._works:
                    self._num_threads -= 1
                    return
                work = self._works.popleft()
            work()
