"""What every RPC of `weft.v1` passes on its way in and out: who calls, parsing, unknown fields, errors.

Servicers raise Weft's errors; here they become statuses. Until the servicers are there, every RPC is refused.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from google.rpc.status_pb2 import Status
from opentelemetry.trace import Tracer

from weft.errors import AdapterNotFound, InvalidRequest, Problem, Unavailable, WeftError
from weft.server.api.access.audit import AuditLine
from weft.server.api.access.gate import Gate, check_role
from weft.server.api.access.rights import concealed
from weft.server.api.callers import current_caller
from weft.server.api.errors import code_of, to_status, unexpected_status
from weft.server.api.observing import Behaviour, Observed, note_refusal, note_request
from weft.server.api.sending import Sent, abort

_log = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

PACKAGE = "weft.v1"

MAX_UNKNOWN_BYTES = 4096
"""Of unknown fields that are named one by one."""

MAX_ITEMS = 1024
"""Of a repeated field that are searched for unknown fields one by one; what no servicer takes more of."""


class EndedByEngine(Exception):
    """Brings the error of a request that the engine had taken, and so has counted."""

    def __init__(self, error: WeftError) -> None:
        self.error = error
        super().__init__(str(error))


class Edge(grpc.GenericRpcHandler):
    """Routes `weft.v1` to servicers that may come later than the server that it is added to."""

    def __init__(
        self,
        count_refusal: Callable[[str], None],
        gate: Gate,
        tracer: Tracer | None = None,
        stall_s: float | None = None,
    ) -> None:
        """count_refusal: called with the code, in lower case, of each RPC that is refused. stall_s: see `Sent`."""
        self._count_refusal = count_refusal
        self._gate = gate
        self._tracer = tracer
        self._stall_s = stall_s
        self._handlers: tuple[grpc.GenericRpcHandler, ...] = ()

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """As a server's, for the generated `add_…Servicer_to_server`."""
        self._handlers += tuple(generic_rpc_handlers)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        """The handler of a method, wrapped; None for methods that `weft.v1` does not have."""
        method = handler_call_details.method
        if not method.startswith(f"/{PACKAGE}."):
            return None
        if not self._handlers:
            return grpc.unary_stream_rpc_method_handler(self._observed(method, partial(self._refuse, method)))
        found = (handler.service(handler_call_details) for handler in self._handlers)
        handler = next((handler for handler in found if handler is not None), None)
        if handler is None:
            return None
        call = _Call(method, handler, self._count_refusal, self._gate)
        sent = Sent(self._observed(method, call.run), self._stall_s)
        return grpc.unary_stream_rpc_method_handler(sent.run, None, handler.response_serializer)

    def _observed(self, method: str, behaviour: Behaviour) -> Behaviour:
        return Observed(method.removeprefix("/"), behaviour, self._tracer).run

    async def _refuse(self, method: str, raw: bytes, context: Context) -> AsyncGenerator[Message, None]:
        error = Unavailable("the model is loading: try again")
        status = to_status(error)
        code = code_of(status).name
        note_refusal(error, code)
        self._count_refusal(code.lower())
        if (audit := AuditLine.of(method, context)) is not None:
            audit.outcome = code.lower()
            audit.write()
        await abort(context, status)
        yield Status()  # never reached; makes a generator of it


@dataclass(frozen=True, slots=True)
class _Call:
    """One method's handler, fed with bytes, ended with a status. On the wire a unary answer is a stream of one."""

    method: str
    handler: Handler
    count_refusal: Callable[[str], None]
    gate: Gate

    async def run(self, raw: bytes, context: Context) -> AsyncGenerator[Message, None]:
        audit = AuditLine.of(self.method, context)
        try:
            async with aclosing(self._answers(raw, context, audit)) as responses:
                async for response in responses:
                    yield response
        except grpc.aio.AbortError:
            raise
        except EndedByEngine as ended:
            await abort(context, self._status(ended.error))
        except Exception as error:  # noqa: BLE001 - the edge: whatever happens is answered
            status = self._status(error)
            code = code_of(status).name.lower()
            self.count_refusal(code)
            if audit is not None:
                audit.outcome = code
            await abort(context, status)
        finally:
            if audit is not None:
                audit.write()

    async def _answers(self, raw: bytes, context: Context, audit: AuditLine | None) -> AsyncGenerator[Message, None]:
        caller = await self.gate.authenticate(context)
        current_caller.set(caller)
        if audit is not None:
            audit.asked(raw, self.handler.request_deserializer)
        check_role(caller, self.method)
        request = self._parse(raw)
        note_request(request)
        with caller.quota.running() if caller.quota is not None else nullcontext():
            if self.handler.response_streaming:
                async with aclosing(self._behaviour(request, context)) as responses:
                    async for response in responses:
                        yield response
                return
            response = await self._behaviour(request, context)
            if audit is not None:
                audit.answered(response)
            yield response

    @property
    def _behaviour(self) -> Any:
        return self.handler.unary_stream if self.handler.response_streaming else self.handler.unary_unary

    def _parse(self, raw: bytes) -> Message:
        deserialize: Any = self.handler.request_deserializer
        try:
            request: Message = deserialize(raw)
        except DecodeError:
            raise InvalidRequest.of(
                "request", "is no message of this method, or holds text that is not UTF-8"
            ) from None
        check_unknown_fields(request, deserialize(raw))
        return request

    def _status(self, error: Exception) -> Status:
        if isinstance(error, AdapterNotFound):
            error = concealed(error, current_caller.get())
        if isinstance(error, WeftError):
            status = to_status(error)
        else:
            status = unexpected_status()
            _log.error("%s failed", self.method, exc_info=error)
        note_refusal(error, code_of(status).name)
        return status


def check_unknown_fields(message: Message, same: Message) -> None:
    """Refuse fields that a newer client set and this server does not have: to drop one would be to answer wrongly.

    same: another parse of the message, which loses its unknown fields. Raises InvalidRequest.
    """
    same.DiscardUnknownFields()
    num_bytes = message.ByteSize() - same.ByteSize()
    if not num_bytes:
        return
    named = list(_unknown_fields(message)) if num_bytes <= MAX_UNKNOWN_BYTES else []
    raise InvalidRequest(
        named
        or [Problem("request", f"holds {num_bytes} bytes of fields that this server does not know: leave them unset")]
    )


def _unknown_fields(message: Message, path: str = "") -> Iterable[Problem]:
    """Each unknown field but those far down a long list."""
    unknown: Any = UnknownFieldSet(message)
    for field in unknown:
        yield Problem(
            f"{path}{field.field_number}", "is the number of a field that this server does not know: leave it unset"
        )
    for descriptor, value in message.ListFields():
        name = f"{path}{descriptor.name}"
        if isinstance(value, Message):
            yield from _unknown_fields(value, f"{name}.")
        elif descriptor.message_type is not None and isinstance(value, Sequence):
            for index, item in enumerate(islice(value, MAX_ITEMS)):
                yield from _unknown_fields(item, f"{name}[{index}].")
