"""A server of this process, on an event loop and a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from weft.server.app import Server, running_server
from weft.server.config import ServerConfig


@contextmanager
def served(config: ServerConfig) -> Iterator[Server]:
    """Serves until the end of the block."""
    loop = asyncio.new_event_loop()
    started: Future[Server] = Future()
    over = asyncio.Event()

    async def serve() -> None:
        try:
            async with running_server(config) as server:
                started.set_result(server)
                await over.wait()
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        yield started.result()
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()
