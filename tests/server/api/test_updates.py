"""UpdateAdapter over real gRPC: masks, swaps under load, failures that change nothing."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from house import ENDLESS, House, generate, refusal, stream

from weft.v1 import adapter_pb2 as pb2

pytestmark = pytest.mark.usefixtures("leaves_nothing_behind")

MUTABLE = {"source", "pinned", "labels"}
LONG = {"max_tokens": 12, "ignore_eos": True}


def answer(house: House, adapter_id: str) -> Any:
    return house.inference.Generate(generate(text="hello", adapter_id=adapter_id, stopping=LONG))


def raw(house: House, paths: list[str], **adapter: Any) -> Callable[[], Any]:
    request = pb2.UpdateAdapterRequest(adapter={"name": "mine", **adapter}, update_mask={"paths": paths})
    return lambda: house.adapters.UpdateAdapter(request)


def test_a_new_source_is_swapped_in_and_requests_in_flight_keep_their_version(house: House) -> None:
    old = house.create("mine", "one")
    endless = {"max_tokens": ENDLESS, "ignore_eos": True}
    begun = house.inference.StreamGenerate(stream(text="hello", adapter_id="mine", stopping=endless))
    first = next(begun)
    new = house.update("mine", "source", folder="two")
    assert (new.digest, new.source) == (house.digest("two"), house.source("two"))
    assert new == house.get("mine")
    assert new.create_time == old.create_time
    assert answer(house, "mine").tokens == answer(house, "two").tokens != answer(house, "one").tokens
    assert [ref.digest for ref in first.adapters] == [old.digest]
    tokens = [token.id for message in (first, *(next(begun) for _ in range(11))) for token in message.tokens]
    begun.cancel()
    assert tokens[:11] == [token.id for token in answer(house, "one").tokens][:11]
    assert refusal(lambda: answer(house, f"mine@{old.digest}")).code is grpc.StatusCode.NOT_FOUND


def test_what_the_mask_does_not_name_is_left_whatever_the_message_holds(house: House) -> None:
    created = house.create("mine", "one", labels={"team": "a"}, pinned=True)
    read = pb2.Adapter()
    read.CopyFrom(created)
    read.labels["team"] = "b"
    read.source = "file:/nowhere"
    read.pinned = False
    request = pb2.UpdateAdapterRequest(adapter=read, update_mask={"paths": ["labels"]})
    updated = house.adapters.UpdateAdapter(request).adapter
    created.labels["team"] = "b"
    assert updated == created


@pytest.mark.parametrize(
    ("paths", "fields", "expected"),
    [
        ([], {"pinned": True}, (True, {"team": "a"})),
        ([], {"labels": {"x": "y"}}, (False, {"x": "y"})),
        ([], {"labels": {"x": "y"}, "pinned": True}, (True, {"x": "y"})),
        (["pinned"], {"pinned": True, "labels": {"x": "y"}}, (True, {"team": "a"})),
        (["pinned"], {}, (False, {"team": "a"})),
        (["labels"], {}, (False, {})),
        (["labels", "labels"], {"labels": {"x": "y"}}, (False, {"x": "y"})),
        (["pinned", "labels"], {"pinned": True, "labels": {"team": "b", "x": ""}}, (True, {"team": "b", "x": ""})),
    ],
)
def test_a_mask_says_what_changes(
    house: House, paths: list[str], fields: dict[str, Any], expected: tuple[bool, dict[str, str]]
) -> None:
    house.create("mine", "three", labels={"team": "a"})
    updated = house.update("mine", *paths, **fields)
    assert (updated.pinned, dict(updated.labels)) == expected
    assert updated.source == house.source("three")
    assert updated == house.get("mine")


def test_a_star_stands_for_all_that_can_be_changed(house: House) -> None:
    house.create("mine", "one", labels={"team": "a"}, pinned=True)
    updated = house.update("mine", "*", folder="two")
    assert (updated.source, updated.pinned, dict(updated.labels)) == (house.source("two"), False, {})
    assert list(refusal(raw(house, ["*"], pinned=True)).violations) == ["adapter.source"]


def test_an_update_can_unpin_what_nothing_else_could_evict(house: House) -> None:
    house.create("mine", "three", pinned=True)
    pinned = house.store.capacity().pages_pinned
    house.update("mine", "pinned", pinned=False)
    assert house.store.capacity().pages_pinned == pinned - 1
    house.update("mine", "pinned", pinned=True)
    assert house.store.capacity().pages_pinned == pinned


@pytest.mark.parametrize("path", sorted(set(pb2.Adapter.DESCRIPTOR.fields_by_name) - MUTABLE))
def test_no_other_field_can_be_changed(house: House, path: str) -> None:
    created = house.create("mine", "three")
    refused = refusal(raw(house, ["pinned", path], pinned=True))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(refused.violations) == ["update_mask.paths[1]"]
    assert repr(path) in refused.violations["update_mask.paths[1]"]
    assert house.get("mine") == created


@pytest.mark.parametrize(
    "path", ["", " ", "Pinned", "sources", "labels.team", "labels.", "*", "adapter.pinned", "é", "x" * 100_000]
)
def test_a_path_that_names_nothing_is_refused_by_name(house: House, path: str) -> None:
    created = house.create("mine", "three")
    refused = refusal(raw(house, [path, "pinned"], pinned=True))
    assert list(refused.violations) == ["update_mask.paths[0]"]
    assert repr(path[:50])[1:-1] in refused.violations["update_mask.paths[0]"]
    assert house.get("mine") == created


@pytest.mark.parametrize(
    ("paths", "fields", "path"),
    [
        ([], {}, "update_mask"),
        ([], {"pinned": False, "source": ""}, "update_mask"),
        ([], {"pinned": True, "digest": "sha256:00"}, "adapter.digest"),
        ([], {"pinned": True, "parity_error": 0.5}, "adapter.parity_error"),
        (["pinned"] * 65, {"pinned": True}, "update_mask.paths"),
        (["pinned"] * 100_000, {"pinned": True}, "update_mask.paths"),
        (["source"], {}, "adapter.source"),
        (["source"], {"source": "/no/scheme"}, "adapter.source"),
        (["source"], {"source": "file:/etc"}, "adapter.source"),
        (["labels"], {"labels": {str(i): "" for i in range(65)}}, "adapter.labels"),
        (["labels"], {"labels": {"": "x"}}, "adapter.labels['']"),
        (["labels"], {"labels": {"k": "v" * 257}}, "adapter.labels['k']"),
        (["labels"], {"labels": {"k" * 100_000: ""}}, f"adapter.labels['{'k' * 181}…"),
        ([], {"labels": {"k": "v" * 257}}, "adapter.labels['k']"),
        (["pinned"], {"name": ""}, "adapter.name"),
        (["pinned"], {"name": "a" * 129}, "adapter.name"),
    ],
)
def test_a_bad_update_is_named_and_changes_nothing(
    house: House, paths: list[str], fields: dict[str, Any], path: str
) -> None:
    created = house.create("mine", "three")
    refused = refusal(raw(house, paths, **fields))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(refused.violations) == [path]
    assert house.get("mine") == created


@pytest.mark.parametrize("folder", ["empty", "stranger", "nowhere", "huge"])
def test_a_source_that_can_not_be_served_leaves_the_adapter_as_it_was(house: House, folder: str) -> None:
    created = house.create("mine", "three", labels={"team": "a"})
    fields = {"pinned": True, "labels": {"team": "b"}}
    refused = refusal(lambda: house.update("mine", "source", "labels", "pinned", folder=folder, **fields))
    assert refused.code is grpc.StatusCode.FAILED_PRECONDITION
    assert refused.reason == "ADAPTER_NOT_SERVABLE"
    assert house.get("mine") == created
    assert answer(house, "mine").adapters[0].digest == created.digest


def test_an_adapter_that_is_not_there_is_not_found(house: House) -> None:
    for paths in (["source"], ["pinned"], ["labels"]):
        refused = refusal(lambda paths=paths: house.update("none", *paths, folder="three"))
        assert refused.code is grpc.StatusCode.NOT_FOUND


def test_a_new_source_mends_an_adapter_whose_load_failed(house: House) -> None:
    house.create("mine", "empty", wait=False)
    assert house.settled("mine").state == pb2.ADAPTER_STATE_FAILED
    mended = house.update("mine", "source", folder="three")
    assert (mended.state, mended.error) == (pb2.ADAPTER_STATE_DEVICE, "")


def test_only_a_new_source_is_timed_as_a_load(house: House) -> None:
    house.create("mine", "one")
    before = house.metric("weft_adapter_load_seconds_count", outcome="ok") or 0
    house.update("mine", "labels", "pinned", labels={"a": "b"}, pinned=True)
    assert house.metric("weft_adapter_load_seconds_count", outcome="ok") == before
    house.update("mine", "source", folder="three")
    assert house.metric("weft_adapter_load_seconds_count", outcome="ok") == before + 1


def test_a_storm_of_updates_gives_no_request_a_wrong_token(house: House) -> None:
    """Whatever version a request says that it got, its tokens are that version's."""
    folders = ("one", "two", "three")
    house.create("mine", "one")
    house.create("third", "three")
    names = {"one": "one", "two": "two", "three": "third"}
    expected = {house.digest(names[folder]): answer(house, names[folder]).tokens for folder in folders}
    sources = {house.digest(names[folder]): house.source(folder) for folder in folders}
    over = threading.Event()

    def update(seed: int) -> None:
        draw = random.Random(seed)
        while not over.is_set():
            folder = draw.choice((*folders, "empty"))
            paths = draw.sample(sorted(MUTABLE), draw.randint(1, 3))
            try:
                house.update("mine", *paths, folder=folder, pinned=draw.random() < 0.5, labels={"by": str(seed)})
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.FAILED_PRECONDITION  # noqa: PT017 - those of "empty" alone
                assert folder == "empty"

    def ask(_: int) -> None:
        response = answer(house, "mine")
        assert response.tokens == expected[response.adapters[0].digest]
        adapter = house.get("mine")
        assert sources[adapter.digest] == adapter.source

    with ThreadPoolExecutor(8) as pool:
        updates = [pool.submit(update, seed) for seed in range(4)]
        try:
            for asked in [pool.submit(ask, number) for number in range(60)]:
                asked.result()
        finally:
            over.set()
        for done in updates:
            done.result()
    last = house.update("mine", "*", folder="two", labels={"by": "the last"})
    assert (last.digest, dict(last.labels)) == (house.digest("two"), {"by": "the last"})
