"""Loads on threads: awaited at the end, timed, and their failures kept."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Harness
from prometheus_client import CollectorRegistry
from tiny import make_adapter, make_model, save_tokenizer
from web import Web, serving

from weft.adapters.locations import is_remote
from weft.adapters.records import AdapterChange, AdapterInfo, AdapterState, Allow, NewAdapter, allow_all
from weft.adapters.report import AdapterReport
from weft.adapters.sources import RemoteSettings, Sources
from weft.adapters.state import Recorder, State
from weft.adapters.store import AdapterStore, Reservation
from weft.errors import AdapterExists, InvalidAdapter, InvalidRequest, Unavailable
from weft.server.api.loading import NUM_CHECKS, NUM_DOWNLOADS, NUM_THREADS, AdapterLoader
from weft.server.metrics import Metrics


class Loading:
    """A loader, its store and its metrics."""

    def __init__(self, store: AdapterStore, folders: Path) -> None:
        self.store = store
        self.registry = CollectorRegistry()
        self.loader = AdapterLoader(store, Metrics(self.registry))
        self._folders = folders

    def new(self, name: str, folder: str = "good") -> NewAdapter:
        return NewAdapter(name, f"file:{self._folders / folder}")

    def count(self, outcome: str) -> float | None:
        return self.registry.get_sample_value("weft_adapter_load_seconds_count", {"outcome": outcome})


@pytest.fixture
def loading(tmp_path: Path) -> Loading:
    model = make_model("llama", tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    folders = tmp_path / "adapters"
    make_adapter(model, folders / "first", target_modules=["q_proj"])
    make_adapter(model, folders / "good", seed=1, target_modules=["q_proj"])
    (folders / "bad").mkdir()
    return Loading(Harness(tmp_path / "base", {"first": folders / "first"}).store, folders)


def test_draining_waits_for_the_loads_under_way_and_takes_no_more(loading: Loading) -> None:
    async def main() -> None:
        infos = [await loading.loader.start(loading.new(f"n{i}")) for i in range(4)]
        assert {info.state for info in infos} == {AdapterState.LOADING}
        draining = asyncio.create_task(loading.loader.drain(60))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="draining"):
            await loading.loader.start(loading.new("late"))
        with pytest.raises(Unavailable, match="draining"):
            await loading.loader.create(loading.new("late"))
        await draining
        assert not loading.loader.is_loading

    asyncio.run(main())
    assert {info.state for info in loading.store.list()} == {AdapterState.DEVICE}
    assert loading.count("ok") == 4
    loading.store.check()


def test_what_reads_and_moves_nothing_waits_behind_no_load(loading: Loading) -> None:
    """Labels and an unpinning are changed while every thread that loads is held up; a check has a thread of its own."""
    reached, may_end = threading.Semaphore(0), threading.Event()

    class Slow(AdapterStore):
        def create(self, new: NewAdapter) -> AdapterInfo:
            reached.release()
            may_end.wait()
            return super().create(new)

    async def main() -> None:
        store = Slow(loading.store._pool, loading.store._reader._sources, lambda: 0.0)
        store.load(store.reserve(NewAdapter("n", loading.new("n").source, pinned=True)))
        loader = AdapterLoader(store, Metrics(CollectorRegistry()))
        loads = [asyncio.create_task(loader.create(loading.new(f"slow{i}"))) for i in range(NUM_THREADS)]
        for _ in loads:
            await asyncio.to_thread(reached.acquire)
        info = await loader.update("n", AdapterChange(labels={"a": "b"}, pinned=False))
        assert (info.labels, info.pinned) == ({"a": "b"}, False)
        report = await loader.inspect(loading.new("n").source)
        assert (report.digest, report.problems) == (info.digest, ())
        in_line = asyncio.create_task(loader.update("n", AdapterChange(source=loading.new("n", "first").source)))
        await asyncio.sleep(0)
        in_line.cancel()
        with pytest.raises(asyncio.CancelledError):
            await in_line
        may_end.set()
        await asyncio.gather(*loads)
        await loader.drain(60)
        assert store.get("n") == info, "an update that had not begun was made for nobody"

    asyncio.run(main())


def test_what_is_here_waits_behind_nothing_that_comes_from_another_machine(loading: Loading) -> None:
    """Loads, updates, pins, checks and the watcher go on while every thread that downloads is held up."""
    reached, may_end = threading.Semaphore(0), threading.Event()
    far = "https://far.example.com/x"

    class Slow(AdapterStore):
        def create(self, new: NewAdapter) -> AdapterInfo:
            self._hold(new.source)
            return super().create(new)

        def inspect(self, source: str) -> AdapterReport:
            self._hold(source)
            return super().inspect(source)

        def _hold(self, source: str) -> None:
            if is_remote(source):
                reached.release()
                may_end.wait()

    async def main() -> None:
        store = Slow(loading.store._pool, loading.store._reader._sources, lambda: 0.0)
        loader = AdapterLoader(store, Metrics(CollectorRegistry()))
        downloads = [loader.create(NewAdapter(f"far{i}", far)) for i in range(NUM_DOWNLOADS)]
        checks = [loader.inspect(far) for _ in range(NUM_CHECKS)]
        held = [asyncio.ensure_future(work) for work in (*downloads, *checks)]
        for _ in held:
            await asyncio.to_thread(reached.acquire)
        await loader.create(loading.new("n", "first"))
        await loader.update("n", AdapterChange(source=loading.new("n").source))
        assert (await loader.update("n", AdapterChange(pinned=True))).pinned
        assert (await loader.inspect(loading.new("n").source)).problems == ()
        await loader.run(lambda: None)
        may_end.set()
        outcomes = await asyncio.gather(*held, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {InvalidRequest}, "no such source is allowed here"
        await loader.drain(60)

    asyncio.run(main())


def test_a_source_whose_links_can_not_be_followed_holds_up_nobody_else(loading: Loading) -> None:
    """As on a network mount that hangs; and what was asked for is loaded, though its caller has gone."""
    reached, may_end = threading.Event(), threading.Event()

    class Hanging(AdapterStore):
        def reserve(self, new: NewAdapter, *, restored: bool = False) -> Reservation:
            if new.name == "hanging":
                reached.set()
                may_end.wait()
            return super().reserve(new, restored=restored)

    async def main() -> None:
        store = Hanging(loading.store._pool, loading.store._reader._sources, lambda: 0.0)
        loader = AdapterLoader(store, Metrics(CollectorRegistry()))
        starting = asyncio.create_task(loader.start(loading.new("hanging")))
        await asyncio.to_thread(reached.wait)
        await loader.create(loading.new("n"))
        assert loader.is_loading
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        states = States(store)
        may_end.set()
        await states.until(AdapterState.DEVICE)
        await loader.drain(60)
        assert store.get("hanging").digest == store.get("n").digest

    asyncio.run(main())


class TestRestoring:
    """Names that were registered before a restart, whose sources are on another machine."""

    @pytest.fixture
    def web(self, loading: Loading) -> Iterator[Web]:
        with serving() as web:
            web.hold(loading._folders / "good", "/loras/good")
            yield web

    @pytest.fixture
    def store(self, loading: Loading, web: Web, tmp_path: Path) -> AdapterStore:
        sources = Sources([], RemoteSettings([web.url], tmp_path / "cache"))
        return AdapterStore(loading.store._pool, sources, lambda: 0.0)

    def test_a_source_out_of_reach_is_tried_again_until_it_is_there(
        self, store: AdapterStore, web: Web, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = "/loras/good/adapter_config.json"
        web.statuses[config] = 503

        async def main() -> None:
            loader = AdapterLoader(store, Metrics(CollectorRegistry()), first_retry_s=0.01)
            states = States(store)
            reservation = loader.reserve_now(NewAdapter("far", f"{web.url}/loras/good", pinned=True))
            assert reservation is not None
            loader.restore(reservation)
            for _ in range(3):
                await states.until(AdapterState.FAILED)
            del web.statuses[config]
            await states.until(AdapterState.DEVICE)
            await loader.drain(60)

        asyncio.run(main())
        assert store.get("far").pinned
        (line,) = caplog.messages
        assert line.startswith("adapter far is not loaded yet, and will be tried again: ")

    @pytest.mark.parametrize("end", ["deleted", "drained"])
    def test_it_ends_when_nobody_wants_it_any_more(self, store: AdapterStore, web: Web, end: str) -> None:
        web.statuses["/loras/good/adapter_config.json"] = 503

        async def main() -> None:
            loader = AdapterLoader(store, Metrics(CollectorRegistry()), first_retry_s=0.01 if end == "deleted" else 600)
            states = States(store)
            reservation = loader.reserve_now(NewAdapter("far", f"{web.url}/loras/good"))
            assert reservation is not None
            loader.restore(reservation)
            await states.until(AdapterState.FAILED)
            if end == "deleted":
                await loader.delete("far")
                await asyncio.gather(*loader._restores)
            await loader.drain(60)
            assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(main())

    def test_a_name_that_none_can_have_is_logged(self, store: AdapterStore, caplog: pytest.LogCaptureFixture) -> None:
        loader = AdapterLoader(store, Metrics(CollectorRegistry()))
        assert loader.reserve_now(NewAdapter("a bad name", "hf:org/x")) is None
        assert "a bad name" in caplog.messages[0]


class States:
    """The states that a store's adapters come into, for the event loop it is made on."""

    def __init__(self, store: AdapterStore) -> None:
        self._seen: asyncio.Queue[AdapterState] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        store.subscribe(lambda event: loop.call_soon_threadsafe(self._seen.put_nowait, event.info.state))

    async def until(self, state: AdapterState) -> None:
        while await asyncio.wait_for(self._seen.get(), 60) is not state:
            pass


