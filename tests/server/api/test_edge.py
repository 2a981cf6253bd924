"""What every RPC passes on its way in and out, with servicers that misbehave and bytes that no stub would send."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2 as details_pb2
from house import House, Refusal, generate, refusal, refusal_of

from weft.errors import DeadlineExceeded, InvalidRequest, WeftError
from weft.server.api.access.gate import Gate
from weft.server.api.chat import MAX_CHAT_MESSAGES
from weft.server.api.edge import MAX_ITEMS, MAX_UNKNOWN_BYTES, Edge, EndedByEngine
from weft.server.api.translation import MAX_ADAPTERS
from weft.v1 import inference_pb2 as pb2
from weft.v1 import inference_pb2_grpc

SERVICE = "/weft.v1.InferenceService"
UNKNOWN = bytes([(99 << 3) & 0x7F | 0x80, 99 >> 4, 1])
"""Field 99, a varint: 1."""


class Misbehaving(inference_pb2_grpc.InferenceServiceServicer):
    """Fails before or after its first message, and tells when it is closed."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.closed = asyncio.Event()

    async def Generate(self, request: pb2.GenerateRequest, context: Any) -> pb2.GenerateResponse:  # noqa: N802
        raise self.error

    async def StreamGenerate(  # noqa: N802
        self, request: pb2.StreamGenerateRequest, context: Any
    ) -> AsyncIterator[pb2.StreamGenerateResponse]:
        try:
            yield pb2.StreamGenerateResponse(text="begun")
            if request.text == "wait":
                await asyncio.Event().wait()
            raise self.error
        finally:
            self.closed.set()


