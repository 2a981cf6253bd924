"""AdapterService over real gRPC."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2 as details_pb2
from house import ADAPTER_PAGES, House, generate, refusal, stream

from weft.v1 import adapter_pb2 as pb2

pytestmark = pytest.mark.usefixtures("leaves_nothing_behind")


def pages(house: House, page_size: int, **fields: Any) -> list[list[str]]:
    names: list[list[str]] = []
    token = ""
    while not names or token:
        request = pb2.ListAdaptersRequest(page_size=page_size, page_token=token, **fields)
        response = house.adapters.ListAdapters(request)
        names.append([adapter.name for adapter in response.adapters])
        token = response.next_page_token
    return names


def test_create_waits_for_the_load(house: House) -> None:
    created = house.create("new/one-1.0_b", "three", pinned=True, labels={"team": "a"})
    assert created == house.get("new/one-1.0_b")
    assert created.state == pb2.ADAPTER_STATE_DEVICE
    assert created.source == house.source("three")
    assert created.digest.startswith("sha256:")
    assert (list(created.ranks), list(created.modules)) == ([8], ["down_proj", "q_proj", "v_proj"])
    assert created.num_pages == 1
    assert created.device_bytes > 0
    assert created.host_bytes == created.disk_bytes > 0
    assert 0 <= created.parity_error < 1e-4
    assert created.pinned
    assert dict(created.labels) == {"team": "a"}
    assert created.HasField("create_time")
    assert not created.HasField("last_used_time")
    assert created.requests_in_flight == 0
    response = house.inference.Generate(generate(text="x", adapter_id=created.name, stopping={"max_tokens": 1}))
    assert response.adapters[0].digest == created.digest
    assert house.get(created.name).HasField("last_used_time")


def test_create_answers_at_once_if_asked_to(house: House) -> None:
    created = house.create("later", "three", wait=False)
    assert (created.state, created.digest) == (pb2.ADAPTER_STATE_LOADING, "")
    loaded = house.settled("later")
    assert loaded.state == pb2.ADAPTER_STATE_DEVICE
    assert loaded.digest


def test_a_load_in_the_background_that_fails_says_why_and_may_be_tried_again(house: House) -> None:
    house.create("later", "empty", wait=False)
    failed = house.settled("later")
    assert failed.state == pb2.ADAPTER_STATE_FAILED
    assert "adapter_config.json" in failed.error
    refused = refusal(lambda: house.inference.Generate(generate(text="x", adapter_id="later")))
    assert refused.code is grpc.StatusCode.NOT_FOUND
    assert "failed" in refused.message
    assert house.create("later", "three").state == pb2.ADAPTER_STATE_DEVICE


@pytest.mark.parametrize(
    ("folder", "subject", "words"),
    [
        ("empty", "adapter_config.json", ""),
        ("stranger", "model.layers.0.self_attn.q_proj", "shape"),
        ("nowhere", "nowhere", "is not a folder"),
    ],
)
def test_what_this_base_cannot_serve_is_refused_and_leaves_no_name(
    house: House, folder: str, subject: str, words: str
) -> None:
    refused = refusal(lambda: house.create("broken", folder))
    assert refused.code is grpc.StatusCode.FAILED_PRECONDITION
    assert refused.reason == "ADAPTER_NOT_SERVABLE"
    violations = refused.detail(details_pb2.PreconditionFailure).violations
    assert {violation.type for violation in violations} == {"ADAPTER"}
    assert any(subject in violation.subject and words in violation.description for violation in violations)
    assert refusal(lambda: house.get("broken")).code is grpc.StatusCode.NOT_FOUND


def test_a_name_that_is_taken_is_refused(house: House) -> None:
    for wait in (True, False):
        refused = refusal(lambda wait=wait: house.create("one", "two", wait=wait))
        assert refused.code is grpc.StatusCode.ALREADY_EXISTS
        assert refused.reason == "ADAPTER_EXISTS"
        assert refused.detail(details_pb2.ResourceInfo).resource_name == "one"


def test_more_than_all_pages_hold_is_refused_with_the_remedy(house: House) -> None:
    refused = refusal(lambda: house.create("huge", "huge"))
    assert refused.code is grpc.StatusCode.FAILED_PRECONDITION
    assert f"start the server with --adapter-pages {ADAPTER_PAGES + 1} or more" in refused.message


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"name": ""}, "adapter.name"),
        ({"name": "a..b"}, "adapter.name"),
        ({"name": "a@b"}, "adapter.name"),
        ({"name": "a,b"}, "adapter.name"),
        ({"name": "-a"}, "adapter.name"),
        ({"name": "a" * 129}, "adapter.name"),
        ({"source": ""}, "adapter.source"),
        ({"source": "/no/scheme"}, "adapter.source"),
        ({"source": "file:/etc"}, "adapter.source"),
        ({"source": "s3://bucket"}, "adapter.source"),
        ({"digest": "sha256:00"}, "adapter.digest"),
        ({"state": pb2.ADAPTER_STATE_DEVICE}, "adapter.state"),
        ({"ranks": [8]}, "adapter.ranks"),
        ({"device_bytes": 1}, "adapter.device_bytes"),
        ({"error": "x"}, "adapter.error"),
        ({"create_time": {"seconds": 1}}, "adapter.create_time"),
        ({"requests_in_flight": 1}, "adapter.requests_in_flight"),
        ({"num_pages": 1}, "adapter.num_pages"),
        ({"parity_error": 0.0}, "adapter.parity_error"),
        ({"labels": {str(i): "" for i in range(65)}}, "adapter.labels"),
        ({"labels": {str(i): "v" * 257 for i in range(65)}}, "adapter.labels"),
        ({"labels": {"": "x"}}, "adapter.labels['']"),
        ({"labels": {"k": "v" * 257}}, "adapter.labels['k']"),
        ({"labels": {"k": "\x1b[31mred"}}, "adapter.labels['k']"),
        ({"labels": {"k\n": "v"}}, "adapter.labels['k\\n']"),
        ({"labels": {"k": "\u202e"}}, "adapter.labels['k']"),
    ],
)
@pytest.mark.parametrize("wait", [True, False])
def test_a_bad_field_is_named(house: House, fields: dict[str, Any], path: str, wait: bool) -> None:
    adapter = {"name": "new", "source": house.source("three"), **fields}
    request = pb2.CreateAdapterRequest(adapter=adapter, wait=wait)
    refused = refusal(lambda: house.adapters.CreateAdapter(request))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(refused.violations) == [path]


def test_a_source_that_leaves_its_root_by_a_link_is_refused(house: House) -> None:
    link = house.root / "adapters" / "link"
    link.symlink_to(house.root / "base")
    refused = refusal(lambda: house.create("linked", "link"))
    link.unlink()
    assert list(refused.violations) == ["adapter.source"]


def test_an_unset_adapter_misses_both_required_fields(house: House) -> None:
    refused = refusal(lambda: house.adapters.CreateAdapter(pb2.CreateAdapterRequest()))
    assert set(refused.violations) == {"adapter.name", "adapter.source"}


def test_list_goes_by_name_and_by_pages(house: House) -> None:
    for name in ("a/x", "a", "b"):
        house.create(name, "three")
    assert pages(house, 2) == [["a", "a/x"], ["b", "one"], ["two"]]
    assert pages(house, 5) == [["a", "a/x", "b", "one", "two"]]
    assert pages(house, 1000) == [["a", "a/x", "b", "one", "two"]]
    default = house.adapters.ListAdapters(pb2.ListAdaptersRequest())
    assert [adapter.name for adapter in default.adapters] == ["a", "a/x", "b", "one", "two"]


def test_a_page_goes_on_where_the_last_one_ended_whatever_was_deleted(house: House) -> None:
    for name in ("a", "b", "c"):
        house.create(name, "three")
    first = house.adapters.ListAdapters(pb2.ListAdaptersRequest(page_size=2))
    house.delete("b")
    rest = house.adapters.ListAdapters(pb2.ListAdaptersRequest(page_token=first.next_page_token))
    assert [adapter.name for adapter in rest.adapters] == ["c", "one", "two"]


def test_list_filters_by_state(house: House) -> None:
    house.create("broken", "empty", wait=False)
    house.settled("broken")
    assert pages(house, 1, state=pb2.ADAPTER_STATE_FAILED) == [["broken"]]
    assert pages(house, 1, state=pb2.ADAPTER_STATE_DEVICE) == [["one"], ["two"]]
    assert pages(house, 1, state=pb2.ADAPTER_STATE_HOST) == [[]]


def test_list_filters_by_labels_and_by_prefix(house: House) -> None:
    house.create("a/1", "three", labels={"team": "a", "tier": "gold"})
    house.create("a/2", "three", labels={"team": "a"})
    house.create("b/1", "three", labels={"team": "b", "tier": "gold"})
    assert pages(house, 9, labels={"team": "a"}) == [["a/1", "a/2"]]
    assert pages(house, 1, labels={"tier": "gold"}) == [["a/1"], ["b/1"]]
    assert pages(house, 9, labels={"team": "a", "tier": "gold"}) == [["a/1"]]
    assert pages(house, 9, labels={"team": ""}) == [[]]
    assert pages(house, 9, name_prefix="a/") == [["a/1", "a/2"]]
    assert pages(house, 9, name_prefix="a/", labels={"tier": "gold"}) == [["a/1"]]
    assert pages(house, 9, name_prefix="one") == [["one"]]
    assert pages(house, 9, name_prefix="onee") == [[]]


def test_pages_while_names_come_and_go_hold_each_that_stays_once(house: House) -> None:
    staying = [f"stay/{i:02}" for i in range(12)]
    for name in staying:
        house.create(name, "three")
    seen: list[str] = []
    token = ""
    for turn in range(100):
        page = house.adapters.ListAdapters(pb2.ListAdaptersRequest(page_size=3, page_token=token))
        seen += [adapter.name for adapter in page.adapters]
        token = page.next_page_token
        if not token:
            break
        house.create(f"{seen[-1]}-after", "three")
        house.create(f"a/{turn}", "three")
        if seen[-1] not in staying and seen[-1].startswith("stay/"):
            house.delete(seen[-1])
    assert not token
    assert len(seen) == len(set(seen))
    assert seen == sorted(seen)
    assert set(staying) <= set(seen)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"labels": {str(i): "" for i in range(65)}}, "labels"),
        ({"labels": {"": "x"}}, "labels['']"),
        ({"labels": {"k": "v" * 257}}, "labels['k']"),
        ({"name_prefix": "a" * 129}, "name_prefix"),
        ({"page_size": 0}, "page_size"),
        ({"page_size": -1}, "page_size"),
        ({"page_size": 1001}, "page_size"),
        ({"page_token": "?"}, "page_token"),
        ({"page_token": "\u00e9"}, "page_token"),
        ({"page_token": "_w=="}, "page_token"),
        ({"state": 99}, "state"),
    ],
)
def test_a_bad_list_request_is_named(house: House, fields: dict[str, Any], path: str) -> None:
    refused = refusal(lambda: house.adapters.ListAdapters(pb2.ListAdaptersRequest(**fields)))
    assert list(refused.violations) == [path]


def test_an_integer_out_of_range_is_told_in_all_its_digits(house: House) -> None:
    refused = refusal(lambda: house.adapters.ListAdapters(pb2.ListAdaptersRequest(page_size=2**31 - 1)))
    assert refused.violations["page_size"] == "is 2147483647; must be at least 1 and at most 1000"


def test_get_counts_the_requests_in_flight(house: House) -> None:
    call = house.inference.StreamGenerate(
        stream(text="x", adapter_id="two", stopping={"max_tokens": 60_000, "ignore_eos": True})
    )
    next(call)
    assert house.get("two").requests_in_flight == 1
    call.cancel()


def test_delete_frees_the_name(house: House) -> None:
    house.create("gone", "three")
    deleted = house.delete("gone")
    assert (deleted.name, deleted.state) == ("gone", pb2.ADAPTER_STATE_DEVICE)
    for call in (lambda: house.get("gone"), lambda: house.delete("gone")):
        refused = refusal(call)
        assert refused.code is grpc.StatusCode.NOT_FOUND
        assert refused.detail(details_pb2.ResourceInfo).resource_name == "gone"
    house.create("gone", "three")


@pytest.mark.parametrize("method", ["GetAdapter", "DeleteAdapter"])
@pytest.mark.parametrize("name", ["", "a" * 129])
def test_no_name_is_no_adapter(house: House, method: str, name: str) -> None:
    request = getattr(pb2, f"{method}Request")(name=name)
    assert list(refusal(lambda: getattr(house.adapters, method)(request)).violations) == ["name"]


def test_two_names_of_one_content_share_its_pages(house: House) -> None:
    used = house.store.num_pages[0]
    assert house.create("twin", "one").digest == house.digest("one")
    assert house.store.num_pages[0] == used


def test_loads_are_timed(house: House) -> None:
    ok = house.metric("weft_adapter_load_seconds_count", outcome="ok") or 0
    failed = house.metric("weft_adapter_load_seconds_count", outcome="failed") or 0
    house.create("timed", "three")
    refusal(lambda: house.create("broken", "empty"))
    assert house.metric("weft_adapter_load_seconds_count", outcome="ok") == ok + 1
    assert house.metric("weft_adapter_load_seconds_count", outcome="failed") == failed + 1
