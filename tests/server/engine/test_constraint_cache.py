"""Compiled once each, off the event loop, a few at a time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence as Seq

import pytest

from weft.errors import InvalidRequest, OutOfCapacity
from weft.server.engine.constraint_cache import ConstraintCache
from weft.server.engine.constraints import Compiler, Constraint, Kind, Spec, UnsupportedTokenizer

A, B, C = (Spec(Kind.REGEX, (text,)) for text in "abc")
BROKEN = Spec(Kind.REGEX, ("broken",))


class SlowCompiler(Compiler):
    """Compiles when it is let; keeps what it was asked and by how many at once."""

    def __init__(self) -> None:
        super().__init__(UnsupportedTokenizer("there is none"))
        self.go = threading.Event()
        self.begun = threading.Event()
        self.asked: list[Spec] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()

    def compile(self, spec: Spec) -> Constraint:
        with self._lock:
            self.asked.append(spec)
            self.begun.set()
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        assert self.go.wait(60)
        with self._lock:
            self._at_once -= 1
        if spec == BROKEN:
            raise ZeroDivisionError
        if spec.texts == C.texts:
            raise InvalidRequest.of("regex", "is refused")
        return Constraint(spec.kind, None, 0, None)  # type: ignore[arg-type]


async def gather(cache: ConstraintCache, specs: Seq[Spec], compiler: SlowCompiler) -> list[Constraint | BaseException]:
    tasks = [asyncio.create_task(cache.get(spec)) for spec in specs]
    assert await asyncio.to_thread(compiler.begun.wait, 60)
    compiler.go.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_equal_ones_are_compiled_once_and_kept() -> None:
    async def scenario() -> None:
        cache, compiler = _cache()
        first, again, other = await gather(cache, (A, A, B), compiler)
        assert first is again is not other
        assert await cache.get(Spec(Kind.REGEX, ("a",))) is first
        assert sorted(spec.texts for spec in compiler.asked) == [("a",), ("b",)]

    asyncio.run(scenario())


def test_those_asked_for_last_are_kept() -> None:
    async def scenario() -> None:
        cache, compiler = _cache(max_entries=2)
        compiler.go.set()
        others = [Spec(Kind.REGEX, (str(i),)) for i in range(5)]
        for spec in (A, *others):
            await cache.get(A)
            await cache.get(spec)
        assert len(cache) == 2
        assert compiler.asked.count(A) == 1

    asyncio.run(scenario())


def test_a_refused_one_is_refused_to_all_who_wait_and_then_at_once() -> None:
    async def scenario() -> None:
        cache, compiler = _cache()
        errors = await gather(cache, (C, C), compiler)
        assert [str(error) for error in errors] == ["regex: is refused"] * 2
        with pytest.raises(InvalidRequest, match="regex: is refused"):
            await cache.get(C)
        assert compiler.asked == [C]
        assert len(cache) == 0

    asyncio.run(scenario())


def test_as_many_refusals_as_constraints_are_remembered() -> None:
    async def scenario() -> None:
        cache, compiler = _cache(max_entries=1)
        compiler.go.set()
        for spec in (C, Spec(Kind.GRAMMAR, ("c",)), C):
            with pytest.raises(InvalidRequest):
                await cache.get(spec)
        assert len(compiler.asked) == 3

    asyncio.run(scenario())


def test_an_error_of_another_kind_is_not_remembered() -> None:
    async def scenario() -> None:
        cache, compiler = _cache()
        compiler.go.set()
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await cache.get(BROKEN)
        assert compiler.asked == [BROKEN, BROKEN]

    asyncio.run(scenario())


def test_who_gives_up_does_not_stop_it_for_others() -> None:
    async def scenario() -> None:
        cache, compiler = _cache()
        impatient = asyncio.create_task(cache.get(A))
        assert await asyncio.to_thread(compiler.begun.wait, 60)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        await gather(cache, (A,), compiler)
        assert compiler.asked == [A]

    asyncio.run(scenario())


def test_one_that_nobody_waits_for_any_more_is_dropped_from_the_queue() -> None:
    async def scenario() -> None:
        cache, compiler = _cache(max_compiling=1, max_waiting=2)
        running = asyncio.create_task(cache.get(A))
        assert await asyncio.to_thread(compiler.begun.wait, 60)
        queued = [asyncio.create_task(cache.get(B)) for _ in range(2)]
        await asyncio.sleep(0)
        for task in queued:
            task.cancel()
        await asyncio.gather(*queued, return_exceptions=True)
        later = asyncio.create_task(cache.get(Spec(Kind.REGEX, ("d",))))  # finds a place in the queue again
        await asyncio.sleep(0)
        compiler.go.set()
        await asyncio.gather(running, later)
        assert [spec.texts for spec in compiler.asked] == [("a",), ("d",)]

    asyncio.run(scenario())


def test_one_that_is_still_waited_for_stays_in_the_queue_and_one_dropped_can_be_asked_for_again() -> None:
    async def scenario() -> None:
        cache, compiler = _cache(max_compiling=1)
        running = asyncio.create_task(cache.get(A))
        assert await asyncio.to_thread(compiler.begun.wait, 60)
        queued = [asyncio.create_task(cache.get(spec)) for spec in (B, B, C)]
        await asyncio.sleep(0)
        queued[0].cancel()
        queued[2].cancel()
        await asyncio.gather(queued[0], queued[2], return_exceptions=True)
        again = asyncio.create_task(cache.get(C))
        await asyncio.sleep(0)
        compiler.go.set()
        _, kept, refused = await asyncio.gather(running, queued[1], again, return_exceptions=True)
        assert isinstance(kept, Constraint)
        assert isinstance(refused, InvalidRequest)
        assert compiler.asked == [A, B, C]

    asyncio.run(scenario())


def test_few_at_once_and_not_too_many_waiting() -> None:
    async def scenario() -> None:
        cache, compiler = _cache(max_compiling=2, max_waiting=5)
        specs = [Spec(Kind.REGEX, (str(i),)) for i in range(6)]
        *made, refused = await gather(cache, specs, compiler)
        assert all(isinstance(one, Constraint) for one in made)
        assert isinstance(refused, OutOfCapacity)
        assert compiler.most_at_once <= 2

    asyncio.run(scenario())


def _cache(**limits: int) -> tuple[ConstraintCache, SlowCompiler]:
    compiler = SlowCompiler()
    return ConstraintCache(compiler, **limits), compiler
