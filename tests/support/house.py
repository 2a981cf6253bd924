"""A whole server on loopback, stubs to talk to it, and its insides to audit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details_pb2
from google.rpc.status_pb2 import Status
from opentelemetry.trace import Tracer
from stubs import Stubs
from transformers import PreTrainedTokenizerBase

from weft.server.api.access.gate import Gate
from weft.server.api.access.rights import Rights
from weft.server.api.edge import Edge
from weft.server.api.inference import InferenceServicer
from weft.server.api.prompts import Prompts
from weft.server.api.translation import RequestLimits
from weft.server.app import Server
from weft.server.engine.constraint_cache import ConstraintCache
from weft.server.engine.constraints import Compiler, make_vocabulary
from weft.v1 import adapter_pb2, inference_pb2, inference_pb2_grpc

ENDLESS = 60_000
"""More tokens than the tiny model makes in any test's time: a request for so many runs until it is stopped."""

MAX_REQUEST_S = 7 * 86400.0
"""Enough for an endless request on any machine: one that can't be done in time at the current rate is refused."""

MAX_RUNNING = 4
MAX_QUEUED = 8
MAX_PROMPT_BYTES = 4096
ADAPTER_PAGES = 16

SMALL_WINDOW = (
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1024),
    ("grpc.use_local_subchannel_pool", 1),
)
"""What a client that reads nothing buffers of a stream does not grow."""

