"""InferenceService: check, tokenize, submit, answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from opentelemetry.trace import Tracer

from weft.adapters.residency import AdapterRef
from weft.errors import DeadlineExceeded, InvalidRequest, WeftError
from weft.server.api.access.rights import Rights
from weft.server.api.callers import current_caller
from weft.server.api.constraint_fields import to_spec
from weft.server.api.edge import Context, EndedByEngine
from weft.server.api.prompts import Prompts
from weft.server.api.responses import Reply, join, to_classification, to_embedding, to_refs, to_score, to_usage
from weft.server.api.spans import InferenceRecord
from weft.server.api.translation import (
    AnyRequest,
    GenerateRequest,
    PooledRequest,
    RequestLimits,
    check_prompt,
    prompt_path,
    several,
    to_engine_request,
    to_pooled_request,
    to_score_request,
)
from weft.server.api.violations import Violations
from weft.server.engine.constraint_cache import ConstraintCache
from weft.server.engine.frontend import Frontend, Streams
from weft.server.engine.request import Delta, Finish, Request, Token
from weft.v1 import inference_pb2 as pb2
from weft.v1 import inference_pb2_grpc


@dataclass(frozen=True, slots=True)
class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """clock: the engine's. max_request_s: how long a request without a deadline may take. rights: the callers'.

    tracer: None, nothing is.
    """

    frontend: Frontend
    prompts: Prompts
    constraints: ConstraintCache
    limits: RequestLimits
    clock: Callable[[], float]
    max_request_s: float
    rights: Rights
    tracer: Tracer | None = None

    async def Generate(self, request: pb2.GenerateRequest, context: Context) -> pb2.GenerateResponse:
        async with aclosing(self._answer(request, context)) as messages:
            return join([message async for message in messages])

    async def StreamGenerate(
        self, request: pb2.StreamGenerateRequest, context: Context
    ) -> AsyncIterator[pb2.StreamGenerateResponse]:
        async with aclosing(self._answer(request, context)) as messages:
            async for message in messages:
                yield message

    async def Score(self, request: pb2.ScoreRequest, context: Context) -> pb2.ScoreResponse:
        metadata, arrived_s, deadline_s = context.invocation_metadata() or (), self.clock(), self._deadline_s(context)
        checked = to_score_request(request, metadata, self.limits, deadline_s)
        shared = replace(checked, arrived_s=arrived_s)
        with self._recorded(request, shared) as record:
            return await self._score(request, shared, deadline_s, record)

    async def _score(
        self, request: pb2.ScoreRequest, shared: Request, deadline_s: float, record: InferenceRecord
    ) -> pb2.ScoreResponse:
        async with self._in_time(deadline_s):
            prompt = await self.prompts.encode(request)
            if not 1 <= len(prompt) <= self.limits.max_prompt_tokens:  # before it is tokenized with each continuation
                longest = self.limits.max_prompt_tokens
                raise InvalidRequest.of(
                    prompt_path(request), f"has {len(prompt)} tokens; must have from 1 to {longest}"
                )
            continuations = await self.prompts.encode_continuations(request, prompt)
        wholes = [tuple(prompt + continuation) for continuation in continuations]
        requests = [replace(shared, prompt=whole, prompt_logprobs_from=len(prompt)) for whole in wholes]
        self._check({f"continuations[{index}]": whole for index, whole in enumerate(requests)}, "with the prompt ")
        tokens: list[list[Token]] = [[] for _ in requests]
        finishes: list[Finish] = []
        num_prompt_tokens = len(prompt) + sum(map(len, continuations))
        async with self._streams(requests, num_prompt_tokens) as streams:
            record.queued(streams)
            async for index, delta in _reporting(streams):
                record.take(delta)
                tokens[index] += delta.prompt
                finishes += [delta.finish] if delta.finish is not None else []
        usage = to_usage(finishes)
        usage.prompt_tokens = num_prompt_tokens
        return pb2.ScoreResponse(
            scores=[to_score(scored) for scored in tokens],
            usage=usage,
            adapters=to_refs(streams.adapters),
            request_id=shared.request_id,
        )

    async def Classify(self, request: pb2.ClassifyRequest, context: Context) -> pb2.ClassifyResponse:
        asked, adapters, delta, num_dropped = await self._pool(request, context)
        classes = adapters[0].version.classes if adapters else self.limits.abilities.classes
        assert classes is not None, "the engine takes no other adapter"
        return to_classification(classes, asked.request_id, adapters, delta, num_dropped)

    async def Embed(self, request: pb2.EmbedRequest, context: Context) -> pb2.EmbedResponse:
        asked, adapters, delta, num_dropped = await self._pool(request, context)
        normalize = request.normalize if request.HasField("normalize") else True
        return to_embedding(asked, adapters, delta, num_dropped, normalize=normalize)

    async def _pool(self, message: PooledRequest, context: Context) -> tuple[Request, Sequence[AdapterRef], Delta, int]:
        """The engine's request, the versions that served it, its one delta, and tokens of its input left out."""
        metadata, arrived_s, deadline_s = context.invocation_metadata() or (), self.clock(), self._deadline_s(context)
        checked = replace(to_pooled_request(message, metadata, self.limits, deadline_s), arrived_s=arrived_s)
        with self._recorded(message, checked) as record:
            async with self._in_time(deadline_s):
                prompt, num_dropped = await self.prompts.encode_input(message, self.limits.context_length)
                complete = replace(checked, prompt=tuple(prompt))
                self._check({prompt_path(message): complete})
            async with self._streams([complete], len(prompt)) as streams:
                record.queued(streams)
                (delta,) = [delta async for _, delta in _reporting(streams)]
                record.take(delta)
        return complete, streams.adapters, delta, num_dropped

    async def Tokenize(self, request: pb2.TokenizeRequest, context: Context) -> pb2.TokenizeResponse:
        violations = Violations()
        check_prompt(request, self.limits, violations)
        violations.raise_any()
        with_special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        return pb2.TokenizeResponse(token_ids=await self.prompts.encode(request, add_special_tokens=with_special))

    async def Detokenize(self, request: pb2.DetokenizeRequest, context: Context) -> pb2.DetokenizeResponse:
        violations = Violations()
        if violations.fits(request.token_ids, "token_ids", self.limits.context_length):
            violations.token_ids(request.token_ids, "token_ids", self.limits.vocab_size)
        violations.raise_any()
        text = await self.prompts.decode(request.token_ids, skip_special_tokens=request.skip_special_tokens)
        return pb2.DetokenizeResponse(text=text)

    async def _answer(
        self, message: GenerateRequest, context: Context
    ) -> AsyncGenerator[pb2.StreamGenerateResponse, None]:
        """The stream of one request. Closed or cancelled at any point, it leaves nothing behind."""
        metadata, arrived_s, deadline_s = context.invocation_metadata() or (), self.clock(), self._deadline_s(context)
        checked = replace(to_engine_request(message, metadata, self.limits, deadline_s), arrived_s=arrived_s)
        with self._recorded(message, checked) as record:
            prompt, requests = await self._prepare(message, checked, deadline_s)
            async with self._streams(requests, len(prompt)) as streams:
                record.queued(streams)
                shown = await self.prompts.show(message, prompt) if message.output.include_prompt else None
                reply = Reply(
                    *(checked.request_id, streams.adapters, shown),
                    num_answers=len(requests),
                    prompt_logprobs=requests[0].prompt_logprobs_from is not None,
                )
                async for index, delta in _reporting(streams):
                    record.take(delta)
                    for response in reply.push(index, delta):
                        yield response

    async def _prepare(
        self, message: GenerateRequest, checked: Request, deadline_s: float
    ) -> tuple[tuple[int, ...], list[Request]]:
        """The prompt's tokens, and the requests of all answers."""
        async with self._in_time(deadline_s):
            prompt = tuple(await self.prompts.encode(message))
            complete = replace(checked, prompt=prompt)
            self._check({prompt_path(message): complete})
            spec = to_spec(message)
            constraint = await self.constraints.get(spec) if spec is not None else None
        requests = several(replace(complete, constraint=constraint), message.n or 1)
        if message.output.prompt_logprobs and len(prompt) > 1:
            requests[0] = replace(requests[0], prompt_logprobs_from=1)
        return prompt, requests

    @contextmanager
    def _recorded(self, message: AnyRequest, request: Request) -> Iterator[InferenceRecord]:
        record = InferenceRecord(message, request, self.tracer, self.clock)
        try:
            yield record
        finally:
            record.end()

    @asynccontextmanager
    async def _streams(self, requests: Sequence[Request], num_prompt_tokens: int) -> AsyncIterator[Streams]:
        """The answers to requests with the same adapters, if their caller may use these and has tokens left."""
        quota = current_caller.get().quota
        self.rights.check_mix([adapter_id for adapter_id, _ in requests[0].adapters])
        if quota is not None:
            quota.check_tokens()
        async with self.frontend.streams(requests) as streams:
            if quota is not None:
                quota.spend(num_prompt_tokens)
            yield streams

    def _check(self, requests: Mapping[str, Request], before: str = "") -> None:
        """Raises InvalidRequest for prompts that can't be run. requests: by the path that each is reported at."""
        violations = Violations()
        for path, request in requests.items():
            try:
                self.frontend.check(request)
            except InvalidRequest as error:
                for problem in error.problems:
                    violations.add(path, before + problem.description)
        violations.raise_any()

    @asynccontextmanager
    async def _in_time(self, deadline_s: float) -> AsyncIterator[None]:
        """Raises DeadlineExceeded where the block outlasts the deadline; once it is queued, the engine sees to that."""
        try:
            async with asyncio.timeout(deadline_s - self.clock()):
                yield
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the request was queued") from None

    def _deadline_s(self, context: Context) -> float:
        """On the engine's clock."""
        remaining_s: Any = context.time_remaining()  # None without a deadline, whatever the stubs say
        return self.clock() + (self.max_request_s if remaining_s is None else remaining_s)


async def _reporting(streams: Streams) -> AsyncIterator[tuple[int, Delta]]:
    """The deltas of requests that the engine has taken, whose errors it has counted; their caller pays for each."""
    quota = current_caller.get().quota
    try:
        async for index, delta in streams:
            if quota is not None:
                quota.spend(len(delta.tokens))
            yield index, delta
    except WeftError as error:
        raise EndedByEngine(error) from error
