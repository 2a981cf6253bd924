"""Between asyncio and the engine thread: requests go in, streams of deltas come out.

Everything here but `_run` and what it calls belongs to the event loop's thread; the two sides share only the inbox (a
thread-safe queue) and `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Iterable, Mapping
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from types import MappingProxyType

from weft.adapters.residency import AdapterRef
from weft.adapters.store import AdapterStore
from weft.errors import InvalidRequest, Unavailable, WeftError
from weft.server.engine.engine import Engine, Event
from weft.server.engine.limits import check_use
from weft.server.engine.queue_limits import QueueGate, QueueLimits
from weft.server.engine.request import Delta, Request

_log = logging.getLogger(__name__)

NOBODY: Mapping[Request, float] = MappingProxyType({})

MAX_JOINED_TOKENS = 512
"""Of deltas that piled up and go out as one: even with every alternative told, far below what a gRPC client takes."""


@dataclass(frozen=True, slots=True)
class _Add:
    request: Request
    adapters: tuple[AdapterRef, ...]


@dataclass(frozen=True, slots=True)
class _Cancel:
    request: Request


class _Wake:
    """Look again at the requests that wait for adapters."""


class _Stop:
    """End the thread; requests still running are answered with Unavailable."""


@dataclass(slots=True, eq=False)
class Stream:
    """One answer on its way: iterate it for deltas; the last one has `finish` set.

    The engine never waits for who iterates: what comes meanwhile piles up, and then comes together. So a stream holds
    no more than its answer.

    index: its place among the answers that share its queue of events. begun_s: since when it runs, on the engine's
    clock.
    """

    adapters: tuple[AdapterRef, ...]
    index: int = 0
    events: asyncio.Queue[tuple[int, Delta | WeftError]] = field(default_factory=asyncio.Queue)
    ended: bool = False
    begun_s: float | None = None

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Raises the WeftError that ended the request, if one did."""
        async for _, delta in _follow(self.events, 1):
            yield delta


@dataclass(frozen=True, slots=True)
class Streams:
    """Answers that belong together: iterate for deltas of all as they come, each with its answer's index."""

    members: Seq[Stream]

    @property
    def adapters(self) -> tuple[AdapterRef, ...]:
        return self.members[0].adapters

    def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        """Raises the WeftError that ended one of the requests first, if one did."""
        return _follow(self.members[0].events, len(self.members))


async def _follow(
    events: asyncio.Queue[tuple[int, Delta | WeftError]], num_answers: int
) -> AsyncIterator[tuple[int, Delta]]:
    """What comes until so many answers are complete."""
    while num_answers:
        deltas, error = _take(await events.get(), events)
        for index, parts in deltas.items():
            delta = Delta.join(parts)
            num_answers -= delta.finish is not None
            yield index, delta
        if error is not None:
            raise error


def _take(
    event: tuple[int, Delta | WeftError], events: asyncio.Queue[tuple[int, Delta | WeftError]]
) -> tuple[dict[int, list[Delta]], WeftError | None]:
    """One event and what else has come by now, by answer, up to MAX_JOINED_TOKENS or an error."""
    deltas: dict[int, list[Delta]] = {}
    num_tokens = 0
    while True:
        index, what = event
        if isinstance(what, WeftError):
            return deltas, what
        deltas.setdefault(index, []).append(what)
        num_tokens += len(what.tokens)
        if events.empty() or num_tokens >= MAX_JOINED_TOKENS:
            return deltas, None
        event = events.get_nowait()