@asynccontextmanager
async def served(
    servicer: Misbehaving | None, count_refusal: Callable[[str], None] = lambda code: None
) -> AsyncIterator[grpc.aio.Channel]:
    server, edge = grpc.aio.server(), Edge(count_refusal, Gate())
    server.add_generic_rpc_handlers((edge,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    added: Any = edge
    if servicer is not None:
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, added)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(None)


async def both_ways(channel: grpc.aio.Channel) -> list[Refusal]:
    """How Generate and StreamGenerate are refused."""
    stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
    with pytest.raises(grpc.RpcError) as unary:
        await stub.Generate(pb2.GenerateRequest())
    with pytest.raises(grpc.RpcError) as streamed:
        [message async for message in stub.StreamGenerate(pb2.StreamGenerateRequest())]
    return [refusal_of(unary.value), refusal_of(streamed.value)]


def test_an_unexpected_exception_is_internal_says_nothing_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> list[Refusal]:
        async with served(Misbehaving(RuntimeError("a secret path"))) as channel:
            return await both_ways(channel)

    with caplog.at_level(logging.WARNING):
        unary, streamed = asyncio.run(main())
    for refused in (unary, streamed):
        assert refused.code is grpc.StatusCode.INTERNAL
        assert refused.reason == "INTERNAL"
        assert "secret" not in str(refused.status)
    failures = [record for record in caplog.records if record.name.startswith("weft")]
    assert [record.getMessage() for record in failures] == [
        f"{SERVICE}/Generate failed",
        f"{SERVICE}/StreamGenerate failed",
    ]
    assert all(record.exc_info and "a secret path" in str(record.exc_info[1]) for record in failures)


def test_an_error_of_wefts_own_is_answered_and_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> list[Refusal]:
        async with served(Misbehaving(WeftError("the reason"))) as channel:
            return await both_ways(channel)

    with caplog.at_level(logging.WARNING):
        refusals = asyncio.run(main())
    assert [refused.message for refused in refusals] == ["the reason"] * 2
    assert not [record for record in caplog.records if record.name.startswith("weft")]


def test_until_there_are_servicers_every_method_is_unavailable() -> None:
    async def main() -> list[Refusal]:
        async with served(None) as channel:
            return await both_ways(channel)

    for refused in asyncio.run(main()):
        assert refused.code is grpc.StatusCode.UNAVAILABLE
        assert refused.reason == "UNAVAILABLE"
        assert refused.detail(details_pb2.RetryInfo).retry_delay.ToNanoseconds() > 0


def test_a_change_that_is_asked_for_while_the_model_loads_leaves_its_line(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with served(None) as channel:
            delete = channel.unary_unary("/weft.v1.AdapterService/DeleteAdapter")
            with pytest.raises(grpc.aio.AioRpcError):
                await delete(b"")

    with caplog.at_level(logging.INFO, "weft.audit"):
        asyncio.run(main())
    (line,) = (record.getMessage() for record in caplog.records if record.name == "weft.audit")
    assert line.startswith("caller=- peer=ipv4:127.0.0.1:")
    assert line.endswith(" method=DeleteAdapter adapter=- digest=- outcome=unavailable")


def test_a_servicer_is_closed_when_its_client_goes() -> None:
    async def main() -> None:
        servicer = Misbehaving(RuntimeError())
        async with served(servicer) as channel:
            stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            call = stub.StreamGenerate(pb2.StreamGenerateRequest(text="wait"))
            assert (await call.read()).text == "begun"
            call.cancel()
            await asyncio.wait_for(servicer.closed.wait(), 60)

    asyncio.run(main())


def test_a_method_that_is_not_there_is_unimplemented(house: House) -> None:
    assert raw_code(house, f"{SERVICE}/Nothing", b"") is grpc.StatusCode.UNIMPLEMENTED
    assert raw_code(house, "/weft.v2.InferenceService/Generate", b"") is grpc.StatusCode.UNIMPLEMENTED


def test_bytes_that_are_no_message_are_a_bad_request(house: House) -> None:
    for payload in (b"\xff\xff\xff", b"\x0a\x02\xff\xff"):
        refused = raw(house, f"{SERVICE}/Generate", payload)
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert list(refused.violations) == ["request"]


def inside(field: int, payload: bytes) -> bytes:
    """A message's field that holds a message."""
    return bytes([field << 3 | 2, len(payload)]) + payload


@pytest.mark.parametrize(
    ("method", "extra", "path"),
    [
        ("Generate", UNKNOWN, "99"),
        ("StreamGenerate", UNKNOWN, "99"),
        ("Generate", inside(6, UNKNOWN), "sampling.99"),
        ("Generate", inside(2, b"\x0a\x03one") + inside(2, b"\x0a\x03two" + UNKNOWN), "adapters[1].99"),
        ("Generate", inside(5, inside(1, UNKNOWN)), "chat.messages[0].99"),
        ("Tokenize", UNKNOWN, "99"),
    ],
)
def test_a_field_that_this_server_does_not_know_is_refused(house: House, method: str, extra: bytes, path: str) -> None:
    refused = raw(house, f"{SERVICE}/{method}", extra)
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(refused.violations) == [path]
    assert "does not know" in refused.violations[path]


def test_unknown_fields_are_refused_by_the_other_services_too(house: House) -> None:
    for method in ("AdapterService/ListAdapters", "ServerService/GetServerInfo"):
        assert list(raw(house, f"/weft.v1.{method}", UNKNOWN).violations) == ["99"]


@pytest.mark.parametrize(
    "payload",
    [
        UNKNOWN * (MAX_UNKNOWN_BYTES // len(UNKNOWN) + 1),
        generate(chat={"messages": [{}] * MAX_ITEMS}).SerializeToString() + inside(5, inside(1, UNKNOWN)),
    ],
    ids=["too many to name", "far down a list"],
)
def test_unknown_fields_that_are_not_looked_up_one_by_one_are_refused_all_the_same(
    house: House, payload: bytes
) -> None:
    refused = raw(house, f"{SERVICE}/Generate", payload)
    assert list(refused.violations) == ["request"]
    assert "bytes of fields that this server does not know" in refused.violations["request"]


def test_no_list_that_is_taken_is_longer_than_what_is_searched() -> None:
    assert max(MAX_ADAPTERS, MAX_CHAT_MESSAGES) <= MAX_ITEMS


def test_refusals_are_counted_by_code() -> None:
    async def main(servicer: Misbehaving | None) -> list[str]:
        counted: list[str] = []
        async with served(servicer, counted.append) as channel:
            await both_ways(channel)
        return counted

    assert asyncio.run(main(None)) == ["unavailable"] * 2
    assert asyncio.run(main(Misbehaving(InvalidRequest.of("text", "is bad")))) == ["invalid_argument"] * 2
    assert asyncio.run(main(Misbehaving(RuntimeError()))) == ["internal"] * 2
    ended = Misbehaving(EndedByEngine(DeadlineExceeded("late")))
    assert asyncio.run(main(ended)) == [], "the engine has counted it"


def test_a_refusal_is_in_the_metrics(house: House) -> None:
    def count() -> float:
        return house.metric("weft_refused_requests_total", code="invalid_argument") or 0.0

    before = count()
    refusal(lambda: house.inference.Generate(generate()))
    assert count() == before + 1
    house.inference.Generate(generate(text="x", stopping={"max_tokens": 1}))
    assert count() == before + 1


def test_a_prompt_of_megabytes_is_refused_in_words(house: House) -> None:
    refused = refusal(lambda: house.inference.Generate(generate(text="x" * (5 << 20))))
    assert list(refused.violations) == ["text"]


def raw(house: House, method: str, payload: bytes) -> Refusal:
    return refusal(send(house, method, payload))


def raw_code(house: House, method: str, payload: bytes) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as raised:
        send(house, method, payload)()
    code = raised.value.code()
    assert isinstance(code, grpc.StatusCode)
    return code


def send(house: House, method: str, payload: bytes) -> Callable[[], Any]:
    """Bytes to a method, as they are."""
    call = house.channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)
    return lambda: call(payload)
