"""Compiled constraints for the API: each compiled once, off the event loop, a few at a time."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TypeVar

from weft.errors import InvalidRequest, OutOfCapacity, Problem
from weft.server.engine.constraints import Compiler, Constraint, Spec

_T = TypeVar("_T")


@dataclass(slots=True, eq=False)
class _Compile:
    """One that is queued or running. num_waiting: callers. has_begun: on its thread, which nothing can stop."""

    task: asyncio.Task[Constraint] = field(init=False)
    num_waiting: int = 0
    has_begun: bool = False


class ConstraintCache:
    """Keeps the constraints that were asked for last, and why others were refused. Belongs to one event loop."""

    def __init__(
        self, compiler: Compiler, max_entries: int = 128, max_compiling: int = 2, max_waiting: int = 256
    ) -> None:
        """max_entries: constraints that are kept, and refusals; max_compiling: at once; max_waiting: with those."""
        self._compiler = compiler
        self._max_entries = max_entries
        self._max_waiting = max_waiting
        self._slots = asyncio.Semaphore(max_compiling)
        self._known: OrderedDict[Spec, Constraint] = OrderedDict()
        self._refused: OrderedDict[Spec, Seq[Problem]] = OrderedDict()
        self._compiles: dict[Spec, _Compile] = {}

    def __len__(self) -> int:
        return len(self._known)

    async def get(self, spec: Spec) -> Constraint:
        """The compiled constraint; who asks for one that is being compiled waits for the same.

        One whose turn has not come when the last caller is cancelled is dropped. Raises InvalidRequest, at once for one
        that was refused before, or OutOfCapacity where too many are waiting.
        """
        if spec in self._known:
            self._known.move_to_end(spec)
            return self._known[spec]
        if spec in self._refused:
            self._refused.move_to_end(spec)
            raise InvalidRequest(self._refused[spec])
        compile_ = self._compiles.get(spec) or self._begin(spec)
        compile_.num_waiting += 1
        try:
            return await asyncio.shield(compile_.task)
        finally:
            compile_.num_waiting -= 1
            if not compile_.num_waiting and not compile_.has_begun:
                self._forget(spec, compile_)
                compile_.task.cancel()

    def _begin(self, spec: Spec) -> _Compile:
        if len(self._compiles) >= self._max_waiting:
            raise OutOfCapacity(f"{len(self._compiles)} constraints are waiting to be compiled, as many as may")
        compile_ = self._compiles[spec] = _Compile()
        compile_.task = asyncio.create_task(self._compile(spec, compile_))
        compile_.task.add_done_callback(lambda done: self._end(spec, compile_, done))
        return compile_

    async def _compile(self, spec: Spec, compile_: _Compile) -> Constraint:
        async with self._slots:
            compile_.has_begun = True
            return await asyncio.to_thread(self._compiler.compile, spec)

    def _end(self, spec: Spec, compile_: _Compile, done: asyncio.Task[Constraint]) -> None:
        self._forget(spec, compile_)
        if done.cancelled():
            return
        error = done.exception()  # looked at here, for nobody may be waiting any more
        if error is None:
            self._keep(self._known, spec, done.result())
        elif isinstance(error, InvalidRequest):
            self._keep(self._refused, spec, error.problems)

    def _keep(self, kept: OrderedDict[Spec, _T], spec: Spec, value: _T) -> None:
        kept[spec] = value
        if len(kept) > self._max_entries:
            kept.popitem(last=False)

    def _forget(self, spec: Spec, compile_: _Compile) -> None:
        """It may have been dropped before, and another begun in its place."""
        if self._compiles.get(spec) is compile_:
            del self._compiles[spec]
