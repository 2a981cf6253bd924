"""WatchAdapters: alone against a model of a client, and over real gRPC with many watchers, slow ones and a drain."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from house import House, refusal, refusal_of
from hypothesis import given
from hypothesis import strategies as st

from weft.adapters.records import AdapterInfo, AdapterState, EventKind, NewAdapter
from weft.errors import Unauthenticated
from weft.server.api.adapter_fields import AdapterFilter
from weft.server.api.callers import Caller
from weft.server.api.watching import Told, Watch, Watchers
from weft.server.app import running_server
from weft.server.config import EngineConfig, ModelConfig, ServerConfig
from weft.v1 import adapter_pb2 as pb2
from weft.v1 import adapter_pb2_grpc

ADDED, CHANGED = pb2.ADAPTER_EVENT_KIND_ADDED, pb2.ADAPTER_EVENT_KIND_CHANGED
DELETED, LISTED = pb2.ADAPTER_EVENT_KIND_DELETED, pb2.ADAPTER_EVENT_KIND_LISTED


def info(name: str, state: AdapterState = AdapterState.DEVICE, **labels: str) -> AdapterInfo:
    return AdapterInfo(name, "file:/x", labels, pinned=False, state=state, error="", created_s=0.0, last_used_s=None)


class Client:
    """Believes what it is told, and checks that it makes sense."""

    def __init__(self) -> None:
        self.present: dict[str, AdapterInfo] = {}
        self.is_listed = False

    def hear(self, told: Told) -> None:
        if told is None:
            assert not self.is_listed
            self.is_listed = True
            return
        kind, about = told
        assert (about.name in self.present) == (kind is not EventKind.ADDED)
        if kind is EventKind.DELETED:
            del self.present[about.name]
        else:
            self.present[about.name] = about


ANY = AdapterFilter(pb2.ADAPTER_STATE_UNSPECIFIED, {}, "")
NAMES = st.sampled_from("abcde")
READ = st.just(("read", "", AdapterState.DEVICE))
CHANGE = st.tuples(st.sampled_from(["put", "delete"]), NAMES, st.sampled_from([AdapterState.DEVICE, AdapterState.HOST]))


@given(
    first=st.sets(NAMES),
    events=st.lists(READ | CHANGE, max_size=60),
    wanted=st.sampled_from([ANY, replace(ANY, state=pb2.ADAPTER_STATE_DEVICE), replace(ANY, name_prefix="a")]),
)
def test_whatever_happens_and_whenever_it_reads_a_client_ends_up_with_what_is_there(
    first: set[str], events: list[tuple[str, str, AdapterState]], wanted: AdapterFilter
) -> None:
    present = {name: info(name) for name in sorted(first)}
    watch, client = Watch(wanted), Client()
    watch.begin(present.values())
    for what, name, state in events:
        if what == "read":
            if watch.has_more:
                client.hear(watch.next())
        elif what == "put":
            present[name] = info(name, state)
            watch.take(present[name], gone=False)
        elif name in present:
            watch.take(present.pop(name), gone=True)
        assert len(watch._untold) <= len(present | client.present)
        assert watch.ready.is_set() or not watch.has_more
    while watch.has_more:
        client.hear(watch.next())
    assert client.is_listed
    assert client.present == {name: about for name, about in present.items() if wanted.matches(about)}


def test_who_never_reads_costs_no_more_than_the_registry_whatever_comes_and_goes() -> None:
    watch = Watch(ANY)
    watch.begin([info("stays")])
    for number in range(10_000):
        watch.take(info(f"n{number}"), gone=False)
        watch.take(info("stays", AdapterState.HOST), gone=False)
        watch.take(info(f"n{number}"), gone=True)
    assert [watch.next(), watch.next()] == [(EventKind.ADDED, info("stays", AdapterState.HOST)), None]
    assert not watch.has_more


def test_changes_that_nobody_has_read_become_one() -> None:
    watch = Watch(ANY)
    watch.begin([])
    for state in (AdapterState.LOADING, AdapterState.HOST, AdapterState.DEVICE):
        watch.take(info("a", state), gone=False)
    assert [watch.next(), watch.next()] == [None, (EventKind.ADDED, info("a"))]
    watch.take(info("a"), gone=True)
    watch.take(info("a", AdapterState.HOST), gone=False)
    assert watch.next() == (EventKind.CHANGED, info("a", AdapterState.HOST))


@pytest.fixture
def tidy(house: House, leaves_nothing_behind: None) -> Iterator[None]:
    """The server goes on listening to its store for no watcher that has left."""
    yield
    while house.store._listeners:
        house.get("one")


Call = Any
needs_house = pytest.mark.usefixtures("tidy")


def watch(house: House, **fields: Any) -> Call:
    return house.adapters.WatchAdapters(pb2.WatchAdaptersRequest(**fields))


def heard(event: pb2.WatchAdaptersResponse) -> tuple[int, str]:
    return event.kind, event.adapter.name


def until_listed(call: Call) -> list[str]:
    """The names of what was there at the beginning."""
    names = []
    while (event := next(call)).kind != LISTED:
        assert event.kind == ADDED
        names.append(event.adapter.name)
    assert not event.HasField("adapter")
    return names


def until(call: Call, kind: int, name: str) -> pb2.Adapter:
    while heard(event := next(call)) != (kind, name):
        assert event.adapter.name == name
    return event.adapter  # type: ignore[no-any-return]


@needs_house
def test_first_what_is_there_then_what_happens(house: House) -> None:
    call = watch(house)
    assert until_listed(call) == ["one", "two"]
    created = house.create("mine", "one")
    event = next(call)
    assert heard(event) == (ADDED, "mine")
    assert event.adapter.labels == {}
    updated = house.update("mine", "labels", "source", folder="two", labels={"team": "a"})
    assert created.digest != updated.digest
    while (told := until(call, CHANGED, "mine")) != updated:
        assert told.digest in ("", created.digest)
    deleted = house.delete("mine")
    assert until(call, DELETED, "mine") == deleted
    call.cancel()


@needs_house
def test_an_adapter_that_comes_to_match_is_added_and_one_that_does_not_any_more_deleted(house: House) -> None:
    house.create("a/1", "three", labels={"team": "a"})
    house.create("b/1", "three", labels={"team": "a"})
    call = watch(house, labels={"team": "a"}, name_prefix="a/")
    assert until_listed(call) == ["a/1"]
    house.create("a/2", "three")
    house.update("a/2", "labels", labels={"team": "a", "x": "y"})
    until(call, ADDED, "a/2")
    house.update("b/1", "labels", labels={"team": "a", "x": "y"})
    house.update("a/1", "labels")
    assert until(call, DELETED, "a/1").labels == {}
    house.delete("a/1")
    house.delete("a/2")
    until(call, DELETED, "a/2")
    call.cancel()


@needs_house
def test_a_state_is_watched_for(house: House) -> None:
    call = watch(house, state=pb2.ADAPTER_STATE_FAILED)
    assert until_listed(call) == []
    house.create("fine", "three")
    house.create("broken", "empty", wait=False)
    assert "adapter_config.json" in until(call, ADDED, "broken").error
    house.create("broken", "three")
    until(call, DELETED, "broken")
    call.cancel()


@needs_house
@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"state": 99}, "state"),
        ({"labels": {"": "x"}}, "labels['']"),
        ({"labels": {str(i): "" for i in range(65)}}, "labels"),
        ({"name_prefix": "a" * 257}, "name_prefix"),
    ],
)
def test_a_bad_watch_is_named(house: House, fields: dict[str, Any], path: str) -> None:
    refused = refusal(lambda: next(watch(house, **fields)))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(refused.violations) == [path]


@needs_house
def test_many_watchers_end_up_with_the_same(house: House) -> None:
    def follow(call: Call) -> dict[str, str]:
        present: dict[str, str] = {}
        while (event := next(call)).adapter.name != "zz/over":
            if event.kind == DELETED:
                del present[event.adapter.name]
            elif event.kind != LISTED:
                present[event.adapter.name] = event.adapter.digest
        return present

    calls = [watch(house) for _ in range(40)]
    for call in calls[:20]:
        until_listed(call)
    for number in range(30):
        house.create(f"n{number}", ("one", "two", "three")[number % 3])
        if number % 2:
            house.update(f"n{number}", "source", folder="one")
        if number % 5 == 0:
            house.delete(f"n{number}")
    expected = {adapter.name: adapter.digest for adapter in house.store.list()}
    house.create("zz/over", "three", wait=False)
    with ThreadPoolExecutor(len(calls)) as pool:
        seen = list(pool.map(follow, calls))
    for call in calls:
        call.cancel()
    assert all({**dict.fromkeys(("one", "two")), **each}.keys() == expected.keys() for each in seen[:20])
    assert all(each.items() <= expected.items() for each in seen[:20])
    assert all(each == expected for each in seen[20:])


@needs_house
def test_watchers_that_never_read_hold_up_nobody(house: House) -> None:
    silent = [watch(house) for _ in range(8)]
    for number in range(80):
        house.create(f"n{number}", "three", labels={"long": "x" * 256, "number": str(number)})
        house.update(f"n{number}", "labels", labels={"long": "y" * 256, "number": str(number)})
        if number % 3:
            house.delete(f"n{number}")
    expected = {adapter.name: dict(adapter.labels) for adapter in house.store.list()}
    house.create("zz/over", "three", wait=False)
    present: dict[str, dict[str, str]] = {}
    while (event := next(silent[0])).adapter.name != "zz/over":
        if event.kind == DELETED:
            del present[event.adapter.name]
        elif event.kind != LISTED:
            present[event.adapter.name] = dict(event.adapter.labels)
    assert present == expected
    for call in silent:
        call.cancel()


@needs_house
def test_a_deadline_ends_a_watch(house: House) -> None:
    call = house.adapters.WatchAdapters(pb2.WatchAdaptersRequest(), timeout=0.2)
    with pytest.raises(grpc.RpcError) as raised:
        list(call)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]


@needs_house
def test_watchers_that_come_and_go_while_names_change_leave_nothing(house: House) -> None:
    over = threading.Event()

    def change(name: str) -> None:
        while not over.is_set():
            house.create(name, "three")
            house.delete(name)

    with ThreadPoolExecutor(2) as pool:
        changes = [pool.submit(change, name) for name in ("x", "y")]
        try:
            for _ in range(50):
                call = watch(house)
                assert {"one", "two"} <= set(until_listed(call)) <= {"one", "two", "x", "y"}
                call.cancel()
        finally:
            over.set()
        for done in changes:
            done.result()


def test_a_watch_ends_with_the_token_that_let_it_in(house: House) -> None:
    lasting, ending = (replace(ANY, caller=Caller("x", left_s=lambda left=left: left)) for left in (3600.0, 0.1))  # type: ignore[misc]
    watchers = Watchers(house.store)

    async def watch() -> None:
        other = watchers.watch(lasting)
        async with aclosing(other), aclosing(watchers.watch(ending)) as told:
            while await anext(other) is not None:
                pass
            with pytest.raises(Unauthenticated, match="the token has expired: watch again with another"):
                async for _ in told:
                    pass
            house.store.create(NewAdapter("late", house.source("one")))
            heard = await anext(other)
            assert heard is not None
            assert heard[1].name == "late"
        house.store.delete("late")

    house.on_loop(watch())


def test_a_drain_ends_every_watch_and_refuses_new_ones(root: Path) -> None:
    config = ServerConfig(
        model=ModelConfig(str(root / "base"), dtype="float32", device="cpu"),
        engine=EngineConfig(max_batch_tokens=64, max_running_requests=4, kv_tokens=1024, adapter_pages=16),
        port=0,
        metrics_port=0,
        source_roots=(root / "adapters",),
        drain_grace_s=30.0,
    )

    async def main() -> None:
        async with running_server(config) as server, grpc.aio.insecure_channel(server.address) as channel:
            stub: Any = adapter_pb2_grpc.AdapterServiceStub(channel)
            adapter = {"name": "mine", "source": f"file:{root / 'adapters' / 'one'}"}
            await stub.CreateAdapter(pb2.CreateAdapterRequest(adapter=adapter, wait=True))
            reading = [stub.WatchAdapters(pb2.WatchAdaptersRequest()) for _ in range(8)]
            silent = [stub.WatchAdapters(pb2.WatchAdaptersRequest()) for _ in range(8)]
            for call in (*reading, *silent):
                assert (await call.read()).kind == ADDED
            for call in reading:
                assert (await call.read()).kind == LISTED
            await server.drain()
            late = stub.WatchAdapters(pb2.WatchAdaptersRequest())
            update = {"adapter": {"name": "mine", "pinned": True}, "update_mask": {"paths": ["pinned"]}}
            for ended in (
                *(call.read() for call in reading),
                late.read(),
                stub.UpdateAdapter(pb2.UpdateAdapterRequest(**update)),
                stub.CheckAdapter(pb2.CheckAdapterRequest(source=adapter["source"])),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await ended
                refused = refusal_of(raised.value)
                assert (refused.code, refused.message) == (grpc.StatusCode.UNAVAILABLE, "the server is draining")
            assert server._loaded is not None
            assert not server._loaded.frontend._store._listeners

    asyncio.run(main())
