"""What every RPC of `weft.v1` passes on its way in and out: parsing, unknown fields, errors.

Servicers raise Weft's errors; here they become statuses. Until the servicers are there, every RPC is refused.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from google.rpc.status_pb2 import Status

from weft.errors import InvalidRequest, Problem, Unavailable, WeftError
from weft.server.api.errors import code_of, to_status, unexpected_status

_log = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

PACKAGE = "weft.v1"


class Edge(grpc.GenericRpcHandler):
    """Routes `weft.v1` to servicers that may come later than the server that it is added to."""

    def __init__(self) -> None:
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
            return grpc.unary_stream_rpc_method_handler(_refuse)
        found = (handler.service(handler_call_details) for handler in self._handlers)
        handler = next((handler for handler in found if handler is not None), None)
        if handler is None:
            return None
        return grpc.unary_stream_rpc_method_handler(_Call(method, handler).run, None, handler.response_serializer)


@dataclass(frozen=True, slots=True)
class _Call:
    """One method's handler, fed with bytes, ended with a status. On the wire a unary answer is a stream of one."""

    method: str
    handler: Handler

    async def run(self, raw: bytes, context: Context) -> AsyncIterator[Message]:
        try:
            request = self._parse(raw)
            if self.handler.response_streaming:
                async with aclosing(self._behaviour(request, context)) as responses:
                    async for response in responses:
                        yield response
            else:
                yield await self._behaviour(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - the edge: whatever happens is answered
            await self._abort(error, context)

    @property
    def _behaviour(self) -> Any:
        return self.handler.unary_stream if self.handler.response_streaming else self.handler.unary_unary

    def _parse(self, raw: bytes) -> Message:
        deserialize: Any = self.handler.request_deserializer
        try:
            request: Message = deserialize(raw)
        except DecodeError:
            raise InvalidRequest.of("", "is no message of this method, or holds text that is not UTF-8") from None
        unknown = list(unknown_fields(request))
        if unknown:
            raise InvalidRequest(unknown)
        return request

    async def _abort(self, error: Exception, context: Context) -> NoReturn:
        if isinstance(error, WeftError):
            status = to_status(error)
            _log.info("%s: %s: %s", self.method, code_of(status).name, status.message)
        else:
            status = unexpected_status()
            _log.error("%s failed", self.method, exc_info=error)
        await abort(context, status)


async def abort(context: Context, status: Status) -> NoReturn:
    """End the RPC with a status and its details."""
    details = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(code_of(status), status.message, details)


def unknown_fields(message: Message, path: str = "") -> Iterable[Problem]:
    """Every field that a newer client set and this server does not have: to drop one would be to answer wrongly."""
    unknown: Any = UnknownFieldSet(message)
    for field in unknown:
        yield Problem(
            f"{path}{field.field_number}", "is the number of a field that this server does not know: leave it unset"
        )
    for descriptor, value in message.ListFields():
        name = f"{path}{descriptor.name}"
        if isinstance(value, Message):
            yield from unknown_fields(value, f"{name}.")
        elif descriptor.message_type is not None and isinstance(value, Sequence):
            for index, item in enumerate(value):
                yield from unknown_fields(item, f"{name}[{index}].")


async def _refuse(raw: bytes, context: Context) -> AsyncIterator[Message]:
    await abort(context, to_status(Unavailable("the model is loading: try again")))
    yield Status()  # never reached; makes a generator of it
