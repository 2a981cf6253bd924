"""Requests that don't run to their end, and adapters that go while they are used: nothing is left behind."""

from __future__ import annotations

import queue
import threading
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2 as details_pb2
from house import ENDLESS, MAX_QUEUED, MAX_RUNNING, House, generate, refusal, refusal_of, stream

from weft.server.engine.constraints import Compiler, Constraint, Spec, UnsupportedTokenizer
from weft.v1 import inference_pb2 as pb2

PROMPT = {"token_ids": {"ids": [5, 6, 7]}}
FOR_EVER = {"max_tokens": ENDLESS, "ignore_eos": True}


def endless(house: House, adapter_id: str = "one", **options: Any) -> Any:
    """A stream that goes on until it is stopped, its first message read."""
    call = house.inference.StreamGenerate(stream(adapter_id=adapter_id, stopping=FOR_EVER, **PROMPT), **options)
    next(call)
    return call


def test_cancelling_a_stream_frees_everything(house: House) -> None:
    calls = [endless(house) for _ in range(MAX_RUNNING)]
    for call in calls:
        call.cancel()
        with pytest.raises(grpc.RpcError) as raised:
            list(call)
        assert raised.value.code() is grpc.StatusCode.CANCELLED
    house.audit()


def test_cancelling_a_unary_call_frees_everything(house: House) -> None:
    beside = endless(house)
    call = house.inference.Generate.future(generate(adapter_id="two", stopping=FOR_EVER, **PROMPT))
    while not any(info.name == "two" and info.num_in_flight for info in house.store.list()):
        next(beside)
    call.cancel()
    beside.cancel()
    assert call.cancelled()
    house.audit()


def test_a_deadline_ends_a_stream_that_runs(house: House) -> None:
    call = house.inference.StreamGenerate(stream(adapter_id="one", stopping=FOR_EVER, **PROMPT), timeout=2.0)
    parts: list[Any] = []
    with pytest.raises(grpc.RpcError) as raised:
        parts.extend(call)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert parts, "what was made before the deadline is in the stream"
    house.audit()


def test_a_deadline_ends_a_request_that_waits(house: House) -> None:
    running = [endless(house) for _ in range(MAX_RUNNING)]
    request = generate(adapter_id="two", stopping=FOR_EVER, **PROMPT)
    refused = refusal(lambda: house.inference.Generate(request, timeout=0.5))
    assert refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
    for call in running:
        next(call)
        call.cancel()
    house.audit()


def test_without_a_deadline_the_servers_own_applies(house: House) -> None:
    request = generate(adapter_id="one", stopping=FOR_EVER, **PROMPT)
    with house.variant(max_request_s=0.5) as inference:
        refused = refusal(lambda: inference.Generate(request))
        assert refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert refused.reason == "DEADLINE_EXCEEDED"
        later = inference.Generate(generate(stopping={"max_tokens": 1}, **PROMPT), timeout=60)
        assert later.usage.completion_tokens == 1
    house.audit()


class StuckCompiler(Compiler):
    """Compiles nothing before it is let."""

    def __init__(self) -> None:
        super().__init__(UnsupportedTokenizer("there is none"))
        self.go = threading.Event()

    def compile(self, spec: Spec) -> Constraint:
        assert self.go.wait(60)
        return super().compile(spec)


def test_a_deadline_ends_a_request_whose_constraint_is_compiled(house: House) -> None:
    compiler = StuckCompiler()
    with house.variant(max_request_s=0.2, compiler=compiler) as inference:
        refused = refusal(lambda: inference.Generate(generate(regex="a", **PROMPT)))
        assert refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert refused.message == "the deadline passed before the request was queued"
        compiler.go.set()
    house.audit()


def test_the_time_limit_and_the_queue_time_run_from_the_arrival(house: House) -> None:
    with house.variant(late_s=1000.0) as inference:
        stopping = {**FOR_EVER, "time_limit": {"seconds": 999}}
        response = inference.Generate(
            generate(adapter_id="one", regex="a*", stopping={"time_limit": {"seconds": 999}}, **PROMPT)
        )
        assert response.finish_reason == pb2.FINISH_REASON_TIME_LIMIT
        assert (response.text, len(response.tokens)) == ("", 0)
        parts = list(inference.StreamGenerate(stream(stopping=stopping, **PROMPT)))
        assert [part.finish_reason for part in parts] == [pb2.FINISH_REASON_TIME_LIMIT]
        longer = {"max_tokens": 1, "time_limit": {"seconds": 3600}}
        response = inference.Generate(generate(stopping=longer, **PROMPT))
        assert response.finish_reason == pb2.FINISH_REASON_MAX_TOKENS
        assert response.timing.queue.seconds >= 1000
    house.audit()


def test_more_than_the_queue_holds_is_refused_with_a_time_to_retry(house: House) -> None:
    num_extra = 5
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    request = generate(adapter_id="one", stopping=FOR_EVER, **PROMPT)
    calls = [house.inference.Generate.future(request) for _ in range(MAX_RUNNING + MAX_QUEUED + num_extra)]
    for call in calls:
        call.add_done_callback(ended.put)
    for _ in range(num_extra):
        refused = refusal_of(ended.get(timeout=60))
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.reason == "OUT_OF_CAPACITY"
        assert refused.detail(details_pb2.RetryInfo).retry_delay.ToNanoseconds() > 0
    assert ended.empty()
    for call in calls:
        call.cancel()
    house.audit()


def test_an_adapter_deleted_in_flight_serves_its_requests_to_their_end(house: House) -> None:
    used_before = house.store.num_pages[0]
    digest = house.create("passing", "three").digest
    call = endless(house, "passing")
    assert house.delete("passing").requests_in_flight == 1
    for _ in range(20):
        assert next(call).tokens
    refused = refusal(lambda: house.inference.Generate(generate(adapter_id="passing", **PROMPT)))
    assert refused.code is grpc.StatusCode.NOT_FOUND
    assert house.store.num_pages[0] > used_before, "its pages stay while it is used"
    house.create("passing", "one")
    pinned = refusal(lambda: house.inference.Generate(generate(adapter_id=f"passing@{digest}", **PROMPT)))
    assert pinned.code is grpc.StatusCode.NOT_FOUND, "the name stands for another version now"
    house.delete("passing")
    call.cancel()
    house.audit()
    assert house.store.num_pages[0] == used_before


def test_adapters_in_flight_are_published(house: House) -> None:
    call = endless(house, "two")
    response = house.inference.Generate(generate(stopping={"max_tokens": 2}, **PROMPT))
    assert response.usage.completion_tokens == 2
    assert (house.metric("vllm:num_requests_running", model_name=str(house.root / "base")) or 0) >= 1
    call.cancel()
    house.audit()
    assert house.metric("vllm:num_requests_running", model_name=str(house.root / "base")) == 0
    assert house.metric("weft_kv_blocks_used") == 0
