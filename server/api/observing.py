"""One RPC from outside: its span, its line in the access log, and what every line in between is named after."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import Message
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from weft.errors import MAX_PROBLEMS, InvalidRequest, WeftError
from weft.server.api.callers import current_caller
from weft.server.calls import Call, as_word, current_call, this_call

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Behaviour = Callable[[bytes, Context], AsyncGenerator[Message, None]]

MAX_REQUEST_ID_CHARACTERS = 128

_access = logging.getLogger("weft.access")

_W3C = TraceContextTextMapPropagator()
_SERVER_ERRORS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""Codes that are the server's failure, by OpenTelemetry's conventions for RPC."""


@dataclass(frozen=True, slots=True)
class Observed:
    """A method's behaviour, watched. method: `Service/Method`. tracer: None, nothing is traced."""

    method: str
    behaviour: Behaviour
    tracer: Tracer | None

    async def run(self, raw: bytes, context: Context) -> AsyncGenerator[Message, None]:
        started_s = time.perf_counter()
        call = Call(self.method, self._span(context))
        # Never reset: the variable lives as long as the RPC's task, and a stream that its client left may be closed by
        # another.
        current_call.set(call)
        try:
            async with aclosing(self.behaviour(raw, context)) as responses:
                async for response in responses:
                    yield response
        except (asyncio.CancelledError, GeneratorExit):
            call.code = "DEADLINE_EXCEEDED" if _is_late(context) else "CANCELLED"
            raise
        finally:
            current_call.set(call)
            call.caller = call.caller or current_caller.get().name
            _log_access(call, time.perf_counter() - started_s)
            if call.span is not None:
                _end(call.span, call)

    def _span(self, context: Context) -> Span | None:
        if self.tracer is None:
            return None
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        attributes = {"rpc.system.name": "grpc", "rpc.method": self.method}
        return self.tracer.start_span(self.method, _W3C.extract(metadata), SpanKind.SERVER, attributes)


def note_request(request: Message) -> None:
    """Know a request by the id that its caller gave it, before anything else about it is checked."""
    given = getattr(request, "request_id", "")
    if len(given) <= MAX_REQUEST_ID_CHARACTERS and given.isprintable():
        this_call().request_id = given


def note_refusal(error: Exception, code: str) -> None:
    """Know why. What is wrong with a request is told by the names of its fields: the rest may quote it."""
    call = this_call()
    call.code = code
    match error:
        case InvalidRequest():
            call.problem = ", ".join(dict.fromkeys(problem.subject for problem in error.problems[:MAX_PROBLEMS]))
        case WeftError():
            call.problem = " ".join(str(error).split())


def _is_late(context: Context) -> bool:
    remaining_s: float | None = context.time_remaining()
    return remaining_s is not None and remaining_s <= 0


def _log_access(call: Call, duration_s: float) -> None:
    outcome = call.outcome or call.code.lower()
    facts = {**call.facts, "duration_s": round(duration_s, 6)}
    words = [f"{name}={value}" for name, value in facts.items()]
    words += [f"problem={as_word(call.problem)}"] if call.problem else []
    extra = {"method": call.method, "code": call.code, "outcome": outcome, **facts}
    if call.problem:
        extra["problem"] = call.problem
    _access.info("%s %s %s", call.method, outcome, " ".join(words), extra=extra)


def _end(span: Span, call: Call) -> None:
    span.set_attribute("rpc.response.status_code", call.code)
    for name, value in (("weft.request.id", call.request_id), ("weft.caller", call.caller)):
        if value:
            span.set_attribute(name, value)
    if call.code != grpc.StatusCode.OK.name:
        span.set_attribute("error.type", call.code)
    if call.code in _SERVER_ERRORS:
        span.set_status(Status(StatusCode.ERROR, call.problem))
    span.end()
