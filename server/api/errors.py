"""The one table from Weft's errors to gRPC statuses with google.rpc details.

Details travel in HTTP/2 trailers, which gRPC clients refuse past 8 KiB in all: what does not fit is counted, not sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
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
    PermissionDenied,
    Problem,
    QuotaExceeded,
    ReaderStalled,
    Unauthenticated,
    Unavailable,
    Unsupported,
    WeftError,
)

DOMAIN = "weft"
ADAPTER_TYPE = "weft.v1.Adapter"
UNAVAILABLE_RETRY_S = 1.0

MAX_MESSAGE_BYTES = 800
MAX_VIOLATIONS_BYTES = 3000
_MAX_FIELD_BYTES = 200
_MAX_DESCRIPTION_BYTES = 500


@dataclass(frozen=True, slots=True)
class _Row:
    """How one error looks on the wire: code, the reason in ErrorInfo, and details besides."""

    code: grpc.StatusCode
    reason: str
    details: Callable[[Any], Iterable[Message]] = lambda error: ()


def _bad_request(error: InvalidRequest) -> Iterable[Message]:
    violations = [
        details_pb2.BadRequest.FieldViolation(field=problem.subject, description=problem.description)
        for problem in _that_fit(error.problems)
    ]
    yield details_pb2.BadRequest(field_violations=violations)


def _precondition_failure(error: InvalidAdapter) -> Iterable[Message]:
    violations = [
        details_pb2.PreconditionFailure.Violation(
            type="ADAPTER", subject=problem.subject, description=problem.description
        )
        for problem in _that_fit(error.problems)
    ]
    yield details_pb2.PreconditionFailure(violations=violations)


def _adapter(name: str, description: str) -> Iterable[Message]:
    yield details_pb2.ResourceInfo(
        resource_type=ADAPTER_TYPE,
        resource_name=shorten(name, _MAX_FIELD_BYTES),
        description=shorten(description, _MAX_DESCRIPTION_BYTES),
    )


def _retry(delay_s: float) -> Iterable[Message]:
    delay = Duration()
    delay.FromNanoseconds(int(delay_s * 1e9))
    yield details_pb2.RetryInfo(retry_delay=delay)


def _quota_failure(error: QuotaExceeded) -> Iterable[Message]:
    yield from _retry(error.retry_after_s)
    violation = details_pb2.QuotaFailure.Violation(
        subject=shorten(f"caller:{error.caller}", _MAX_FIELD_BYTES), description=error.limit
    )
    yield details_pb2.QuotaFailure(violations=[violation])


_TABLE: Mapping[type[WeftError], _Row] = {
    AdapterNotFound: _Row(
        grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND", lambda error: _adapter(error.adapter_id, str(error))
    ),
    InvalidRequest: _Row(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", _bad_request),
    InvalidAdapter: _Row(grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_NOT_SERVABLE", _precondition_failure),
    Unsupported: _Row(grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED_BY_BASE"),
    AdapterExists: _Row(
        grpc.StatusCode.ALREADY_EXISTS, "ADAPTER_EXISTS", lambda error: _adapter(error.name, str(error))
    ),
    QuotaExceeded: _Row(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED", _quota_failure),
    OutOfCapacity: _Row(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_CAPACITY", lambda error: _retry(error.retry_after_s)
    ),
    Unavailable: _Row(grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE", lambda error: _retry(UNAVAILABLE_RETRY_S)),
    Unauthenticated: _Row(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    PermissionDenied: _Row(grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
    DeadlineExceeded: _Row(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    ReaderStalled: _Row(grpc.StatusCode.ABORTED, "READER_STALLED"),
    GenerationFailed: _Row(grpc.StatusCode.INTERNAL, "GENERATION_FAILED"),
}

_UNEXPECTED = _Row(grpc.StatusCode.INTERNAL, "INTERNAL")


def to_status(error: WeftError) -> Status:
    """The status of an error that Weft raised on purpose."""
    row = next((row for kind, row in _TABLE.items() if isinstance(error, kind)), _UNEXPECTED)
    return _status(row, str(error), row.details(error))


def unexpected_status() -> Status:
    """The status of any other exception: what it says may be nobody's business."""
    return _status(_UNEXPECTED, "the server failed in a way it did not expect; its log says how", ())


def code_of(status: Status) -> grpc.StatusCode:
    """The code as grpc's enum."""
    return next(code for code in grpc.StatusCode if code.value[0] == status.code)


def shorten(text: str, max_bytes: int) -> str:
    """The text, or its beginning and an ellipsis, in at most `max_bytes` bytes of UTF-8."""
    encoded = text.encode()
    if len(encoded) <= max_bytes:
        return text
    return encoded[: max_bytes - 3].decode(errors="ignore") + "…"


def _status(row: _Row, message: str, details: Iterable[Message]) -> Status:
    info = details_pb2.ErrorInfo(reason=row.reason, domain=DOMAIN)
    return Status(
        code=row.code.value[0],
        message=shorten(message, MAX_MESSAGE_BYTES),
        details=[_packed(detail) for detail in (info, *details)],
    )


def _packed(message: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed


def _that_fit(problems: Sequence[Problem]) -> list[Problem]:
    """The first problems, each cut to its limit, while they fit; then one that says how many did not."""
    kept: list[Problem] = []
    left = MAX_VIOLATIONS_BYTES
    for problem in problems:
        subject = shorten(problem.subject, _MAX_FIELD_BYTES)
        description = shorten(problem.description, _MAX_DESCRIPTION_BYTES)
        left -= len(subject.encode()) + len(description.encode()) + 16
        if left < 0:
            kept.append(Problem("", f"at least {len(problems) - len(kept)} more are not listed"))
            break
        kept.append(Problem(subject, description))
    return kept