def test_what_was_changed_for_a_caller_who_gave_up_is_recorded(loading: Loading, tmp_path: Path) -> None:
    reached, may_end = threading.Event(), threading.Event()

    class Slow(AdapterStore):
        def update(self, name: str, change: AdapterChange, allow: Allow = allow_all) -> AdapterInfo:
            reached.set()
            may_end.wait()
            return super().update(name, change, allow)

    state = State(tmp_path / "state.db")
    store = Slow(loading.store._pool, loading.store._reader._sources, lambda: 0.0)

    async def main() -> None:
        loader = AdapterLoader(store, Metrics(CollectorRegistry()), Recorder(store, state))
        await loader.create(loading.new("n"))
        update = asyncio.create_task(loader.update("n", AdapterChange(source=loading.new("n", "first").source)))
        await asyncio.to_thread(reached.wait)
        update.cancel()
        with pytest.raises(asyncio.CancelledError):
            await update
        may_end.set()
        await loader.drain(60)
        loader.close()

    asyncio.run(main())
    assert store.get("n").source == loading.new("n", "first").source
    assert state.all() == [loading.new("n", "first")]
    state.close()


def test_draining_refuses_changes_and_checks_and_tells_who_asked(loading: Loading) -> None:
    told: list[str] = []

    async def main() -> None:
        loading.loader.when_draining(told.append)
        source = loading.new("n").source
        under_way = asyncio.create_task(loading.loader.update("first", AdapterChange(source=source)))
        await asyncio.sleep(0)
        await loading.loader.drain(60)
        assert (await under_way).source == source
        for change in (AdapterChange(source=source), AdapterChange(labels={}), AdapterChange(pinned=False)):
            with pytest.raises(Unavailable, match="draining"):
                await loading.loader.update("first", change)
        with pytest.raises(Unavailable, match="draining"):
            await loading.loader.inspect(source)
        with pytest.raises(Unavailable, match="draining"):
            await loading.loader.delete("first")

    asyncio.run(main())
    assert [info.name for info in loading.store.list()] == ["first"]
    assert told == ["the server is draining"]


