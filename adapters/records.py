"""What is told of adapters, and what is asked: plain records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from weft.adapters.classes import Classes


class AdapterState(Enum):
    """Where an adapter is. Requests can use it in DISK, HOST and DEVICE; it is brought to the device for them."""

    LOADING = "loading"
    DISK = "disk"
    HOST = "host"
    DEVICE = "device"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A snapshot of one registered adapter. Times are seconds since the epoch, bytes those that it takes now."""

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
    num_pages: int = 0
    device_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0
    num_in_flight: int = 0
    probe_error: float | None = None
    classes: Classes | None = None


@dataclass(frozen=True, slots=True)
class NewAdapter:
    """What to register."""

    name: str
    source: str
    labels: Mapping[str, str] = field(default_factory=dict)
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class AdapterChange:
    """What to change of a registered adapter; None leaves it as it is."""

    source: str | None = None
    labels: Mapping[str, str] | None = None
    pinned: bool | None = None


Allow = Callable[[Mapping[str, str]], None]
"""Is told the labels that an adapter has when it is changed, with the store's lock held; raises what prevents that."""


def allow_all(_labels: Mapping[str, str]) -> None:
    """Prevent nothing."""


class EventKind(Enum):
    """What happened to a name."""

    ADDED = "added"
    CHANGED = "changed"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class AdapterEvent:
    """A name came, went, or stands otherwise now. info: as it is after the event, or was before it was deleted."""

    kind: EventKind
    info: AdapterInfo


Listener = Callable[[AdapterEvent], None]


@dataclass(frozen=True, slots=True)
class Capacity:
    """How much adapter memory there is, and how much of it is taken."""

    pages_total: int
    pages_free: int
    pages_pinned: int
    page_rows: int
    page_bytes: int
    host_bytes_total: int
    host_bytes_used: int
