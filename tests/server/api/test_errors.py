"""The table of errors: each has its code, its reason and its details, and all of it fits in the trailers."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details_pb2
from google.rpc.status_pb2 import Status

from weft.errors import (
    AdapterExists,
    AdapterNotFound,
    DeadlineExceeded,
    GenerationFailed,
    InvalidAdapter,
    InvalidRequest,
    OutOfCapacity,
    Problem,
    Unavailable,
    WeftError,
)
from weft.server.api.errors import code_of, shorten, to_status, unexpected_status

CODE = grpc.StatusCode
TRAILERS_BYTES = 8192

TABLE: list[tuple[WeftError, grpc.StatusCode, str, list[type[Message]]]] = [
    (AdapterNotFound("x"), CODE.NOT_FOUND, "ADAPTER_NOT_FOUND", [details_pb2.ResourceInfo]),
    (InvalidRequest.of("f", "is bad"), CODE.INVALID_ARGUMENT, "INVALID_REQUEST", [details_pb2.BadRequest]),
    (
        InvalidAdapter("file:/x", [Problem("rank", "is bad")]),
        CODE.FAILED_PRECONDITION,
        "ADAPTER_NOT_SERVABLE",
        [details_pb2.PreconditionFailure],
    ),
    (AdapterExists("x"), CODE.ALREADY_EXISTS, "ADAPTER_EXISTS", [details_pb2.ResourceInfo]),
    (OutOfCapacity("full"), CODE.RESOURCE_EXHAUSTED, "OUT_OF_CAPACITY", [details_pb2.RetryInfo]),
    (Unavailable("draining"), CODE.UNAVAILABLE, "UNAVAILABLE", [details_pb2.RetryInfo]),
    (DeadlineExceeded("late"), CODE.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", []),
    (GenerationFailed("nan"), CODE.INTERNAL, "GENERATION_FAILED", []),
    (WeftError("odd"), CODE.INTERNAL, "INTERNAL", []),
]


def detail_types(status: Status) -> list[str]:
    return [packed.type_url.rpartition("/")[2] for packed in status.details]


@pytest.mark.parametrize(("error", "code", "reason", "details"), TABLE, ids=lambda value: type(value).__name__)
def test_each_error_has_its_code_and_details(
    error: WeftError, code: grpc.StatusCode, reason: str, details: list[type[Message]]
) -> None:
    status = to_status(error)
    assert code_of(status) is code
    assert status.message == str(error)
    assert detail_types(status) == [kind.DESCRIPTOR.full_name for kind in (details_pb2.ErrorInfo, *details)]
    info = details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    assert (info.domain, info.reason) == ("weft", reason)


def test_retry_info_says_when() -> None:
    retry = details_pb2.RetryInfo()
    to_status(OutOfCapacity("full", retry_after_s=0.25)).details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 250


def test_an_unexpected_exception_says_where_to_look() -> None:
    assert code_of(unexpected_status()) is CODE.INTERNAL
    assert "log" in unexpected_status().message


@pytest.mark.parametrize("num_problems", [1, 20, 1000])
@pytest.mark.parametrize("size", [1, 300, 100_000])
def test_however_much_is_wrong_the_status_fits_in_the_trailers(num_problems: int, size: int) -> None:
    problems = [Problem("é" * size, "€" * size) for _ in range(num_problems)]
    for error in (InvalidRequest(problems), InvalidAdapter("file:" + "x" * size, problems)):
        status = to_status(error)
        percent_encoded = 3 * len(status.message.encode())
        base64 = len(status.SerializeToString()) * 4 // 3
        assert percent_encoded + base64 < TRAILERS_BYTES - 500
    for single in (AdapterNotFound("x" * size), AdapterExists("x" * size), Unavailable("€" * size)):
        assert len(to_status(single).SerializeToString()) < TRAILERS_BYTES / 2


def test_what_does_not_fit_is_counted() -> None:
    bad = details_pb2.BadRequest()
    to_status(InvalidRequest([Problem(f"field{i}", "is bad" * 20) for i in range(100)])).details[1].Unpack(bad)
    listed = len(bad.field_violations) - 1
    assert bad.field_violations[0].field == "field0"
    assert bad.field_violations[-1].description == f"at least {100 - listed} more are not listed"


@pytest.mark.parametrize(("text", "max_bytes", "short"), [("abc", 3, "abc"), ("abcd", 3, "…"), ("aéb€", 6, "aé…")])
def test_a_text_is_never_cut_inside_a_character(text: str, max_bytes: int, short: str) -> None:
    assert shorten(text, max_bytes) == short
