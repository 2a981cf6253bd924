"""Clients of a soak that misbehave: bytes that are no HTTP/2, silence, streams that nobody reads, sudden death."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
from soaking.clients import OPTIONS, PATIENCE_S, STREAM

from weft.v1 import adapter_pb2
from weft.v1 import inference_pb2 as pb2

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
MAX_SILENT = 50
"""Connections that say nothing, at a time."""

STALLED_TOKENS = 400
TOP = 20
"""Alternatives of each token of an answer that nobody reads: it is larger than what HTTP/2 lets the server send."""

VICTIM = """
import sys, grpc
from weft.v1 import inference_pb2 as pb2
channel = grpc.insecure_channel(sys.argv[1])
call = channel.unary_stream("/weft.v1.InferenceService/StreamGenerate", None, pb2.StreamGenerateResponse.FromString)
request = pb2.StreamGenerateRequest(token_ids={"ids": [5, 6, 7]}, stopping={"max_tokens": 400, "ignore_eos": True})
calls = [call(request.SerializeToString()) for _ in range(20)]
next(calls[0])
print("ready", flush=True)
calls[-1].result()
"""
"""A client that is killed in the middle of its requests."""


@dataclass
class Vandals:
    """Everybody who misbehaves, at once, until `stop`. done: how often each did what.

    patience_s: what has no end by then is lost.
    """

    address: str
    metrics_address: str
    seed: int
    patience_s: float = PATIENCE_S
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._over = asyncio.Event()
        self._silent: list[asyncio.StreamWriter] = []

    async def run(self) -> None:
        """Until `stop`."""
        habits: tuple[tuple[float, Callable[[], Awaitable[None]]], ...] = (
            (0.05, self._say_nonsense),
            (0.2, self._say_nothing),
            *[(0.5, self._read_nothing)] * 4,
            (5.0, self._die),
            (1.0, self._watch),
            (1.0, self._scrape),
        )
        await asyncio.gather(*(self._again(every_s, habit) for every_s, habit in habits))
        while self._silent:
            self._silent.pop().close()

    def stop(self) -> None:
        self._over.set()

    def go_on(self) -> None:
        """Let it run once more."""
        self._over.clear()

    async def _again(self, every_s: float, habit: Callable[[], Awaitable[None]]) -> None:
        while not self._over.is_set():
            try:
                async with asyncio.timeout(self.patience_s):
                    await habit()
            except TimeoutError:
                self.wrong.append(f"{habit.__name__.strip('_')}: no end after {self.patience_s:g} s")
            except (OSError, grpc.aio.AioRpcError) as error:
                self.wrong.append(f"{habit.__name__.strip('_')}: {' '.join(str(error).split())}")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), every_s)

    async def _say_nonsense(self) -> None:
        """To either port; then go, with a word or by a reset."""
        noise = self._rng.randbytes(self._rng.randrange(1, 4096))
        name, spoken = self._rng.choice(
            [
                ("random bytes", noise),
                ("HTTP/1", b"GET / HTTP/1.1\r\nHost: weft\r\n\r\n"),
                ("a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + noise),
                ("HTTP/2 with noise", PREFACE + SETTINGS + noise),
                ("HTTP/2 cut off", PREFACE + SETTINGS + b"\x00\x00\xff\x01\x04\x00\x00\x00\x01" + noise[:20]),
            ]
        )
        reset = self._rng.random() < 0.5
        reader, writer = await self._connect(self._rng.choice([self.address, self.address, self.metrics_address]))
        with suppress(ConnectionError, TimeoutError):
            writer.write(spoken)
            await writer.drain()
            if self._rng.random() < 0.5:
                await asyncio.wait_for(reader.read(1 << 16), 1.0)
        if reset:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()
        self.done[f"{name}, {'reset' if reset else 'closed'}"] += 1

    async def _say_nothing(self) -> None:
        """Connect, and leave it at that until others have."""
        self._silent.append((await self._connect(self.address))[1])
        if len(self._silent) > MAX_SILENT:
            self._silent.pop(0).close()
        self.done["half-open connections"] += 1

    async def _connect(self, address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, _, port = address.rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async def _read_nothing(self) -> None:
        """Ask for more than fits in the stream's window, and then read it after all, cancel, or go."""
        request = pb2.StreamGenerateRequest(
            token_ids={"ids": [5, 6, 7]},
            stopping={"max_tokens": STALLED_TOKENS, "ignore_eos": True},
            output={"top_logprobs": TOP},
        )
        async with grpc.aio.insecure_channel(self.address, [*OPTIONS, ("grpc.http2.bdp_probe", 0)]) as channel:
            method: Any = channel.unary_stream(STREAM, None, pb2.StreamGenerateResponse.FromString)
            call = method(request.SerializeToString())
            read = len((await call.read()).tokens)
            await asyncio.sleep(self._rng.random() * 4)
            match self._rng.choice(["reads on", "cancels", "goes"]):
                case "reads on":
                    await self._read_on(call, read)
                case "cancels":
                    call.cancel()
        self.done["readers that stall"] += 1

    async def _read_on(self, call: Any, read: int) -> None:
        """All that was made, or that it took too long."""
        num_tokens = read
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                num_tokens += len(message.tokens)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.ABORTED:
                self.wrong.append(f"a reader that stalled got {error.code().name}: {error.details()}")
            return
        if num_tokens != STALLED_TOKENS:
            self.wrong.append(f"a reader that stalled got {num_tokens} of {STALLED_TOKENS} tokens")

    async def _die(self) -> None:
        """A process with twenty streams, killed."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", VICTIM, self.address, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdout is not None
        await process.stdout.readline()
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        self.done["clients killed with 20 streams"] += 1

    async def _watch(self) -> None:
        """Everything that happens to adapters, for a moment."""
        async with grpc.aio.insecure_channel(self.address, OPTIONS) as channel:
            method: Any = channel.unary_stream("/weft.v1.AdapterService/WatchAdapters", None, None)
            call = method(adapter_pb2.WatchAdaptersRequest().SerializeToString())
            await call.read()
            await asyncio.sleep(self._rng.random() * 3)
            call.cancel()
        self.done["watches"] += 1

    async def _scrape(self) -> None:
        def scrape() -> None:
            with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=60) as response:
                response.read()

        await asyncio.to_thread(scrape)
        self.done["scrapes"] += 1
