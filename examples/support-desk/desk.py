"""Reads tickets, `date; text` a line: three adapters at once say each one's date, topic and mood."""

from __future__ import annotations

import asyncio
import os
import sys

import grpc

from weft.v1 import inference_pb2 as pb
from weft.v1 import inference_pb2_grpc


def likeliest(response: pb.ClassifyResponse) -> str:
    """The label of the highest score."""
    return max(response.scores, key=lambda scored: scored.score).label


async def read(stub: inference_pb2_grpc.InferenceServiceAsyncStub, ticket: str) -> str:
    """A ticket as the desk sorts it."""
    written, text = ticket.split("; ", 1)
    date, topic, mood = await asyncio.gather(
        stub.Generate(pb.GenerateRequest(adapter_id="iso-date", text=f"{written}=")),
        stub.Classify(pb.ClassifyRequest(adapter_id="topic", text=text)),
        stub.Classify(pb.ClassifyRequest(adapter_id="mood", text=text)),
    )
    return f"{date.text}  {likeliest(topic):8}  {likeliest(mood):8}  {text}"


async def main() -> None:
    """Ask about all tickets at once, and print them in order."""
    async with grpc.aio.insecure_channel(os.environ.get("WEFT_ADDRESS", "127.0.0.1:50051")) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for line in await asyncio.gather(*(read(stub, ticket.strip()) for ticket in sys.stdin)):
            print(line)


if __name__ == "__main__":
    asyncio.run(main())
