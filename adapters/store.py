"""Adapters by name: registered, versioned by content, pinned while requests use them.

A name is an alias; identity is the digest of the content. A request acquires a *version* and keeps it to its end,
whatever happens to the name meanwhile. Two names for the same content share its pages.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from enum import Enum

from weft.adapters.content import LoraWeights
from weft.adapters.folder import load_folder
from weft.adapters.pages import PagePool, Runs
from weft.adapters.sources import Sources
from weft.errors import (
    AdapterExists,
    AdapterNotFound,
    InvalidRequest,
    OutOfCapacity,
    WeftError,
)
from weft.kernels.plan import PagedAdapter

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class AdapterState(Enum):
    """Where an adapter is; DEVICE means that requests can use it."""

    LOADING = "loading"
    DEVICE = "device"
    FAILED = "failed"


@dataclass(eq=False, slots=True)
class AdapterVersion:
    """One content in device pages. `names` and `users` (requests in flight) keep it there."""

    digest: str
    paged: PagedAdapter
    ranks: tuple[int, ...]
    modules: tuple[str, ...]
    device_bytes: int
    disk_bytes: int
    names: int = 0
    users: int = 0


@dataclass(slots=True)
class _Entry:
    """A name in the registry."""

    name: str
    source: str
    labels: Mapping[str, str]
    pinned: bool
    created_s: float
    last_used_s: float | None = None
    state: AdapterState = AdapterState.LOADING
    error: str = ""
    version: AdapterVersion | None = None


@dataclass(frozen=True, slots=True)
class Reservation:
    """A name that was taken for one adapter, to be loaded."""

    entry: _Entry


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A snapshot of one registered adapter. Times are seconds since the epoch."""

    name: str
    source: str
    labels: Mapping[str, str]
    pinned: bool
    state: AdapterState
    error: str
    created_s: float
    last_used_s: float | None
    digest: str = ""
    ranks: tuple[int, ...] = ()
    modules: tuple[str, ...] = ()
    device_bytes: int = 0
    disk_bytes: int = 0
    num_in_flight: int = 0


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """What a request holds: the name it asked for, and the version that it got."""

    name: str
    version: AdapterVersion


@dataclass(frozen=True, slots=True)
class NewAdapter:
    """What to register."""

    name: str
    source: str
    labels: Mapping[str, str] = field(default_factory=dict)
    pinned: bool = False


