"""A Weft server as a process of its own, and what its clients see of it over gRPC."""

from __future__ import annotations

import asyncio
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc

from weft.v1 import inference_pb2, inference_pb2_grpc


@contextmanager
def weft_server(base: Path, *options: object, threads: int | None = None) -> Iterator[str]:
    """As `weft_process`; yields the address alone."""
    with weft_process(base, *options, threads=threads) as (address, _):
        yield address


def processor_s(process_id: int) -> float:
    """Of all its threads, in its own code and in the system's, so far."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def weft_process(base: Path, *options: object, threads: int | None = None) -> Iterator[tuple[str, int]]:
    """A `weft serve` process on free ports; yields its address and its id, and ends it.

    threads: of PyTorch; None: its choice.
    """
    command = [sys.executable, "-m", "weft.server.cli", "serve", "--model", base, "--port", "0", "--metrics-port", "0"]
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    process = subprocess.Popen(
        [*map(str, command), *map(str, options)], stderr=subprocess.PIPE, text=True, env=environment
    )
    log: list[str] = []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            log.append(line)
            if found := re.search(r"gRPC on (\S+),", line):
                threading.Thread(target=process.stderr.read, daemon=True).start()
                yield found[1], process.pid
                return
        raise RuntimeError(f"weft serve did not start: {''.join(log)}")
    finally:
        process.terminate()
        process.wait()


@dataclass(frozen=True, slots=True)
class Seen:
    """One answer as its client saw it: when it was asked for, and when each message of tokens came."""

    adapter: str
    asked_s: float
    came_s: tuple[float, ...]

    @property
    def ttft_s(self) -> float:
        return self.came_s[0] - self.asked_s

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """(when, for how long) the client waited for each message after the first."""
        return [(came, came - before) for before, came in zip(self.came_s, self.came_s[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Load:
    """What every request of a load looks like: random tokens, greedy, EOS ignored."""

    vocab_size: int
    prompt_tokens: int
    new_tokens: int

    def fields(self, adapter: str, seed: int) -> dict[str, object]:
        rng = random.Random(seed)
        ids = [rng.randrange(1, self.vocab_size) for _ in range(self.prompt_tokens)]
        return {
            "adapter_id": adapter,
            "token_ids": inference_pb2.TokenIds(ids=ids),
            "stopping": inference_pb2.Stopping(max_tokens=self.new_tokens, ignore_eos=True),
        }


class Client:
    """Asks one server. Use inside `asyncio.run`, as an async context manager."""

    def __init__(self, address: str, load: Load) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._load = load

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def ask(self, adapter: str, seed: int = 0) -> None:
        """One unary request; its answer has all its tokens, or this raises."""
        answer = await self._stub.Generate(inference_pb2.GenerateRequest(**self._load.fields(adapter, seed)))
        assert len(answer.tokens) == self._load.new_tokens, "tokens are missing"

    async def watch(self, adapter: str, seed: int, came_s: list[float]) -> None:
        """Note when each message of tokens comes, until cancelled or answered."""
        request = inference_pb2.StreamGenerateRequest(**self._load.fields(adapter, seed))
        async for message in self._stub.StreamGenerate(request):
            came_s += [time.perf_counter()] * bool(message.tokens)

    async def stream(self, adapter: str, seed: int = 0) -> Seen:
        request = inference_pb2.StreamGenerateRequest(**self._load.fields(adapter, seed))
        asked_s, came_s, count = time.perf_counter(), [], 0
        async for message in self._stub.StreamGenerate(request):
            if message.tokens:
                came_s.append(time.perf_counter())
                count += len(message.tokens)
        assert count == self._load.new_tokens, "tokens are missing"
        return Seen(adapter, asked_s, tuple(came_s))


async def closed_loop(work: Callable[[str, int], Awaitable[object]], adapters: Sequence[str], clients: int) -> float:
    """Each client asks its next as soon as its last is answered, until all adapters had their turn; seconds taken."""
    turns = iter(enumerate(adapters))

    async def client() -> None:
        for seed, adapter in turns:
            await work(adapter, seed)

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - started


async def open_loop(work: Callable[[str, int], Awaitable[object]], adapters: Sequence[str], rate: float) -> None:
    """One request for each adapter at random moments, `rate` a second on average, whatever is answered when."""
    rng, tasks = random.Random(0), []
    due = time.perf_counter()
    for seed, adapter in enumerate(adapters):
        due += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(work(adapter, seed)))
    await asyncio.gather(*tasks)
