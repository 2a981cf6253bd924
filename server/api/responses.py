"""What the engine answered -> messages."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration

from weft.adapters.residency import AdapterRef
from weft.server.api.prompts import Shown
from weft.server.engine.request import Delta, Finish, FinishReason, Token
from weft.v1 import inference_pb2 as pb2

_REASONS = {
    FinishReason.STOP_TOKEN: pb2.FINISH_REASON_STOP_TOKEN,
    FinishReason.STOP_SEQUENCE: pb2.FINISH_REASON_STOP_SEQUENCE,
    FinishReason.MAX_TOKENS: pb2.FINISH_REASON_MAX_TOKENS,
    FinishReason.CONTEXT_LENGTH: pb2.FINISH_REASON_CONTEXT_LENGTH,
    FinishReason.TIME_LIMIT: pb2.FINISH_REASON_TIME_LIMIT,
    FinishReason.CANCELLED: pb2.FINISH_REASON_CANCELLED,
}


def to_message(delta: Delta, request_id: str) -> pb2.StreamGenerateResponse:
    """One delta as a stream's message; the last one brings the finish reason, the usage and the timing."""
    message = pb2.StreamGenerateResponse(
        text=delta.text, tokens=[_token(token) for token in delta.tokens], request_id=request_id
    )
    if delta.finish is not None:
        _add_finish(message, delta.finish)
    return message


def add_opening(message: pb2.StreamGenerateResponse, adapters: Sequence[AdapterRef], prompt: Shown | None) -> None:
    """Add what only a stream's first message holds: the adapter versions, and the prompt if it was asked for."""
    message.adapters.extend(pb2.AdapterRef(adapter_id=ref.name, digest=ref.version.digest) for ref in adapters)
    if prompt is not None:
        shown = [pb2.Token(id=token, text=text) for token, text in zip(prompt.ids, prompt.pieces, strict=True)]
        new = list(message.tokens)
        del message.tokens[:]
        message.tokens.extend([*shown, *new])
        message.text = prompt.text + message.text


def join(messages: Sequence[pb2.StreamGenerateResponse]) -> pb2.GenerateResponse:
    """A whole stream, at least one message, as one response."""
    first, last = messages[0], messages[-1]
    response = pb2.GenerateResponse(
        text="".join(message.text for message in messages),
        finish_reason=last.finish_reason,
        stop_sequence=last.stop_sequence,
        usage=last.usage,
        adapters=first.adapters,
        timing=last.timing,
        request_id=first.request_id,
    )
    for message in messages:
        response.tokens.extend(message.tokens)
    return response


def to_duration(seconds: float) -> Duration:
    """Seconds as a Duration, to the nanosecond."""
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def _add_finish(message: pb2.StreamGenerateResponse, finish: Finish) -> None:
    message.finish_reason = _REASONS[finish.reason]
    message.stop_sequence = finish.stop_sequence
    message.usage.prompt_tokens = finish.prompt_tokens
    message.usage.completion_tokens = finish.completion_tokens
    message.usage.cached_prompt_tokens = finish.cached_prompt_tokens
    message.timing.queue.CopyFrom(to_duration(finish.queue_s))
    message.timing.prefill.CopyFrom(to_duration(finish.prefill_s))
    message.timing.decode.CopyFrom(to_duration(finish.decode_s))


def _token(token: Token) -> pb2.Token:
    return pb2.Token(
        id=token.id,
        text=token.text,
        logprob=token.logprob,
        rank=token.rank,
        top=[pb2.TopLogprob(id=top.id, text=top.text, logprob=top.logprob) for top in token.top],
    )