class Frontend:
    """Runs an engine on its own thread and serves its answers to coroutines of one event loop."""

    def __init__(self, engine: Engine, store: AdapterStore, limits: QueueLimits) -> None:
        """limits: what may be queued or running at once; more is refused."""
        self._engine = engine
        self._store = store
        self._gate = QueueGate(limits, lambda: engine.queued_token_s, lambda: engine.is_full)
        self._inbox: queue.SimpleQueue[_Add | _Cancel | _Wake | _Stop] = queue.SimpleQueue()
        self._streams: dict[Request, Stream] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._refusal: str | None = "the server is starting"
        self._thread: threading.Thread | None = None
        self.lost = asyncio.Event()
        """Set when the engine thread died; every later request is refused."""

    def start(self) -> None:
        """Start the engine thread; must be called on the event loop that will submit."""
        loop = asyncio.get_running_loop()
        self._store.wake_with(lambda: self._inbox.put(_Wake()))
        self._thread = threading.Thread(target=self._run, args=(loop,), name="weft-engine", daemon=True)
        self._thread.start()
        self._refusal = None

    def check(self, request: Request) -> None:
        """Raises InvalidRequest for a prompt that can't be run, as `stream` would."""
        self._engine.check(request)

    @asynccontextmanager
    async def stream(self, request: Request) -> AsyncIterator[Stream]:
        """Submit a request and hold its stream; leaving the block early cancels it within a step.

        Raises Unavailable, OutOfCapacity, InvalidRequest or AdapterNotFound before anything is held.
        """
        async with self.streams([request]) as streams:
            yield streams.members[0]

    @asynccontextmanager
    async def streams(self, requests: Seq[Request]) -> AsyncIterator[Streams]:
        """As `stream`, for requests with the same adapters: all or none, and all on the same versions of them."""
        members: list[Stream] = []
        try:
            for request in requests:
                members.append(self._submit(request, members))
            yield Streams(members)
        finally:
            for request, stream in zip(requests, members, strict=False):
                if not stream.ended:
                    self._inbox.put(_Cancel(request))
                    self._end(request)

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests, let those in flight finish for up to `grace_s`, then end the thread."""
        self._refusal = "the server is draining"
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_s)
        if self._streams:
            _log.warning("drain: %d requests did not finish within %g s", len(self._streams), grace_s)
        self._inbox.put(_Stop())
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _submit(self, request: Request, others: Seq[Stream]) -> Stream:
        """others: the streams that the new one belongs to."""
        if self._refusal is not None:
            raise Unavailable(self._refusal)
        self._gate.check(request)
        self._engine.check(request)
        if others:
            stream = Stream(self._store.share(others[0].adapters), len(others), others[0].events)
        else:
            stream = Stream(self._acquire(request))
        self._streams[request] = stream
        self._gate.enter(request)
        self._idle.clear()
        self._inbox.put(_Add(request, stream.adapters))
        return stream

    def _acquire(self, request: Request) -> tuple[AdapterRef, ...]:
        adapters = self._store.acquire_all(request.adapters)
        try:
            check_use(request, adapters, self._engine.limits.abilities)
        except InvalidRequest:
            for ref in adapters:
                self._store.release(ref)
            raise
        return adapters

    def _end(self, request: Request) -> None:
        stream = self._streams.pop(request, None)
        if stream is not None:
            self._gate.leave(request)
            stream.ended = True
        if not self._streams:
            self._idle.set()

    def _deliver(self, events: Iterable[Event], begun: Mapping[Request, float] = NOBODY) -> None:
        for request, begun_s in begun.items():
            self._gate.begin(request)
            if request in self._streams:
                self._streams[request].begun_s = begun_s
        for request, event in events:
            stream = self._streams.get(request)
            if stream is None:  # cancelled meanwhile
                continue
            stream.events.put_nowait((stream.index, event))
            if isinstance(event, WeftError) or event.finish is not None:
                self._end(request)

    def _engine_lost(self) -> None:
        self._refusal = "the engine stopped unexpectedly"
        self.lost.set()
        self._deliver([(request, Unavailable(self._refusal)) for request in list(self._streams)])

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        """The engine thread: take what came in, run a step, hand out what it made."""
        try:
            while self._take_commands():
                events = self._engine.step()
                begun = self._engine.begun
                if events or begun:
                    loop.call_soon_threadsafe(self._deliver, events, begun)
            loop.call_soon_threadsafe(self._deliver, self._engine.abort_all(Unavailable("the server is stopping")))
        except BaseException:  # noqa: BLE001 - the edge of the thread: nobody above it would answer the requests
            _log.critical("the engine thread died", exc_info=True)
            loop.call_soon_threadsafe(self._engine_lost)

    def _take_commands(self) -> bool:
        """Apply all waiting commands; wait for one while there is nothing to do without. False: stop."""
        wait_s = self._engine.idle_s
        while True:
            try:
                command = self._inbox.get(timeout=wait_s)
            except queue.Empty:
                return True
            wait_s = 0.0
            match command:
                case _Add(request, adapters):
                    self._engine.add(request, adapters)
                case _Cancel(request):
                    self._engine.cancel(request)
                case _Wake():
                    pass
                case _:
                    return False