class AdapterStore:
    """The registry of adapters on one page pool. Every method may be called from any thread.

    sources: where adapters may come from. now: seconds since the epoch.
    """

    def __init__(self, pool: PagePool, sources: Sources, now: Callable[[], float]) -> None:
        self._pool = pool
        self._sources = sources
        self._now = now
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._versions: dict[str, AdapterVersion] = {}

    def reserve(self, new: NewAdapter) -> Reservation:
        """Take the name, in state LOADING; `load` then does the work.

        Returns the reservation. Raises InvalidRequest for a bad name or source, AdapterExists when the name is taken
        (a FAILED one may be taken over).
        """
        check_name(new.name)
        self._sources.check(new.source)
        with self._lock:
            held = self._entries.get(new.name)
            if held is not None and held.state is not AdapterState.FAILED:
                raise AdapterExists(new.name)
            entry = _Entry(new.name, new.source, dict(new.labels), new.pinned, self._now())
            self._entries[new.name] = entry
            return Reservation(entry)

    def load(self, reservation: Reservation) -> AdapterInfo:
        """Bring a reserved adapter into device pages, once; blocks while it reads and copies.

        Raises InvalidAdapter, OutOfCapacity; the adapter is FAILED then, and says why. Raises AdapterNotFound when it
        was deleted meanwhile, whatever has taken its name since.
        """
        entry = reservation.entry
        reason = "the load failed unexpectedly; the log says how"
        try:
            weights = load_folder(self._sources.fetch(entry.source), entry.source, self._pool.base)
            self._pool.check_range(weights, entry.source)
            self._make_resident(entry, weights)
        except WeftError as error:
            reason = str(error)
            raise
        finally:
            with self._lock:
                if entry.version is None:
                    entry.state, entry.error = AdapterState.FAILED, reason
        with self._lock:
            return _snapshot(entry)

    def create(self, new: NewAdapter) -> AdapterInfo:
        """Register and load in one call; on failure the name is free again."""
        reservation = self.reserve(new)
        try:
            return self.load(reservation)
        except BaseException:
            with self._lock:
                if self._entries.get(new.name) is reservation.entry:
                    del self._entries[new.name]
            raise

    def get(self, name: str) -> AdapterInfo:
        """Raises AdapterNotFound."""
        with self._lock:
            return _snapshot(self._entry(name))

    def list(self) -> list[AdapterInfo]:
        """Every registered adapter, by name."""
        with self._lock:
            return [_snapshot(entry) for _, entry in sorted(self._entries.items())]

    def delete(self, name: str) -> AdapterInfo:
        """Take the name away at once; requests in flight finish on their version. Raises AdapterNotFound."""
        with self._lock:
            entry = self._entry(name)
            info = _snapshot(entry)
            del self._entries[name]
            if entry.version is not None:
                entry.version.names -= 1
                self._drop_if_unused(entry.version)
            return info

    def acquire(self, adapter_id: str) -> AdapterRef:
        """Resolve `name` or `name@sha256:<hex>` to its version and hold it until `release`.

        Raises AdapterNotFound, also where the name now stands for another content than the digest says.
        """
        name, at, digest = adapter_id.partition("@")
        with self._lock:
            entry = self._entries.get(name)
            if entry is None or (at and not _DIGEST.fullmatch(digest)):
                raise AdapterNotFound(adapter_id, self._nearest(name))
            if entry.version is None:
                raise AdapterNotFound(adapter_id, f"it is {entry.state.value} {entry.error}".rstrip())
            if digest and entry.version.digest != digest:
                raise AdapterNotFound(adapter_id, f"the name now stands for {entry.version.digest}")
            entry.version.users += 1
            entry.last_used_s = self._now()
            return AdapterRef(name, entry.version)

    def release(self, ref: AdapterRef) -> None:
        """Give a version back, exactly once an `acquire`."""
        with self._lock:
            ref.version.users -= 1
            self._drop_if_unused(ref.version)

    def acquire_all(self, adapter_ids: Iterable[str]) -> tuple[AdapterRef, ...]:
        """Acquire several; if one can't be had, none is held. Raises AdapterNotFound."""
        refs: list[AdapterRef] = []
        try:
            for adapter_id in adapter_ids:
                refs.append(self.acquire(adapter_id))  # noqa: PERF401 - what is held must be known if the next fails
        except AdapterNotFound:
            for ref in refs:
                self.release(ref)
            raise
        return tuple(refs)

    @property
    def num_pages(self) -> tuple[int, int]:
        """Pages in use, and pages there are."""
        allocator = self._pool.allocator
        return allocator.num_used, allocator.num_pages - 1

    def check(self) -> None:
        """Audit the page pool against the versions. Raises AssertionError."""
        with self._lock:
            self._pool.allocator.check([version.paged.runs for version in self._versions.values()])
            for version in self._versions.values():
                names = sum(entry.version is version for entry in self._entries.values())
                assert version.names == names, f"{version.digest} counts {version.names} names, has {names}"
                assert version.names + version.users > 0, f"{version.digest} is held by nobody"

    def _make_resident(self, entry: _Entry, weights: LoraWeights) -> None:
        """Point the entry at its content's version; the copy runs outside the lock, beside requests and steps."""
        with self._lock:
            known = self._versions.get(weights.digest)
            runs = None if known else self._pool.allocate(weights)
        fresh = self._new_version(weights, self._write(runs, weights)) if runs else None
        with self._lock:
            version = self._versions.get(weights.digest) or fresh
            if fresh is not None and version is not fresh:  # another load of the same content was first
                self._pool.free(fresh.paged.runs)
            if version is None:  # the version known before the copy has gone since
                raise OutOfCapacity("the adapter's pages were given back while it loaded: try again", retry_after_s=0.1)
            self._versions[version.digest] = version
            if self._entries.get(entry.name) is entry:
                version.names += 1
                entry.version, entry.state, entry.error = version, AdapterState.DEVICE, ""
            else:
                self._drop_if_unused(version)
                raise AdapterNotFound(entry.name, "it was deleted while it loaded")

    def _write(self, runs: Runs, weights: LoraWeights) -> PagedAdapter:
        try:
            return self._pool.write(runs, weights)
        except BaseException:
            with self._lock:
                self._pool.free(runs)
            raise

    def _new_version(self, weights: LoraWeights, paged: PagedAdapter) -> AdapterVersion:
        return AdapterVersion(
            digest=weights.digest,
            paged=paged,
            ranks=weights.ranks,
            modules=weights.touched,
            device_bytes=sum(last - first for first, last in paged.runs) * self._pool.page_bytes,
            disk_bytes=weights.num_bytes,
        )

    def _drop_if_unused(self, version: AdapterVersion) -> None:
        if version.names == 0 and version.users == 0:
            del self._versions[version.digest]
            self._pool.free(version.paged.runs)

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise AdapterNotFound(name, self._nearest(name))
        return entry

    def _nearest(self, name: str) -> str:
        close = get_close_matches(name, self._entries, n=1)
        return f"did you mean {close[0]!r}?" if close else "list what is loaded with `weft adapters list`"


def check_name(name: str) -> None:
    """Raises InvalidRequest unless the name may stand for an adapter."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidRequest.of(
            "adapter.name",
            f"is {name!r}; must be 1 to 128 letters, digits, '.', '_', '/' or '-', start with a letter or digit and "
            "not hold '..'",
        )


def _snapshot(entry: _Entry) -> AdapterInfo:
    version = entry.version
    common = AdapterInfo(
        name=entry.name,
        source=entry.source,
        labels=entry.labels,
        pinned=entry.pinned,
        state=entry.state,
        error=entry.error,
        created_s=entry.created_s,
        last_used_s=entry.last_used_s,
    )
    if version is None:
        return common
    return replace(
        common,
        digest=version.digest,
        ranks=version.ranks,
        modules=version.modules,
        device_bytes=version.device_bytes,
        disk_bytes=version.disk_bytes,
        num_in_flight=version.users,
    )
