"""ServerService: what this server is, holds and takes."""

from __future__ import annotations

from dataclasses import dataclass

from weft.server.api import translation
from weft.server.api.constraint_fields import MAX_CONSTRAINT_BYTES
from weft.server.api.edge import Context
from weft.server.api.responses import to_duration
from weft.server.config import ServerConfig
from weft.server.engine.load import EngineInfo
from weft.v1 import server_pb2 as pb2
from weft.v1 import server_pb2_grpc

_GENERATING = (
    *("generate", "stream", "chat", "logprobs", "tools", "several-answers", "prompt-logprobs", "score"),
    *("json-schema", "regex", "grammar", "choice"),
)
_ALWAYS = (
    *("classify", "embed", "priority", "cache-salt"),
    *("adapters", "adapter-mix", "adapter-update", "adapter-watch", "adapter-check", "capacity-plan"),
)


@dataclass(frozen=True, slots=True)
class ServerServicer(server_pb2_grpc.ServerServiceServicer):
    """Answers from what was loaded."""

    version: str
    config: ServerConfig
    info: EngineInfo

    async def GetServerInfo(self, request: pb2.GetServerInfoRequest, context: Context) -> pb2.GetServerInfoResponse:
        return pb2.GetServerInfoResponse(
            version=self.version,
            model=self.info.model,
            dtype=self.info.dtype,
            device=self.info.device,
            limits=self._limits(),
            capabilities=(*_GENERATING, *_ALWAYS) if self.info.abilities.generates else _ALWAYS,
        )

    def _limits(self) -> pb2.Limits:
        engine, info = self.config.engine, self.info
        return pb2.Limits(
            max_context_tokens=info.context_length,
            max_prompt_tokens=info.context_length - info.abilities.generates,
            max_batch_tokens=info.max_batch_tokens,
            max_running_requests=engine.max_running_requests,
            max_queued_requests=engine.max_queued_requests,
            max_queued_tokens=engine.max_queued_tokens,
            max_queued_requests_per_adapter=engine.max_queued_per_adapter,
            kv_capacity_tokens=info.kv_tokens,
            adapter_pages=info.adapter_pages,
            adapter_page_rank_rows=info.page_rows,
            max_adapters_per_request=translation.MAX_ADAPTERS,
            max_stop_sequences=translation.MAX_STOP_SEQUENCES,
            max_top_logprobs=translation.MAX_TOP_LOGPROBS,
            max_logit_bias=translation.MAX_LOGIT_BIAS,
            max_answers=min(translation.MAX_ANSWERS, engine.max_requests),
            max_continuations=min(translation.MAX_CONTINUATIONS, engine.max_requests),
            max_constraint_bytes=MAX_CONSTRAINT_BYTES,
            max_request_time=to_duration(self.config.max_request_s),
        )
