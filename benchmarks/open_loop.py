"""Requests at random moments, whatever is answered when, and how each of them ended."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import grpc
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from weft.v1 import inference_pb2 as pb2

NUM_CONNECTIONS = 16
_STREAM = "/weft.v1.InferenceService/StreamGenerate"
_OPTIONS = [("grpc.use_local_subchannel_pool", 1)]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of every request: prompts of random bytes, greedy, EOS ignored. adapters: asked in turn, "" is the base."""

    adapters: tuple[str, ...]
    prompt_tokens: int
    new_tokens: int

    def request(self, number: int) -> bytes:
        rng = random.Random(number)
        return pb2.StreamGenerateRequest(
            adapter_id=self.adapters[number % len(self.adapters)],
            token_ids={"ids": [rng.randrange(16, 256) for _ in range(self.prompt_tokens)]},
            stopping={"max_tokens": self.new_tokens, "ignore_eos": True},
        ).SerializeToString()


@dataclass(frozen=True, slots=True)
class End:
    """How a request ended, in seconds from its sending. code: OK or a status; retry_s: of its RetryInfo."""

    code: str
    words: str
    first_token_s: float | None
    ended_s: float
    tokens: int
    retry_s: float | None = None


class Source:
    """Asks one server over several connections; an async context manager."""

    def __init__(self, address: str, shape: Shape, connections: int = NUM_CONNECTIONS) -> None:
        self._channels = [grpc.aio.insecure_channel(address, _OPTIONS) for _ in range(connections)]
        self._calls: list[Any] = [
            channel.unary_stream(_STREAM, None, pb2.StreamGenerateResponse.FromString) for channel in self._channels
        ]
        self._shape = shape

    async def __aenter__(self) -> Self:
        await asyncio.gather(*(channel.channel_ready() for channel in self._channels))
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def ask(self, number: int) -> End:
        message = self._shape.request(number)
        started_s, first_s, tokens = time.perf_counter(), None, 0
        code, words, retry_s = "OK", "", None
        try:
            async for answer in self._calls[number % len(self._calls)](message):
                if answer.tokens and first_s is None:
                    first_s = time.perf_counter() - started_s
                tokens += len(answer.tokens)
        except grpc.aio.AioRpcError as error:
            code, words, retry_s = error.code().name, error.details() or "", retry_delay_s(error)
        if code == "OK" and tokens != self._shape.new_tokens:
            code, words = "LOST", f"{tokens} of {self._shape.new_tokens} tokens"
        return End(code, words, first_s, time.perf_counter() - started_s, tokens, retry_s)

    async def closed(self, clients: int, seconds: float) -> list[End]:
        """So many at a time, for so long; what is under way then is answered, too."""
        end_s = time.perf_counter() + seconds
        ends: list[End] = []

        async def client(first: int) -> None:
            number = first
            while time.perf_counter() < end_s:
                ends.append(await self.ask(number))
                number += clients

        await asyncio.gather(*(client(number) for number in range(clients)))
        return ends

    async def opened(self, rate: float, seconds: float, seed: int) -> list[End]:
        """`rate` a second on average, for so long; in the order of their sending."""
        tasks, due_s, end_s = [], time.perf_counter(), time.perf_counter() + seconds
        rng = random.Random(seed)
        while (due_s := due_s + rng.expovariate(rate)) < end_s:
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            tasks.append(asyncio.create_task(self.ask(1_000_000 * (seed + 1) + len(tasks))))
        return list(await asyncio.gather(*tasks))


def retry_delay_s(error: grpc.aio.AioRpcError) -> float | None:
    """Of a refusal's RetryInfo, if it has one."""
    status, retry = Status(), error_details_pb2.RetryInfo()
    status.ParseFromString(dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b""))
    for detail in status.details:
        if detail.Unpack(retry):
            return retry.retry_delay.ToNanoseconds() / 1e9
    return None


def tokens_a_second(ends: Sequence[End], seconds: float) -> float:
    return sum(end.tokens for end in ends) / seconds
