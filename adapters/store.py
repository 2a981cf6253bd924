"""Adapters by name: registered, updated, deleted, and what requests get when they ask for one.

A name is an alias; identity is the digest of the content. A request acquires a *version* and keeps it to its end,
whatever happens to the name meanwhile. Two names for the same content share everything. Where the content is at the
moment is the business of `tiers.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count

from weft.adapters.names import check_name, what_was_meant
from weft.adapters.pages import PagePool
from weft.adapters.reading import Policy, Reader
from weft.adapters.records import (
    AdapterChange,
    AdapterEvent,
    AdapterInfo,
    AdapterState,
    Allow,
    Capacity,
    EventKind,
    Listener,
    NewAdapter,
    allow_all,
)
from weft.adapters.report import AdapterReport
from weft.adapters.residency import AdapterRef, Residency, check_fit, check_mixable
from weft.adapters.sources import Sources
from weft.adapters.tiers import AdapterVersion, TierMetrics, Tiers
from weft.errors import AdapterExists, AdapterNotFound, WeftError
from weft.kernels.plan import PAGE_ROWS

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_AT_ONCE = 64
"""Adapters that are listed while the lock is held."""


@dataclass(eq=False, slots=True)
class _Entry:
    """A name in the registry. set_by: which change set each field last, by its number; later ones win."""

    name: str
    source: str
    labels: Mapping[str, str]
    pinned: bool
    created_s: float
    last_used_s: float | None = None
    error: str = ""
    version: AdapterVersion | None = None
    set_by: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reservation:
    """A name that was taken for one adapter, to be loaded. before: a FAILED one that had it."""

    entry: _Entry
    before: _Entry | None = None


class NoMetrics:
    """Counts nothing."""

    def adapter_moved(self, tier: str, seconds: float, outcome: str) -> None:
        pass

    def adapter_evicted(self, tier: str) -> None:
        pass


class AdapterStore:
    """The registry of adapters on one page pool. Every method may be called from any thread.

    sources: where adapters may come from. now: seconds since the epoch. host_bytes: the budget of
    copies in host memory. policy: what an adapter must show. residency: for the engine's thread.
    """

    def __init__(
        self,
        pool: PagePool,
        sources: Sources,
        now: Callable[[], float],
        host_bytes: int = 1 << 30,
        metrics: TierMetrics | None = None,
        policy: Policy | None = None,
    ) -> None:
        self._pool = pool
        self._now = now
        self._reader = Reader(pool, sources, policy or Policy())
        self._tiers = Tiers(pool, self._reader, host_bytes, metrics or NoMetrics(), self._moved)
        self._lock = self._tiers.lock
        self._entries: dict[str, _Entry] = {}
        self._numbers = count(1)
        self._listeners: dict[int, Listener] = {}
        self.residency = Residency(self._tiers)

    def reserve(self, new: NewAdapter, *, restored: bool = False) -> Reservation:
        """Take the name, in state LOADING; `load` then does the work.

        restored: its source was checked before; what is wrong with it now, `load` says. Returns the reservation. Raises
        InvalidRequest for a bad name or source, AdapterExists when the name is taken (a FAILED one may be taken over).
        """
        check_name(new.name)
        if not restored:
            self._reader.check(new.source)
        with self._lock:
            held = self._entries.get(new.name)
            if held is not None and not held.error:
                raise AdapterExists(new.name)
            entry = _Entry(new.name, new.source, dict(new.labels), new.pinned, self._now())
            self._entries[new.name] = entry
            self._tell(EventKind.ADDED if held is None else EventKind.CHANGED, entry)
            return Reservation(entry, held)

    def load(self, reservation: Reservation) -> AdapterInfo:
        """Read and validate a reserved adapter, once, and put it where there is room; blocks.

        Raises InvalidAdapter, Unavailable, and OutOfCapacity where it is pinned and the pages can't be had; the adapter
        is FAILED then, and says why. Raises AdapterNotFound when it was deleted meanwhile, whatever has taken its name.
        """
        entry = reservation.entry
        reason = "the load failed unexpectedly; the log says how"
        try:
            return self._change(entry, AdapterChange(source=entry.source), number=0)
        except WeftError as error:
            reason = str(error)
            raise
        finally:
            with self._lock:
                if entry.version is None:
                    self._fail(entry, reason)

    def give_up(self, reservation: Reservation, reason: str) -> None:
        """It will not be loaded, if that has not begun: FAILED, and not LOADING for ever."""
        with self._lock:
            if reservation.entry.version is None and not reservation.entry.error:
                self._fail(reservation.entry, reason)

    def create(self, new: NewAdapter) -> AdapterInfo:
        """Register and load in one call; on failure the name is as it was, unless an update has mended it."""
        reservation = self.reserve(new)
        try:
            return self.load(reservation)
        except BaseException:
            with self._lock:
                entry, before = reservation.entry, reservation.before
                if self._entries.get(new.name) is entry and entry.version is None:
                    if before is None:
                        self._remove(entry)
                    else:
                        self._entries[new.name] = before
                        self._tell(EventKind.CHANGED, before)
            raise

    def update(self, name: str, change: AdapterChange, allow: Allow = allow_all) -> AdapterInfo:
        """Change an adapter, all at once or not at all; blocks. Requests in flight finish on their version.

        Of changes that overlap, each field keeps what the one that was asked for last has set. Raises AdapterNotFound,
        InvalidRequest, InvalidAdapter, Unavailable, OutOfCapacity and what `allow` does; the adapter is as it was then.
        """
        if change.source is not None:
            self._reader.check(change.source)
        with self._lock:
            entry, number = self._entries.get(name), next(self._numbers)
        if entry is None:
            raise self._unknown(name)
        return self._change(entry, change, number, allow)

    def inspect(self, source: str) -> AdapterReport:
        """A dry run: what a source holds, what can't be served of it and why, what it would cost; blocks.

        Raises InvalidRequest for a source that may not be read, Unavailable for one that can't be just now.
        """
        self._reader.check(source)
        return self._reader.inspect(source)

    def get(self, name: str) -> AdapterInfo:
        """Raises AdapterNotFound."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is not None:
                return self._snapshot(entry)
        raise self._unknown(name)

    def labels_of(self, name: str) -> Mapping[str, str]:
        """The labels of an adapter; none where there is no such adapter."""
        with self._lock:
            entry = self._entries.get(name)
            return {} if entry is None else entry.labels

    def list(
        self, after: str = "", limit: int | None = None, wanted: Callable[[AdapterInfo], bool] = lambda _: True
    ) -> list[AdapterInfo]:
        """The registered adapters that are wanted, by name: those behind `after`, and no more than `limit`.

        The lock is held for a few at a time, for the engine waits for it: each is as it was at some time of the call.
        """
        with self._lock:
            names = [*self._entries]
        names = sorted(name for name in names if name > after)
        found: list[AdapterInfo] = []
        for start in range(0, len(names), _AT_ONCE):
            with self._lock:
                entries = filter(None, map(self._entries.get, names[start : start + _AT_ONCE]))
                infos = [self._snapshot(entry) for entry in entries]
            found += filter(wanted, infos)
            if limit is not None and len(found) >= limit:
                break
        return found[:limit]

    def num_in_state(self) -> Counter[AdapterState]:
        """How many adapters are in each state."""
        with self._lock:
            return Counter(map(_state, self._entries.values()))

    def delete(self, name: str, allow: Allow = allow_all) -> AdapterInfo:
        """Take the name away at once; requests in flight finish on their version.

        Raises AdapterNotFound, and what `allow` does.
        """
        with self._lock:
            entry = self._entries.get(name)
            if entry is not None:
                allow(entry.labels)
                return self._remove(entry)
        raise self._unknown(name)

    def acquire(self, adapter_id: str) -> AdapterRef:
        """Resolve `name` or `name@sha256:<hex>` to its version, in whatever tier, and hold it until `release`.

        Raises AdapterNotFound, also where the name now stands for another content than the digest says.
        """
        name, at, digest = adapter_id.partition("@")
        with self._lock:
            entry = self._entries.get(name)
            if entry is not None and (not at or _DIGEST.fullmatch(digest)):
                return self._refer(entry, adapter_id, digest)
        raise self._unknown(name, adapter_id)

    def release(self, ref: AdapterRef) -> None:
        """Give a version back, exactly once an `acquire`."""
        with self._lock:
            self.residency.forget(ref)
            ref.version.users -= 1
            self._tiers.settle_up(ref.version)

    def acquire_all(self, mix: Sequence[tuple[str, float]]) -> tuple[AdapterRef, ...]:
        """Acquire those of one request, each with its weight; if one can't be had, none is held.

        Raises AdapterNotFound, and InvalidRequest or OutOfCapacity where they can't be mixed, or not be on the device
        together.
        """
        refs: list[AdapterRef] = []
        try:
            for adapter_id, _ in mix:
                refs.append(self.acquire(adapter_id))
            if len(mix) > 1 or any(weight != 1.0 for _, weight in mix):
                check_mixable(refs)
            with self._lock:
                check_fit(self._tiers, {ref.version for ref in refs})
        except WeftError:
            for ref in refs:
                self.release(ref)
            raise
        return tuple(refs)

    def share(self, refs: Sequence[AdapterRef]) -> tuple[AdapterRef, ...]:
        """Hold the same versions once more, for another request, whatever their names stand for by now."""
        with self._lock:
            for ref in refs:
                ref.version.users += 1
            return tuple(AdapterRef(ref.name, ref.version, ref.failures) for ref in refs)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Tell a listener of every event from now on; what is returned ends that.

        It is called from any thread, with the store's lock held: so the order is right, and it must be quick.
        """
        with self._lock:
            number = next(self._numbers)
            self._listeners[number] = listener
        return lambda: self._unsubscribe(number)

    def wake_with(self, wake: Callable[[], None]) -> None:
        """Say what to call when requests that wait for adapters should be looked at again. From any thread; quick."""
        with self._lock:
            self._tiers.wake = wake

    @property
    def is_moving(self) -> bool:
        """Whether a thread reads or copies an adapter that is registered already."""
        return self._tiers.is_moving

    @property
    def num_pages(self) -> tuple[int, int]:
        """Pages in use, and pages there are."""
        allocator = self._pool.allocator
        return allocator.num_used, self._pool.num_pages

    def capacity(self) -> Capacity:
        """How much adapter memory there is, and how much of it is taken."""
        with self._lock:
            return Capacity(
                pages_total=self._pool.num_pages,
                pages_free=self._tiers.num_free_pages,
                pages_pinned=self._tiers.pages_pinned,
                page_rows=PAGE_ROWS,
                page_bytes=self._pool.page_bytes,
                host_bytes_total=self._tiers.host_bytes,
                host_bytes_used=self._tiers.host_bytes_used,
            )

    def check(self) -> None:
        """Audit the tiers, and the names against the versions. Raises AssertionError."""
        with self._lock:
            self._tiers.check()
            named = [entry for entry in self._entries.values() if entry.version is not None]
            for version in self._tiers.versions.values():
                entries = [entry for entry in named if entry.version is version]
                names = {entry.name: entry.source for entry in entries}
                assert version.names == names, f"{version.digest} has the names {version.names}, not {names}"
                assert version.pins >= sum(entry.pinned for entry in entries), f"{version.digest} lost a pin"
                assert version.keepers or version.pins == sum(entry.pinned for entry in entries), "a pin was left"
            assert all(self._tiers.versions.get(e.version.digest) is e.version for e in named if e.version is not None)

    def _change(self, entry: _Entry, change: AdapterChange, number: int, allow: Allow = allow_all) -> AdapterInfo:
        """Read what is new, put it where it belongs, and only then let the name stand for it."""
        with ExitStack() as kept:
            fresh = None if change.source is None else self._read(change.source, kept)
            placed: dict[AdapterVersion, bool] = {}
            while True:
                with self._lock:
                    version, pinned = self._outcome(entry, change, number, fresh)
                    allow(entry.labels)
                    as_before = version is entry.version and pinned <= entry.pinned
                    if version is None or as_before or placed.get(version, -1) >= pinned:
                        self._commit(entry, change, number, version, pinned=pinned)
                        break
                    self._keep(version, kept)
                self._tiers.settle(version, pinned=pinned)
                if pinned:
                    kept.callback(self._unpin, version)
                placed[version] = pinned
        with self._lock:
            return self._snapshot(entry)

    def _read(self, source: str, kept: ExitStack) -> AdapterVersion:
        host = self._reader.read(source)
        with self._lock:
            version = self._tiers.enter(host, source)
            self._keep(version, kept)
            return version

    def _keep(self, version: AdapterVersion, kept: ExitStack) -> None:
        version.keepers += 1
        kept.callback(self._leave, version)

    def _leave(self, version: AdapterVersion) -> None:
        with self._lock:
            version.keepers -= 1
            self._tiers.settle_up(version)

    def _unpin(self, version: AdapterVersion) -> None:
        with self._lock:
            self._tiers.unpin(version)

    def _outcome(
        self, entry: _Entry, change: AdapterChange, number: int, fresh: AdapterVersion | None
    ) -> tuple[AdapterVersion | None, bool]:
        """What the name would stand for after a change, and whether pinned. Raises AdapterNotFound if it is gone."""
        if self._entries.get(entry.name) is not entry:
            raise AdapterNotFound(entry.name, "it was deleted while it loaded")
        version = fresh if fresh is not None and _wins(entry, "source", number) else entry.version
        pinned = change.pinned if change.pinned is not None and _wins(entry, "pinned", number) else entry.pinned
        return version, pinned

    def _commit(
        self, entry: _Entry, change: AdapterChange, number: int, version: AdapterVersion | None, *, pinned: bool
    ) -> None:
        """Let the name stand for the version, and keep of the change what no later one has set."""
        old, was_pinned = entry.version, entry.pinned
        for name in ("source", "labels", "pinned"):
            value = getattr(change, name)
            if value is not None and _wins(entry, name, number):
                setattr(entry, name, value)
                entry.set_by[name] = number
        if version is not None:
            version.names[entry.name] = version.origin = entry.source
            entry.version, entry.error = version, ""
            if pinned:
                self._tiers.pin(version)
        if old is not None:
            self._let_go(old, entry if old is not version else None, pinned=was_pinned)
        self._tell(EventKind.CHANGED, entry)

    def _fail(self, entry: _Entry, reason: str) -> None:
        entry.error = reason
        if self._entries.get(entry.name) is entry:
            self._tell(EventKind.CHANGED, entry)

    def _let_go(self, version: AdapterVersion, name_of: _Entry | None, *, pinned: bool) -> None:
        if pinned:
            self._tiers.unpin(version)
        if name_of is not None:
            del version.names[name_of.name]
            self._tiers.settle_up(version)

    def _remove(self, entry: _Entry) -> AdapterInfo:
        info = self._snapshot(entry)
        del self._entries[entry.name]
        if entry.version is not None:
            self._let_go(entry.version, entry, pinned=entry.pinned)
        self._tell(EventKind.DELETED, entry, info)
        return info

    def _moved(self, version: AdapterVersion) -> None:
        for name in version.names if self._listeners else ():
            self._tell(EventKind.CHANGED, self._entries[name])

    def _tell(self, kind: EventKind, entry: _Entry, info: AdapterInfo | None = None) -> None:
        for listener in list(self._listeners.values()):
            listener(AdapterEvent(kind, info or self._snapshot(entry)))

    def _unsubscribe(self, number: int) -> None:
        with self._lock:
            self._listeners.pop(number, None)

    def _refer(self, entry: _Entry, adapter_id: str, digest: str) -> AdapterRef:
        """Raises AdapterNotFound unless the name stands for the content; any content, where the digest is empty."""
        if entry.version is None:
            raise AdapterNotFound(adapter_id, f"it is {_state(entry).value} {entry.error}".rstrip())
        if digest and entry.version.digest != digest:
            raise AdapterNotFound(adapter_id, f"the name now stands for {entry.version.digest}")
        entry.version.users += 1
        entry.last_used_s = self._now()
        return AdapterRef(entry.name, entry.version, entry.version.failures)

    def _unknown(self, name: str, adapter_id: str = "") -> AdapterNotFound:
        """Called without the lock: looking for the name that was meant takes a while."""
        with self._lock:
            names = [*self._entries]
        return AdapterNotFound(adapter_id or name, what_was_meant(name, names), names)

    def _snapshot(self, entry: _Entry) -> AdapterInfo:
        version = entry.version
        common = (
            *(entry.name, entry.source, entry.labels, entry.pinned),
            *(_state(entry), entry.error, entry.created_s, entry.last_used_s),
        )
        if version is None:
            return AdapterInfo(*common)
        return AdapterInfo(
            *common,
            digest=version.digest,
            ranks=version.ranks,
            modules=version.modules,
            num_pages=version.num_pages,
            device_bytes=version.num_pages * self._pool.page_bytes if version.resident else 0,
            host_bytes=version.host.num_bytes if version.host else 0,
            disk_bytes=version.disk_bytes,
            num_in_flight=version.users,
            probe_error=version.probe_error,
            classes=version.classes,
        )


def _wins(entry: _Entry, name: str, number: int) -> bool:
    """Whether no change that was asked for after this one has set the field."""
    return number > entry.set_by.get(name, -1)


def _state(entry: _Entry) -> AdapterState:
    if entry.version is not None:
        return AdapterState(entry.version.tier.value)
    return AdapterState.FAILED if entry.error else AdapterState.LOADING