def test_draining_waits_no_longer_than_its_grace(loading: Loading, caplog: pytest.LogCaptureFixture) -> None:
    reached, may_end = threading.Event(), threading.Event()

    class Slow(AdapterStore):
        def load(self, reservation: Reservation) -> AdapterInfo:
            reached.set()
            may_end.wait()
            return super().load(reservation)

    async def main() -> None:
        store = Slow(loading.store._pool, loading.store._reader._sources, lambda: 0.0)
        loader = AdapterLoader(store, Metrics(CollectorRegistry()))
        for i in range(NUM_THREADS + 1):
            await loader.start(loading.new(f"n{i}"))
        await asyncio.to_thread(reached.wait)
        await loader.drain(0.0)
        assert loader.is_loading
        assert asyncio.all_tasks() == {asyncio.current_task()}
        may_end.set()

    asyncio.run(main())
    assert [record.getMessage() for record in caplog.records] == ["drain: an adapter was still loading after 0 s"]


def test_a_failure_in_the_background_is_kept_and_logged_in_one_line(
    loading: Loading, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        await loading.loader.start(loading.new("n", "bad"))
        await loading.loader.drain(60)

    with caplog.at_level(logging.WARNING, "weft"):
        asyncio.run(main())
    assert loading.store.get("n").state is AdapterState.FAILED
    assert [record.exc_info for record in caplog.records] == [None]
    assert loading.count("failed") == 1


def test_what_finds_no_thread_is_not_loading_for_ever(loading: Loading) -> None:
    async def main() -> None:
        loading.loader._threads.local.shutdown()  # as where the system gives no more threads
        await loading.loader.start(loading.new("n"))
        await loading.loader.drain(60)
        with pytest.raises(Unavailable):
            await loading.loader._load_once(loading.store.reserve(loading.new("m")), loading.loader._threads.local)

    asyncio.run(main())
    for name in "nm":
        info = loading.store.get(name)
        assert info.state is AdapterState.FAILED
        assert "no more threads or memory" in info.error


def test_what_can_not_be_reserved_is_refused_at_once(loading: Loading) -> None:
    async def main() -> None:
        with pytest.raises(AdapterExists):
            await loading.loader.start(loading.new("first"))
        with pytest.raises(InvalidRequest):
            await loading.loader.start(NewAdapter("n", "elsewhere"))

    asyncio.run(main())
    assert [info.name for info in loading.store.list()] == ["first"]


def test_create_gives_the_name_back_when_it_fails(loading: Loading) -> None:
    with pytest.raises(InvalidAdapter):
        asyncio.run(loading.loader.create(loading.new("n", "bad")))
    assert asyncio.run(loading.loader.create(loading.new("n"))).state is AdapterState.DEVICE


def test_load_now_says_whether_it_did(loading: Loading) -> None:
    assert loading.loader.load_now(loading.new("n"))
    assert not loading.loader.load_now(loading.new("m", "bad"))
    assert loading.store.get("m").state is AdapterState.FAILED
