"""What an RPC answers, on its way out: a client that takes nothing holds up nobody but itself, and not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import NoReturn

import grpc
from google.protobuf.message import Message
from google.rpc.status_pb2 import Status

from weft.errors import ReaderStalled
from weft.server.api.errors import code_of, to_status
from weft.server.api.observing import Behaviour, Context, note_refusal


@dataclass(frozen=True, slots=True)
class Sent:
    """A method's behaviour, its messages sent as HTTP/2 has room for them.

    stall_s: how long a client may take nothing while there is something for it; None: as long as it likes. Then the
    RPC ends: what it holds is free at once, and the client gets the status when it reads again, after what was sent.
    """

    behaviour: Behaviour
    stall_s: float | None

    async def run(self, raw: bytes, context: Context) -> None:
        try:
            await self._run(raw, context)
        except grpc.aio.InternalError:  # the client went while something was sent, and gRPC is about to say so
            raise asyncio.CancelledError from None

    async def _run(self, raw: bytes, context: Context) -> None:
        try:
            async with aclosing(self.behaviour(raw, context)) as messages:
                await self._send(messages, context)
        except ReaderStalled as stalled:
            await abort(context, to_status(stalled))

    async def _send(self, messages: AsyncGenerator[Message, None], context: Context) -> None:
        has_begun = False
        async for message in messages:
            if not has_begun:  # a first message that is given up in mid-write must not take the headers along
                await context.send_initial_metadata(())
                has_begun = True
            try:
                async with asyncio.timeout(self.stall_s):
                    await context.write(message)
            except TimeoutError:
                stalled = ReaderStalled(f"nothing of the answer was taken for {self.stall_s:g} s")
                note_refusal(stalled, code_of(to_status(stalled)).name)
                await messages.athrow(stalled)


async def abort(context: Context, status: Status) -> NoReturn:
    """End the RPC with a status and its details."""
    details = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(code_of(status), status.message, details)
