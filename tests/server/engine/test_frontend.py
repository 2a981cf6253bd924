"""Between asyncio and the engine thread: streams, cancelling, refusing, draining, and losing the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from harness import Harness
from shelf import SlowSources
from tiny import make_adapter, make_model, save_tokenizer

from weft.adapters.records import AdapterState
from weft.errors import AdapterNotFound, DeadlineExceeded, InvalidRequest, OutOfCapacity, Unavailable, WeftError
from weft.server.engine.frontend import Frontend, Stream, Streams
from weft.server.engine.queue_limits import QueueLimits
from weft.server.engine.request import Delta, FinishReason, Request, Stopping, Token

PROMPT = (5, 6, 7)
ROOMY = QueueLimits(max_running=2, max_requests=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("frontend")
    model = make_model("llama", root / "base")
    save_tokenizer(root / "base")
    for seed, name in enumerate(("one", "two")):
        make_adapter(model, root / "adapters" / name, seed, target_modules=["q_proj"])
    return root


@pytest.fixture
def harness(folder: Path) -> Harness:
    return Harness(folder / "base", {"one": folder / "adapters" / "one"}, max_running_requests=2)


@asynccontextmanager
async def running(harness: Harness, limits: QueueLimits = ROOMY) -> AsyncIterator[Frontend]:
    frontend = Frontend(harness.engine, harness.store, limits)
    frontend.start()
    try:
        yield frontend
    finally:
        await frontend.drain(0.0)
        harness.engine.check_pools()
        harness.store.check()
        assert not harness.engine.has_work
        assert harness.store.get("one").num_in_flight == 0


def ask(name: str = "r", max_tokens: int = 10, adapter: str = "one") -> Request:
    stopping = Stopping(max_tokens=max_tokens, ignore_eos=True)
    return Request(name, PROMPT, ((adapter, 1.0),) if adapter else (), stopping=stopping)


async def collect(frontend: Frontend, request: Request) -> list[Delta]:
    async with frontend.stream(request) as stream:
        return [delta async for delta in stream]


async def count(frontend: Frontend, request: Request) -> int:
    """Tokens of its answer."""
    return sum(len(delta.tokens) for delta in await collect(frontend, request))


def test_many_streams_at_once_give_what_one_gives(harness: Harness) -> None:
    async def main() -> None:
        async with running(harness) as frontend:
            alone = await collect(frontend, ask())
            assert [token.id for delta in alone for token in delta.tokens] == harness_tokens
            assert alone[-1].finish is not None
            assert alone[-1].finish.reason is FinishReason.MAX_TOKENS
            together = await asyncio.gather(*(collect(frontend, ask(f"r{i}")) for i in range(20)))
            for deltas in together:
                assert [token.id for delta in deltas for token in delta.tokens] == harness_tokens

    harness_tokens = harness.run([ask()])[0].ids
    asyncio.run(main())


def test_what_piles_up_comes_together_and_is_the_same(harness: Harness) -> None:
    async def main() -> None:
        async with running(harness) as frontend, frontend.stream(ask(max_tokens=200)) as stream:
            await frontend._idle.wait()  # the engine is done, and nobody has read anything
            (all_at_once,) = [delta async for delta in stream]
            assert [token.id for token in all_at_once.tokens] == answer.ids
            assert (all_at_once.text, all_at_once.finish is None) == (answer.text, False)

    answer = harness.run([ask(max_tokens=200)])[0]
    asyncio.run(main())


def test_what_piles_up_is_parted_before_it_is_too_large_for_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.server.engine.frontend.MAX_JOINED_TOKENS", 4)
    events: asyncio.Queue[tuple[int, Delta | WeftError]] = asyncio.Queue()
    for index, number in [(0, 1), (0, 2), (1, 3), (0, 4), (1, 5)]:
        events.put_nowait((index, Delta(str(number), (Token(number, str(number)),))))
    events.put_nowait((1, Unavailable("gone")))

    async def main() -> list[tuple[int, str]]:
        seen = []

        async def read() -> None:
            async for index, delta in Streams([Stream((), 0, events), Stream((), 1, events)]):
                seen.append((index, delta.text))

        with pytest.raises(Unavailable, match="gone"):
            await read()
        return seen

    assert asyncio.run(main()) == [(0, "124"), (1, "3"), (1, "5")]


def test_a_stream_knows_since_when_it_runs(harness: Harness) -> None:
    async def main() -> None:
        async with running(harness) as frontend, frontend.stream(ask()) as stream:
            assert stream.begun_s is None
            arrived_s = harness.engine.clock()
            await anext(aiter(stream))
            assert stream.begun_s is not None
            assert arrived_s <= stream.begun_s <= harness.engine.clock()

    asyncio.run(main())


def test_leaving_early_frees_everything(harness: Harness) -> None:
    async def main() -> None:
        async with running(harness) as frontend:
            for _ in range(5):
                async with frontend.stream(ask(max_tokens=200)) as stream:
                    async for _ in stream:
                        break
            assert await count(frontend, ask()) == 10

    asyncio.run(main())


def test_a_cancelled_task_frees_everything(harness: Harness) -> None:
    async def main() -> None:
        async with running(harness) as frontend:
            tasks = [asyncio.create_task(collect(frontend, ask(f"r{i}", 200))) for i in range(30)]
            await collect(frontend, ask("base", 1, adapter=""))
            for task in tasks:
                task.cancel()
            assert all(
                isinstance(ended, asyncio.CancelledError)
                for ended in await asyncio.gather(*tasks, return_exceptions=True)
            )

    asyncio.run(main())


def refused(harness: Harness, request: Request, error: type[Exception], limits: QueueLimits = ROOMY) -> None:
    async def main() -> None:
        async with running(harness, limits) as frontend:
            with pytest.raises(error):
                await collect(frontend, request)

    asyncio.run(main())


def test_what_cannot_run_is_refused_before_it_holds_anything(harness: Harness) -> None:
    refused(harness, Request("empty", (), (("one", 1.0),)), InvalidRequest)
    refused(harness, ask(adapter="missing"), AdapterNotFound)
    refused(harness, ask(), OutOfCapacity, QueueLimits(0, 0))


def test_draining_refuses_new_requests_and_finishes_those_in_flight(harness: Harness) -> None:
    async def main() -> None:
        async with running(harness) as frontend, frontend.stream(ask(max_tokens=100)) as stream:
            deltas = stream.__aiter__()
            await anext(deltas)
            draining = asyncio.create_task(frontend.drain(60.0))
            await asyncio.sleep(0)
            with pytest.raises(Unavailable, match="draining"):
                await collect(frontend, ask())
            rest = [token async for delta in deltas for token in delta.tokens]
            assert len(rest) == 99
            await draining

    asyncio.run(main())


def test_what_outlives_the_grace_is_answered(harness: Harness) -> None:
    async def main() -> None:
        async with running(harness) as frontend, frontend.stream(ask(max_tokens=250)) as stream:
            deltas = stream.__aiter__()
            await anext(deltas)
            await frontend.drain(0.0)
            with pytest.raises(Unavailable, match="stopping"):
                [delta async for delta in deltas]

    asyncio.run(main())


@pytest.fixture
def cold(folder: Path) -> tuple[Harness, SlowSources]:
    """A harness where `one` is on disk, and the sources that it is read from."""
    sources = SlowSources(folder / "adapters")
    names = {"two": folder / "adapters" / "two", "one": folder / "adapters" / "one"}
    harness = Harness(folder / "base", names, sources=sources, adapter_pages=1, adapter_host_bytes=0)
    assert harness.store.get("one").state is AdapterState.DISK
    return harness, sources


def test_the_engine_sleeps_while_requests_wait_for_a_read_and_wakes_when_it_ends(
    cold: tuple[Harness, SlowSources], monkeypatch: pytest.MonkeyPatch
) -> None:
    harness, sources = cold
    step, steps = harness.engine.step, []
    monkeypatch.setattr(harness.engine, "step", lambda: (steps.append(1), step())[1])

    async def main() -> None:
        async with running(harness) as frontend:
            sources.hold()
            waiting = asyncio.create_task(collect(frontend, ask()))
            await asyncio.to_thread(sources.reached.acquire)
            assert await count(frontend, ask(adapter="two")) == 10
            before = len(steps)
            for _ in range(1000):
                await asyncio.sleep(0)
            sources.may_read.set()
            assert len(await waiting) == 10
            assert len(steps) - before < 20, "ten tokens, and a few looks at what came"

    asyncio.run(main())


def test_a_deadline_passes_while_the_engine_sleeps(cold: tuple[Harness, SlowSources]) -> None:
    harness, sources = cold

    async def main() -> None:
        async with running(harness) as frontend:
            sources.hold()
            with pytest.raises(DeadlineExceeded):
                await collect(frontend, replace(ask(), deadline_s=harness.engine.clock() + 0.05))
            sources.may_read.set()

    asyncio.run(main())


def test_a_read_that_fails_is_answered_with_its_own_error(cold: tuple[Harness, SlowSources]) -> None:
    harness, sources = cold

    async def main() -> None:
        async with running(harness) as frontend:
            sources.error = OSError(5, "Input/output error")
            with pytest.raises(Unavailable, match="Input/output error"):
                await collect(frontend, ask())
            sources.error = None
            assert await count(frontend, ask()) == 10

    asyncio.run(main())


def test_a_lost_engine_answers_everybody_and_refuses_the_next(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        frontend = Frontend(harness.engine, harness.store, ROOMY)
        monkeypatch.setattr(harness.engine, "step", broken(harness.engine.step, after=3))
        frontend.start()
        with pytest.raises(Unavailable, match="stopped unexpectedly"):
            await collect(frontend, ask(max_tokens=100))
        assert frontend.lost.is_set()
        with pytest.raises(Unavailable):
            await collect(frontend, ask())

    asyncio.run(main())


def broken(step: Callable[[], list], after: int) -> Callable[[], list]:
    left = [after]

    def breaking() -> list:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("gone")
        return step()

    return breaking


def test_what_waits_is_bounded_by_tokens_and_by_adapter_and_begins_to_count_when_it_waits(harness: Harness) -> None:
    limits = QueueLimits(max_running=2, max_requests=100, max_tokens=4 * len(PROMPT), max_per_adapter=2)

    async def main() -> None:
        async with running(harness, limits) as frontend:
            async with AsyncExitStack() as held:
                for i in range(2):
                    stream = await held.enter_async_context(frontend.stream(ask(f"r{i}", 250)))
                    await anext(stream.__aiter__())
                waiting = [asyncio.create_task(count(frontend, ask(f"w{i}"))) for i in range(2)]
                await asyncio.sleep(0)
                with pytest.raises(OutOfCapacity, match="2 requests to adapter 'one' are queued"):
                    await collect(frontend, ask())
                waiting += [asyncio.create_task(count(frontend, ask(f"b{i}", adapter=""))) for i in range(2)]
                await asyncio.sleep(0)
                with pytest.raises(OutOfCapacity, match="12 prompt tokens are queued, and with this request's 3"):
                    await collect(frontend, ask(adapter=""))
            assert await asyncio.gather(*waiting) == [10] * 4
            assert await count(frontend, ask()) == 10

    asyncio.run(main())
