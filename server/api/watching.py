"""Everybody who watches the adapters, and what each is still to be told.

The store calls one listener, under its lock; that notes the latest of each name and no more. What is noted is handed
out on the event loop, to which everything else here belongs. A watcher holds one entry a name, so that a client that
never reads holds up nobody, and costs no more than the registry is large.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field

from weft.adapters.records import AdapterEvent, AdapterInfo, EventKind
from weft.adapters.store import AdapterStore
from weft.errors import Unauthenticated, Unavailable, WeftError
from weft.server.api.adapter_fields import AdapterFilter

Told = tuple[EventKind, AdapterInfo] | None
"""What a watcher is told next; None: all that were there at the beginning have been."""


@dataclass(slots=True, eq=False)
class Watch:
    """What one watcher has been told, and what it has not.

    The first entries of `_untold` are the adapters that were there at the beginning. A name is never in it that was not
    told of and is gone. Of one that the caller may not use any more, what was told last is told again.
    """

    wanted: AdapterFilter
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    _untold: dict[str, tuple[AdapterInfo, bool]] = field(default_factory=dict)
    _first: set[str] = field(default_factory=set)
    _told: dict[str, AdapterInfo] = field(default_factory=dict)
    refusal: WeftError | None = None
    """Why it ends, where it was ended alone."""
    _is_listed: bool = False

    def begin(self, present: Iterable[AdapterInfo]) -> None:
        """Tell of these first."""
        for info in present:
            self.take(info, gone=False)
        self._first.update(self._untold)
        self.ready.set()

    def take(self, info: AdapterInfo, *, gone: bool) -> None:
        """Tell of this, in the place of what was still to be told of the name. gone: it was deleted."""
        if self.wanted.matches(info) and not gone:
            self._untold[info.name] = (info, False)
        elif info.name in self._told:
            is_seen = self.wanted.caller.may_use(info.name, info.labels)
            self._untold[info.name] = (info if is_seen else self._told[info.name], True)
        else:
            self._untold.pop(info.name, None)
            self._first.discard(info.name)
        self.ready.set()

    def end(self, refusal: WeftError) -> None:
        """Tell nothing more."""
        self.refusal = refusal
        self.ready.set()

    @property
    def has_more(self) -> bool:
        return bool(self._untold) or not self._is_listed

    def next(self) -> Told:
        """What to tell now; there must be more."""
        if not self._first and not self._is_listed:
            self._is_listed = True
            return None
        name = next(iter(self._untold))
        info, gone = self._untold.pop(name)
        self._first.discard(name)
        if gone:
            del self._told[name]
            return EventKind.DELETED, info
        kind = EventKind.CHANGED if name in self._told else EventKind.ADDED
        self._told[name] = info
        return kind, info


class Watchers:
    """Serves watchers of one store on one event loop. It listens to the store while there is one."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        self._watches: set[Watch] = set()
        self._lock = threading.Lock()
        self._latest: dict[str, AdapterEvent] = {}
        self._unsubscribe: Callable[[], None] = lambda: None
        self._refusal: str | None = None

    async def watch(self, wanted: AdapterFilter) -> AsyncGenerator[Told]:
        """First what is there, then None, then what changes.

        Raises Unavailable when it is closed, Unauthenticated when the token of who asked has expired.
        """
        self._check_open()
        watch = Watch(wanted)
        self._enter(watch)
        expiry = _end_with_token(watch)
        try:
            watch.begin(self._store.list())
            while True:
                await watch.ready.wait()
                self._check_open(watch)
                if watch.has_more:
                    yield watch.next()
                else:
                    watch.ready.clear()
        finally:
            if expiry is not None:
                expiry.cancel()
            self._leave(watch)

    def close(self, refusal: str) -> None:
        """End every watch, and refuse those that come."""
        self._refusal = refusal
        for watch in self._watches:
            watch.ready.set()

    def begin_anew(self) -> None:
        """End every watch, for its caller's rights may be others now; each may be asked for again."""
        for watch in self._watches:
            watch.end(Unavailable("who may see what has changed: watch again"))

    def _check_open(self, watch: Watch | None = None) -> None:
        if self._refusal is not None:
            raise Unavailable(self._refusal)
        if watch is not None and watch.refusal is not None:
            raise watch.refusal

    def _enter(self, watch: Watch) -> None:
        if not self._watches:
            loop = asyncio.get_running_loop()
            self._unsubscribe = self._store.subscribe(lambda event: self._note(event, loop))
        self._watches.add(watch)

    def _leave(self, watch: Watch) -> None:
        self._watches.discard(watch)
        if not self._watches:
            self._unsubscribe()
            self._take_noted()  # what is older than the list that the next watcher begins with

    def _note(self, event: AdapterEvent, loop: asyncio.AbstractEventLoop) -> None:
        """The listener: on any thread, with the store's lock held."""
        with self._lock:
            is_first = not self._latest
            self._latest[event.info.name] = event
        if is_first:
            loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        for event in self._take_noted():
            for watch in self._watches:
                watch.take(event.info, gone=event.kind is EventKind.DELETED)

    def _take_noted(self) -> Iterable[AdapterEvent]:
        with self._lock:
            noted, self._latest = self._latest, {}
        return noted.values()


def _end_with_token(watch: Watch) -> asyncio.TimerHandle | None:
    """A watch has no end of its own: it would outlive what let it in."""
    left_s = watch.wanted.caller.left_s
    if left_s is None:
        return None
    expired = Unauthenticated("the token has expired: watch again with another")
    return asyncio.get_running_loop().call_later(left_s(), watch.end, expired)