CHAT_TEMPLATE = (
    "{% if mood %}({{ mood }}){% endif %}{% for tool in tools or [] %}[{{ tool.name }}]{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'villain' %}{{ raise_exception('villains are not served') }}{% endif %}"
    "<{{ m.role }}{% if m.name %}:{{ m.name }}{% endif %}{% if m.tool_call_id %}#{{ m.tool_call_id }}{% endif %}>"
    "{{ m.content }}{% for call in m.tool_calls or [] %}!{{ call.name }}{% endfor %}"
    "{% if not loop.last or not continue_final_message %}</>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

T = TypeVar("T")
M = TypeVar("M", bound=Message)


@dataclass(frozen=True)
class House(Stubs):
    """A running server, stubs to talk to it, and its insides to audit."""

    server: Server
    loop: asyncio.AbstractEventLoop
    root: Path
    tokenizer: PreTrainedTokenizerBase

    @property
    def frontend(self) -> Any:
        assert self.server._loaded is not None
        return self.server._loaded.frontend

    @property
    def store(self) -> Any:
        return self.frontend._store

    def on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    @contextmanager
    def variant(
        self,
        *,
        max_request_s: float = MAX_REQUEST_S,
        max_prompt_bytes: int = MAX_PROMPT_BYTES,
        has_chat_template: bool = True,
        compiler: Compiler | None = None,
        late_s: float = 0.0,
        tracer: Tracer | None = None,
        stall_s: float | None = None,
    ) -> Iterator[Any]:
        """A stub to a second port of the same engine, where InferenceService is set up in another way.

        late_s: how long ago its requests came, as if they had been tokenized and compiled since.
        """
        engine = self.frontend._engine
        limits = RequestLimits(
            vocab_size=engine.limits.vocab_size,
            context_length=engine.limits.context_length,
            max_prompt_bytes=max_prompt_bytes,
            max_requests=MAX_RUNNING + MAX_QUEUED,
            has_chat_template=has_chat_template,
        )
        vocabulary = make_vocabulary(self.tokenizer, engine.limits.vocab_size, engine._eos_token_ids)
        constraints = ConstraintCache(compiler or Compiler(vocabulary))
        prompts = Prompts(self.tokenizer)

        def clock() -> float:
            return float(engine.clock()) - late_s

        rights = Rights(self.store.labels_of)
        servicer = InferenceServicer(self.frontend, prompts, constraints, limits, clock, max_request_s, rights, tracer)

        async def start() -> tuple[grpc.aio.Server, int]:
            edge = Edge(self.server._metrics.refused, Gate(), tracer, stall_s)
            inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, cast("Any", edge))
            server = grpc.aio.server()
            server.add_generic_rpc_handlers((edge,))
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            return server, port

        server, port = self.on_loop(start())
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}", SMALL_WINDOW) as channel:
                yield inference_pb2_grpc.InferenceServiceStub(channel)
        finally:
            self.on_loop(server.stop(None))

    def audit(self) -> None:
        """Wait until nothing is in flight, and assert that nothing is held."""

        async def idle() -> None:
            await asyncio.wait_for(self.frontend._idle.wait(), 60)

        self.on_loop(idle())
        # The engine takes its commands in order: once it answers this one, it has obeyed the cancels before.
        self.inference.Generate(generate(text="x", stopping={"max_tokens": 1}))
        engine = self.frontend._engine
        assert not engine.has_work
        engine.check_pools()
        self.store.check()
        pool = engine._scheduler.pool
        assert pool.num_free == pool.capacity
        assert all(info.num_in_flight == 0 for info in self.store.list())

    def metric(self, name: str, **labels: str) -> float | None:
        return self.server._registry.get_sample_value(name, labels)

    def source(self, name: str) -> str:
        return f"file:{self.root / 'adapters' / name}"

    def digest(self, name: str) -> str:
        return self.get(name).digest

    def create(self, name: str, folder: str = "one", *, wait: bool = True, **fields: Any) -> adapter_pb2.Adapter:
        adapter = {"name": name, "source": self.source(folder), **fields}
        response = self.adapters.CreateAdapter(adapter_pb2.CreateAdapterRequest(adapter=adapter, wait=wait))
        assert isinstance(response.adapter, adapter_pb2.Adapter)
        return response.adapter

    def update(self, name: str, *paths: str, folder: str = "", **fields: Any) -> adapter_pb2.Adapter:
        """paths: of the mask. folder: of the new source."""
        source = {"source": self.source(folder)} if folder else {}
        request = adapter_pb2.UpdateAdapterRequest(adapter={"name": name, **source, **fields})
        if paths:
            request.update_mask.paths.extend(paths)
        response = self.adapters.UpdateAdapter(request)
        assert isinstance(response.adapter, adapter_pb2.Adapter)
        return response.adapter

    def get(self, name: str) -> adapter_pb2.Adapter:
        response = self.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name=name))
        assert isinstance(response.adapter, adapter_pb2.Adapter)
        return response.adapter

    def settled(self, name: str) -> adapter_pb2.Adapter:
        """The adapter once its load has ended."""
        while (adapter := self.get(name)).state == adapter_pb2.ADAPTER_STATE_LOADING:
            pass
        return adapter

    def delete(self, name: str) -> adapter_pb2.Adapter:
        response = self.adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name=name))
        assert isinstance(response.adapter, adapter_pb2.Adapter)
        return response.adapter


def generate(**fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(**fields)


def stream(**fields: Any) -> inference_pb2.StreamGenerateRequest:
    return inference_pb2.StreamGenerateRequest(**fields)


@dataclass(frozen=True)
class Refusal:
    """The status that an RPC ended with."""

    code: grpc.StatusCode
    message: str
    status: Status

    def detail(self, kind: type[M]) -> M:
        """Its one detail of this type."""
        (packed,) = [packed for packed in self.status.details if packed.Is(kind.DESCRIPTOR)]
        detail = kind()
        packed.Unpack(detail)
        return detail

    @property
    def reason(self) -> str:
        info = self.detail(details_pb2.ErrorInfo)
        assert info.domain == "weft"
        return info.reason

    @property
    def violations(self) -> dict[str, str]:
        return {v.field: v.description for v in self.detail(details_pb2.BadRequest).field_violations}


def refusal(call: Callable[[], Any]) -> Refusal:
    """How an RPC is refused; it must be."""
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return refusal_of(raised.value)


def refusal_of(error: Any) -> Refusal:
    """The refusal that a client raised. Its status is empty where the client itself gave up."""
    status = Status()
    status.ParseFromString(dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b""))
    if status.details:
        assert (status.code, status.message) == (error.code().value[0], error.details())
    return Refusal(error.code(), error.details(), status)
