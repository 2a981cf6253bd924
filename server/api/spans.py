"""What one request for an answer tells of itself: tokens and seconds for its log line, and attributes for its span.

Their names are those of OpenTelemetry's semantic conventions for generative AI, which are in development there. Nothing
holds a prompt, an answer or a stop sequence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from opentelemetry.trace import Span, Tracer, set_span_in_context
from opentelemetry.util.types import AttributeValue

from weft.server.api.callers import current_caller
from weft.server.api.responses import Phases, to_phases
from weft.server.api.translation import AnyRequest
from weft.server.calls import this_call
from weft.server.engine.frontend import Streams
from weft.server.engine.request import Delta, Finish, FinishReason, Request
from weft.v1 import inference_pb2 as pb2

PROVIDER = "weft"
BASE = "base"
"""The model of a request without an adapter."""

_MAX_INT = (1 << 63) - 1
"""The largest number that an attribute can hold."""

_REASONS = {
    FinishReason.STOP_TOKEN: "stop",
    FinishReason.STOP_SEQUENCE: "stop",
    FinishReason.MAX_TOKENS: "length",
    FinishReason.CONTEXT_LENGTH: "length",
    FinishReason.TIME_LIMIT: "length",
    FinishReason.CANCELLED: "cancelled",
}
"""As most of the field names them."""

_SAMPLING = ("temperature", "top_k", "top_p", "frequency_penalty", "presence_penalty", "seed")


class InferenceRecord:
    """One checked request, from its prompt to its end; told to the RPC that is being served."""

    def __init__(
        self, message: AnyRequest, request: Request, tracer: Tracer | None, clock: Callable[[], float]
    ) -> None:
        """request: with its arrival. clock: the engine's."""
        self._call = this_call()
        self._call.request_id = request.request_id
        self._call.caller = current_caller.get().name
        self._tracer = tracer
        self._clock = clock
        self._arrived_s = clock() if request.arrived_s is None else request.arrived_s
        self._streams: Streams | None = None
        self._first_s: float | None = None
        self._finishes: list[Finish] = []
        span = self._call.span
        if span is not None and span.is_recording():
            operation, model = _operation(message), "+".join(adapter for adapter, _ in request.adapters) or BASE
            span.update_name(f"{operation} {model}")
            is_stream = isinstance(message, pb2.StreamGenerateRequest)
            span.set_attributes(
                {
                    "gen_ai.operation.name": operation,
                    "gen_ai.provider.name": PROVIDER,
                    "gen_ai.request.model": model,
                    "gen_ai.request.stream": is_stream,
                    **_parameters(message, request),
                }
            )

    def queued(self, streams: Streams) -> None:
        """The engine has it, with these versions of its adapters."""
        self._streams = streams
        self._call.adapters = tuple(f"{ref.name}@{ref.version.digest}" for ref in streams.adapters)

    def take(self, delta: Delta) -> None:
        """More of one of its answers came."""
        if self._first_s is None:
            self._first_s = self._clock()
        if delta.finish is not None:
            self._finishes.append(delta.finish)

    def end(self) -> None:
        """However it ended."""
        if self._streams is None:
            return
        phases = self._phases(self._streams)
        usage = {}
        if self._finishes:
            usage = {
                "prompt_tokens": self._finishes[0].prompt_tokens,
                "completion_tokens": sum(finish.completion_tokens for finish in self._finishes),
                "cached_prompt_tokens": min(finish.cached_prompt_tokens for finish in self._finishes),
            }
            if self._is_complete:
                self._call.outcome = "+".join(dict.fromkeys(finish.reason.value for finish in self._finishes))
        seconds = {f"{name}_s": round(duration_s, 6) for name, duration_s in phases._asdict().items()}
        self._call.facts.update({**usage, **seconds})
        span = self._call.span
        if span is not None and span.is_recording():
            span.set_attributes(self._result(self._streams, usage))
            self._draw(span, phases)

    @property
    def _is_complete(self) -> bool:
        return self._streams is not None and len(self._finishes) == len(self._streams.members)

    def _phases(self, streams: Streams) -> Phases:
        """From the engine where all answers are complete; else as seen from here, up to now."""
        if self._is_complete:
            return to_phases(self._finishes)
        now_s = self._clock()
        begun = [stream.begun_s for stream in streams.members if stream.begun_s is not None]
        begun_s = min(begun, default=now_s)
        first_s = now_s if self._first_s is None else self._first_s
        return Phases(begun_s - self._arrived_s, max(0.0, first_s - begun_s), now_s - max(first_s, begun_s))

    def _result(self, streams: Streams, usage: dict[str, int]) -> dict[str, AttributeValue]:
        names = [ref.name for ref in streams.adapters]
        result: dict[str, AttributeValue] = {
            "gen_ai.response.id": self._call.request_id,
            "gen_ai.response.model": "+".join(self._call.adapters) or BASE,
            "weft.adapter.names": names,
            "weft.adapter.digests": [ref.version.digest for ref in streams.adapters],
        }
        if usage:
            result |= {
                "gen_ai.response.finish_reasons": [_REASONS[finish.reason] for finish in self._finishes],
                "gen_ai.usage.input_tokens": usage["prompt_tokens"],
                "gen_ai.usage.output_tokens": usage["completion_tokens"],
                "gen_ai.usage.cache_read.input_tokens": usage["cached_prompt_tokens"],
                "weft.finish_reasons": [finish.reason.value for finish in self._finishes],
            }
        if self._first_s is not None:
            result["gen_ai.response.time_to_first_chunk"] = self._first_s - self._arrived_s
        return result

    def _draw(self, span: Span, phases: Phases) -> None:
        """A child span a phase, at the times that it had."""
        if self._tracer is None:
            return
        parent = set_span_in_context(span)
        at_ns = time.time_ns() - round((self._clock() - self._arrived_s) * 1e9)
        for name, duration_s in phases._asdict().items():
            if duration_s > 0:
                end_ns = at_ns + round(duration_s * 1e9)
                self._tracer.start_span(name, parent, start_time=at_ns).end(end_ns)
                at_ns = end_ns


def _operation(message: AnyRequest) -> str:
    match message:
        case pb2.ScoreRequest():
            return "score"
        case pb2.ClassifyRequest():
            return "classify"
        case pb2.EmbedRequest():
            return "embeddings"
    return "chat" if message.WhichOneof("prompt") == "chat" else "text_completion"


def _parameters(message: AnyRequest, request: Request) -> dict[str, AttributeValue]:
    """What was asked for, as far as it was said."""
    found: dict[str, AttributeValue] = {}
    if isinstance(message, pb2.GenerateRequest | pb2.StreamGenerateRequest):
        found["gen_ai.request.max_tokens"] = request.stopping.max_tokens
        found["gen_ai.output.type"] = "json" if message.WhichOneof("constraint") == "json_schema" else "text"
        found |= dict(_given(message.sampling))
        if message.n > 1:
            found["gen_ai.request.choice.count"] = message.n
    if request.priority:
        found["weft.request.priority"] = request.priority
    return found


def _given(sampling: Any) -> Iterator[tuple[str, AttributeValue]]:
    for name in _SAMPLING:
        if sampling.HasField(name) and (value := getattr(sampling, name)) <= _MAX_INT:
            yield f"gen_ai.request.{name}", value
