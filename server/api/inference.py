"""InferenceService: check, tokenize, submit, answer."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import grpc

from weft.adapters.residency import AdapterRef
from weft.errors import WeftError
from weft.server.api.edge import Context, EndedByEngine
from weft.server.api.prompts import Prompts
from weft.server.api.responses import add_opening, join, to_message
from weft.server.api.translation import (
    GenerateRequest,
    RequestLimits,
    Violations,
    check_prompt,
    to_engine_request,
)
from weft.server.engine.frontend import Frontend
from weft.server.engine.request import Finish
from weft.v1 import inference_pb2 as pb2
from weft.v1 import inference_pb2_grpc

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """clock: the engine's. max_request_s: how long a request without a deadline may take."""

    frontend: Frontend
    prompts: Prompts
    limits: RequestLimits
    clock: Callable[[], float]
    max_request_s: float

    async def Generate(self, request: pb2.GenerateRequest, context: Context) -> pb2.GenerateResponse:
        async with aclosing(self._answer(request, context)) as messages:
            return join([message async for message in messages])

    async def StreamGenerate(
        self, request: pb2.StreamGenerateRequest, context: Context
    ) -> AsyncIterator[pb2.StreamGenerateResponse]:
        async with aclosing(self._answer(request, context)) as messages:
            async for message in messages:
                yield message

    async def Score(self, request: pb2.ScoreRequest, context: Context) -> NoReturn:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server does not score continuations yet")

    async def Tokenize(self, request: pb2.TokenizeRequest, context: Context) -> pb2.TokenizeResponse:
        violations = Violations()
        check_prompt(request, self.limits, violations)
        violations.raise_any()
        with_special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        return pb2.TokenizeResponse(token_ids=await self.prompts.encode(request, add_special_tokens=with_special))

    async def Detokenize(self, request: pb2.DetokenizeRequest, context: Context) -> pb2.DetokenizeResponse:
        violations = Violations()
        violations.token_ids(request.token_ids, "token_ids", self.limits.vocab_size)
        violations.raise_any()
        text = await self.prompts.decode(request.token_ids, skip_special_tokens=request.skip_special_tokens)
        return pb2.DetokenizeResponse(text=text)

    async def _answer(
        self, message: GenerateRequest, context: Context
    ) -> AsyncGenerator[pb2.StreamGenerateResponse, None]:
        """The stream of one request. Closed or cancelled at any point, it leaves nothing behind."""
        remaining_s: Any = context.time_remaining()  # None without a deadline, whatever the stubs say
        deadline_s = self.clock() + (self.max_request_s if remaining_s is None else remaining_s)
        checked = to_engine_request(message, context.invocation_metadata() or (), self.limits, deadline_s)
        request = replace(checked, prompt=tuple(await self.prompts.encode(message)))
        async with self.frontend.stream(request) as stream:
            prompt = await self.prompts.show(message, request.prompt) if message.output.include_prompt else None
            is_first = True
            try:
                async for delta in stream:
                    response = to_message(delta, request.request_id)
                    if is_first:
                        add_opening(response, stream.adapters, prompt)
                        is_first = False
                    if delta.finish is not None:
                        _log_finish(request.request_id, stream.adapters, delta.finish)
                    yield response
            except WeftError as error:
                raise EndedByEngine(error) from error


def _log_finish(request_id: str, adapters: Sequence[AdapterRef], finish: Finish) -> None:
    names = ", ".join(f"{ref.name}@{ref.version.digest}" for ref in adapters) or "the base"
    _log.info(
        "request %s: %s after %d + %d tokens, by %s",
        request_id,
        finish.reason.value,
        finish.prompt_tokens,
        finish.completion_tokens,
        names,
    )
