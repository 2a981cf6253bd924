"""An open loop: each request leaves at its scheduled time, whether or not the server keeps up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol, cast

import grpc
import numpy

from weft.server.bench.summary import OK, Record
from weft.server.bench.workload import Scheduled, prompt_ids
from weft.v1 import inference_pb2 as pb2

NUM_CHANNELS = 8
"""Connections that the streams are shared out over, so that no one of them is what all wait for."""

_METHOD = "/weft.v1.InferenceService/StreamGenerate"
_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]

Progress = Callable[[Record], None]


@dataclass(frozen=True, slots=True)
class Ready:
    """A request that only has to be sent: its message is serialized already."""

    scheduled: Scheduled
    adapter: str
    message: bytes


@dataclass(frozen=True, slots=True)
class Run:
    """What came of a schedule. busy_s: processor seconds of this process meanwhile; wall_s: how long it took."""

    records: list[Record]
    busy_s: float
    wall_s: float


def prepare(schedule: Sequence[Scheduled], adapters: Sequence[str], pool: Sequence[int], seed: int) -> list[Ready]:
    """Greedy, EOS ignored; prompts are raw tokens, drawn from the pool. Index i asks for `adapters[i]`."""
    draw = numpy.random.RandomState(seed)
    return [_ready(each, "" if each.adapter is None else adapters[each.adapter], pool, draw) for each in schedule]


def _ready(scheduled: Scheduled, adapter: str, pool: Sequence[int], draw: numpy.random.RandomState) -> Ready:
    request = pb2.StreamGenerateRequest(
        adapter_id=adapter,
        token_ids=pb2.TokenIds(ids=prompt_ids(pool, scheduled.prompt_tokens, draw)),
        stopping=pb2.Stopping(max_tokens=scheduled.new_tokens, ignore_eos=True),
    )
    return Ready(scheduled, adapter, request.SerializeToString())


class Server(Protocol):
    """Where the load goes. metadata: of each call."""

    @property
    def metadata(self) -> Sequence[tuple[str, str]]: ...

    def aio_channel(self, options: Sequence[tuple[str, Any]]) -> grpc.aio.Channel: ...


async def run(server: Server, requests: Sequence[Ready], timeout_s: float | None, done: Progress) -> Run:
    """Send all at their times; `done` is told of each as it ends. timeout_s: each request's deadline, from its sending.

    Raises grpc.RpcError where the server can't be reached at the start.
    """
    channels = [server.aio_channel(_OPTIONS) for _ in range(NUM_CHANNELS)]
    try:
        await asyncio.gather(*(_connected(channel) for channel in channels))
        calls: list[Any] = [
            partial(
                cast("Any", channel.unary_stream(_METHOD, None, pb2.StreamGenerateResponse.FromString)),
                metadata=server.metadata,
            )
            for channel in channels
        ]
        start_s, busy_s = time.perf_counter(), time.process_time()
        tasks = []
        for index, ready in enumerate(requests):
            wait_s = start_s + ready.scheduled.at_s - time.perf_counter()
            if wait_s > 0 or index % NUM_CHANNELS == 0:  # a burst, too, leaves room for what comes back
                await asyncio.sleep(max(0.0, wait_s))
            tasks.append(asyncio.create_task(_ask(calls[index % NUM_CHANNELS], ready, start_s, timeout_s, done)))
        records = await asyncio.gather(*tasks)
        return Run(records, time.process_time() - busy_s, time.perf_counter() - start_s)
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))


async def _connected(channel: grpc.aio.Channel, timeout_s: float = 10.0) -> None:
    """Connections are made before the clock runs; where none can be, the requests say so."""
    try:
        await asyncio.wait_for(channel.channel_ready(), timeout_s)
    except TimeoutError:
        return


async def _ask(call: Any, ready: Ready, start_s: float, timeout_s: float | None, done: Progress) -> Record:
    """One stream, from its sending to its end."""
    came_s: list[float] = []
    new_tokens = prompt_tokens = 0
    outcome, message = OK, ""
    sent_s = time.perf_counter() - start_s
    try:
        async for answer in call(ready.message, timeout=timeout_s):
            if answer.tokens:
                came_s.append(time.perf_counter() - start_s)
                new_tokens += len(answer.tokens)
            prompt_tokens = answer.usage.prompt_tokens or prompt_tokens
    except grpc.aio.AioRpcError as error:
        outcome, message = error.code().name, error.details() or ""
    record = Record(
        adapter=ready.adapter,
        scheduled_s=ready.scheduled.at_s,
        sent_s=sent_s,
        first_token_s=came_s[0] if came_s else None,
        last_token_s=came_s[-1] if came_s else None,
        ended_s=time.perf_counter() - start_s,
        prompt_tokens=prompt_tokens or ready.scheduled.prompt_tokens,
        new_tokens=new_tokens,
        outcome=outcome,
        message=message,
        gaps_s=tuple(now - before for before, now in pairwise(came_s)),
    )
    done(record)
    return record
