"""What gRPC is told about connections: a burst is never dropped without a word."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import grpc

from weft.server.transport import grpc_options

NUM_CALLS = 2500
METHOD = "/test/Hold"


class Handler(grpc.GenericRpcHandler):
    """Its first RPC holds up the event loop until it is let; every RPC is answered."""

    def __init__(self) -> None:
        self.held, self.go = threading.Event(), threading.Event()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._answer)

    async def _answer(self, raw: bytes, context: Any) -> bytes:
        self.held.set()
        self.go.wait(60)
        return b"here"


async def serve(handler: Handler, started: threading.Event, ports: list[int], over: asyncio.Event) -> None:
    server = grpc.aio.server(options=grpc_options(1 << 20))
    server.add_generic_rpc_handlers((handler,))
    ports.append(server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    started.set()
    await over.wait()
    await server.stop(None)


def test_calls_that_come_while_the_event_loop_is_busy_are_all_answered() -> None:
    handler, started, over, ports = Handler(), threading.Event(), asyncio.Event(), list[int]()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(handler, started, ports, over),))
    thread.start()
    try:
        started.wait(60)
        with grpc.insecure_channel(f"127.0.0.1:{ports[0]}") as channel:
            call = channel.unary_unary(METHOD)
            calls = [call.future(b"", timeout=60)]
            handler.held.wait(60)
            calls += [call.future(b"", timeout=60) for _ in range(NUM_CALLS)]
            handler.go.set()
            assert [each.result() for each in calls] == [b"here"] * (1 + NUM_CALLS)
    finally:
        handler.go.set()
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()
