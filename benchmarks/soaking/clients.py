"""Clients of a soak that speak gRPC: they ask, cancel, and ask for what can't be, and check what comes back."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
from soaking.truth import BASE, MAX_TOKENS, Truth

from weft.v1 import inference_pb2 as pb2

STREAM = "/weft.v1.InferenceService/StreamGenerate"
OPTIONS = [("grpc.use_local_subchannel_pool", 1)]

RIGHT, CANCELLED, REFUSED, WRONG, LOST = "right", "cancelled", "refused as it should be", "wrong", "lost"
GOOD = (RIGHT, CANCELLED, REFUSED)

PATIENCE_S = 300.0
"""A request that has not ended after so long is lost."""

CHOICES = ["yes", "no", "maybe", "never", "always"]
LONG_TOKENS = 200
"""Of what is asked for by those who will not wait for it."""

CODE = grpc.StatusCode
INVALID: tuple[tuple[str, str, Callable[[random.Random], bytes], grpc.StatusCode], ...] = (
    ("no message", STREAM, lambda rng: b"\xff" + rng.randbytes(rng.randrange(200)), CODE.INVALID_ARGUMENT),
    ("an unknown field", STREAM, lambda rng: b"\x0a\x00\xf8\x7f\x01", CODE.INVALID_ARGUMENT),
    ("no prompt", STREAM, lambda rng: b"", CODE.INVALID_ARGUMENT),
    ("a negative temperature", STREAM, lambda rng: _ask(sampling={"temperature": -1}), CODE.INVALID_ARGUMENT),
    ("a prompt too long", STREAM, lambda rng: _ask(token_ids={"ids": [5] * 5000}), CODE.INVALID_ARGUMENT),
    ("a token that there is not", STREAM, lambda rng: _ask(token_ids={"ids": [1 << 31]}), CODE.INVALID_ARGUMENT),
    ("an unknown adapter", STREAM, lambda rng: _ask(adapter_id=f"none-{rng.random()}"), CODE.NOT_FOUND),
    ("an unknown method", "/weft.v1.InferenceService/Nothing", lambda rng: b"", CODE.UNIMPLEMENTED),
)
"""Name, method, message and the code that it must be refused with."""


def _ask(**fields: Any) -> bytes:
    return pb2.StreamGenerateRequest(**{"token_ids": {"ids": [5, 6, 7]}, **fields}).SerializeToString()


@dataclass
class Tally:
    """How requests ended, and the first that did not end well."""

    ends: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    examples: list[str] = field(default_factory=list)

    def note(self, end: str, words: str = "") -> None:
        self.ends[end] += 1
        if end not in GOOD and len(self.examples) < 20:
            self.examples.append(f"{end}: {words}")

    @property
    def total(self) -> int:
        return self.ends.total()


@dataclass(frozen=True, slots=True)
class Crowd:
    """What the clients of one run share. digests: the adapter by its content; passing: names that come and go."""

    address: str
    truth: Truth
    digests: Mapping[str, str]
    passing: tuple[str, ...]
    tally: Tally
    cancelled_share: float = 0.2
    invalid_share: float = 0.05
    requests_each: int = 10

    async def run(self, numbers: Iterator[int], num_clients: int, seed: int) -> None:
        """So many clients at a time, each on a connection of its own, until there are no numbers left."""
        await asyncio.gather(*(self._places(numbers, seed) for _ in range(num_clients)))

    async def _places(self, numbers: Iterator[int], seed: int) -> None:
        """One client after the other."""
        while True:
            async with grpc.aio.insecure_channel(self.address, OPTIONS) as channel:
                for _ in range(self.requests_each):
                    number = next(numbers, None)
                    if number is None:
                        return
                    await self._request(channel, random.Random(f"{seed} {number}"))

    async def _request(self, channel: grpc.aio.Channel, rng: random.Random) -> None:
        kind = rng.random()
        try:
            async with asyncio.timeout(PATIENCE_S):
                if kind < self.invalid_share:
                    await self._invalid(channel, rng)
                elif kind < self.invalid_share + self.cancelled_share:
                    await self._cancelled(channel, rng)
                elif kind > 0.97:
                    await self._choice(channel, rng)
                else:
                    await self._whole(channel, rng)
        except TimeoutError:
            self.tally.note(LOST, f"no end after {PATIENCE_S:g} s")

    async def _whole(self, channel: grpc.aio.Channel, rng: random.Random) -> None:
        """Read to its end, streamed or not, and compared."""
        adapter, prompt = self._draw(rng)
        fields: dict[str, Any] = {"adapter_id": adapter, "token_ids": {"ids": prompt}}
        fields["stopping"] = {"max_tokens": MAX_TOKENS}
        fields["output"] = {"top_logprobs": rng.choice([0, 0, 0, 3])}
        try:
            messages = [message async for message in _call(channel, pb2.StreamGenerateRequest(**fields))]
        except grpc.aio.AioRpcError as error:
            self._failed(error, adapter)
            return
        tokens = [token.id for message in messages for token in message.tokens]
        if not messages[-1].finish_reason or messages[-1].usage.completion_tokens != len(tokens):
            self.tally.note(LOST, f"the end of an answer of {adapter or 'the base'}")
            return
        self._compare(messages[0], adapter, prompt, tokens, is_whole=True)

    async def _choice(self, channel: grpc.aio.Channel, rng: random.Random) -> None:
        """A constrained answer, drawn at random."""
        adapter, prompt = self._draw(rng)
        request = pb2.StreamGenerateRequest(
            adapter_id=adapter,
            token_ids={"ids": prompt},
            sampling={"temperature": 1, "seed": rng.getrandbits(32)},
            choice={"options": rng.sample(CHOICES, 3)},
        )
        try:
            text = "".join([message.text async for message in _call(channel, request)])
        except grpc.aio.AioRpcError as error:
            self._failed(error, adapter)
            return
        is_right = text in request.choice.options
        self.tally.note(RIGHT if is_right else WRONG, f"{text!r} is none of {list(request.choice.options)}")

    async def _cancelled(self, channel: grpc.aio.Channel, rng: random.Random) -> None:
        """Given up at once, after some messages, or by its deadline; what came until then is how the answer begins."""
        adapter, prompt = self._draw(rng)
        request = pb2.StreamGenerateRequest(
            adapter_id=adapter, token_ids={"ids": prompt}, stopping={"max_tokens": LONG_TOKENS, "ignore_eos": True}
        )
        wanted, timeout_s = rng.choice([(0, None), (1, None), (rng.randrange(2, 20), None), (None, rng.random() * 0.2)])
        call = _call(channel, request, timeout=timeout_s)
        messages: list[Any] = []
        try:
            while len(messages) != wanted:
                message = await call.read()
                if message is grpc.aio.EOF:
                    break
                messages.append(message)
            call.cancel()
        except grpc.aio.AioRpcError as error:
            too_late = timeout_s is not None and error.code() is CODE.RESOURCE_EXHAUSTED  # and told so in advance
            if not too_late and error.code() not in (CODE.DEADLINE_EXCEEDED, CODE.CANCELLED):
                self._failed(error, adapter)
                return
        if messages:
            tokens = [token.id for message in messages for token in message.tokens]
            self._compare(messages[0], adapter, prompt, tokens, is_whole=False)
        else:
            self.tally.note(CANCELLED)

    async def _invalid(self, channel: grpc.aio.Channel, rng: random.Random) -> None:
        name, method, make, code = rng.choice(INVALID)
        try:
            async for _ in channel.unary_stream(method)(make(rng)):
                pass
        except grpc.aio.AioRpcError as error:
            end = REFUSED if error.code() is code else WRONG
            self.tally.note(end, f"{name} was refused with {error.code().name}: {error.details()}")
        else:
            self.tally.note(WRONG, f"{name} was answered")

    def _draw(self, rng: random.Random) -> tuple[str, tuple[int, ...]]:
        names = (BASE, *self.truth.adapters, *self.passing)
        return rng.choice(names), rng.choice(self.truth.prompts)

    def _compare(self, first: Any, asked: str, prompt: tuple[int, ...], tokens: list[int], *, is_whole: bool) -> None:
        """By the digest of what answered: under a name that comes and goes it may be any of them."""
        adapter = self.digests.get(first.adapters[0].digest) if first.adapters else BASE
        self.tally.tokens += len(tokens)
        if adapter is None or (asked not in self.passing and adapter != asked):
            self.tally.note(WRONG, f"{asked!r} was answered by {adapter!r}")
        elif self.truth.is_right(adapter, prompt, tokens, is_whole=is_whole):
            self.tally.note(RIGHT if is_whole else CANCELLED)
        else:
            self.tally.note(WRONG, f"{adapter!r} to {prompt}: {tokens}, not {self.truth.answers[adapter, prompt]}")

    def _failed(self, error: grpc.aio.AioRpcError, adapter: str) -> None:
        """It may be gone, where its name comes and goes; nothing else may be."""
        gone = adapter in self.passing and error.code() is CODE.NOT_FOUND
        self.tally.note(REFUSED if gone else LOST, f"{adapter!r}: {error.code().name}: {error.details()}")


def _call(channel: grpc.aio.Channel, request: pb2.StreamGenerateRequest, timeout: float | None = None) -> Any:
    method: Any = channel.unary_stream(
        STREAM, pb2.StreamGenerateRequest.SerializeToString, pb2.StreamGenerateResponse.FromString
    )
    return method(request, timeout=timeout)
