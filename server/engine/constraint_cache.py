"""Compiled constraints for the API: each compiled once, off the event loop, a few at a time."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from weft.errors import OutOfCapacity
from weft.server.engine.constraints import Compiler, Constraint, Spec


class ConstraintCache:
    """Keeps the constraints that were asked for last. Belongs to one event loop."""

    def __init__(
        self, compiler: Compiler, max_entries: int = 128, max_compiling: int = 2, max_waiting: int = 256
    ) -> None:
        """max_entries: constraints that are kept; max_compiling: at once; max_waiting: with those."""
        self._compiler = compiler
        self._max_entries = max_entries
        self._max_waiting = max_waiting
        self._slots = asyncio.Semaphore(max_compiling)
        self._known: OrderedDict[Spec, Constraint] = OrderedDict()
        self._running: dict[Spec, asyncio.Task[Constraint]] = {}

    def __len__(self) -> int:
        return len(self._known)

    async def get(self, spec: Spec) -> Constraint:
        """The compiled constraint; who asks for one that is being compiled waits for the same.

        Raises InvalidRequest, or OutOfCapacity where too many are waiting.
        """
        if spec in self._known:
            self._known.move_to_end(spec)
            return self._known[spec]
        if spec not in self._running:
            if len(self._running) >= self._max_waiting:
                raise OutOfCapacity(f"{len(self._running)} constraints are waiting to be compiled, as many as may")
            self._running[spec] = asyncio.create_task(self._compile(spec))
            self._running[spec].add_done_callback(lambda done: self._end(spec, done))
        return await asyncio.shield(self._running[spec])

    async def _compile(self, spec: Spec) -> Constraint:
        async with self._slots:
            return await asyncio.to_thread(self._compiler.compile, spec)

    def _end(self, spec: Spec, done: asyncio.Task[Constraint]) -> None:
        del self._running[spec]
        if done.cancelled() or done.exception() is not None:  # looked at here, for nobody may be waiting any more
            return
        self._known[spec] = done.result()
        if len(self._known) > self._max_entries:
            self._known.popitem(last=False)
