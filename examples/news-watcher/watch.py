"""Labels each line of standard input as it comes, with several on their way at a time; prints them in order."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from concurrent.futures import CancelledError
from contextlib import suppress
from threading import Thread

import grpc

from weft.v1 import inference_pb2 as pb
from weft.v1 import inference_pb2_grpc


async def label(stub: inference_pb2_grpc.InferenceServiceAsyncStub, adapter: str, text: str) -> str:
    """The likeliest label of a text, its probability, and the text."""
    response = await stub.Classify(pb.ClassifyRequest(adapter_id=adapter, text=text))
    best = max(response.scores, key=lambda scored: scored.score)
    return f"{best.label:4}  {best.score:.3f}  {text}"


async def watch(address: str, adapter: str, in_flight: int) -> None:
    """Print the answers as they come, the oldest first, while a thread reads and asks."""
    loop = asyncio.get_running_loop()
    asked: asyncio.Queue[asyncio.Task[str] | None] = asyncio.Queue(in_flight)

    async def ask(text: str) -> None:
        await asked.put(asyncio.create_task(label(stub, adapter, text)))

    def read() -> None:
        with suppress(CancelledError):
            for line in sys.stdin:
                if text := line.strip():
                    asyncio.run_coroutine_threadsafe(ask(text), loop).result()  # waits while the queue is full
            asyncio.run_coroutine_threadsafe(asked.put(None), loop).result()

    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        Thread(target=read, daemon=True).start()
        while answer := await asked.get():
            print(await answer, flush=True)


def main() -> None:
    """Ends with the input, or with one line if the server refuses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default=os.environ.get("WEFT_ADDRESS", "127.0.0.1:50051"))
    parser.add_argument("--adapter", default="news")
    parser.add_argument("--in-flight", type=int, default=16, help="requests at a time")
    options = parser.parse_args()
    try:
        asyncio.run(watch(options.address, options.adapter, options.in_flight))
    except grpc.aio.AioRpcError as error:
        sys.exit(f"{options.address}: {error.details()}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
