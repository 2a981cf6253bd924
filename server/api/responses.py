"""What the engine answered -> messages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from google.protobuf.duration_pb2 import Duration
from torch.nn import functional

from weft.adapters.classes import Classes, ProblemType
from weft.adapters.residency import AdapterRef
from weft.server.api.prompts import Shown
from weft.server.api.resources import PROBLEM_TYPES
from weft.server.api.translation import POOLINGS
from weft.server.engine.request import Delta, Finish, FinishReason, Request, Token
from weft.v1 import inference_pb2 as pb2

_REASONS = {
    FinishReason.STOP_TOKEN: pb2.FINISH_REASON_STOP_TOKEN,
    FinishReason.STOP_SEQUENCE: pb2.FINISH_REASON_STOP_SEQUENCE,
    FinishReason.MAX_TOKENS: pb2.FINISH_REASON_MAX_TOKENS,
    FinishReason.CONTEXT_LENGTH: pb2.FINISH_REASON_CONTEXT_LENGTH,
    FinishReason.TIME_LIMIT: pb2.FINISH_REASON_TIME_LIMIT,
    FinishReason.CANCELLED: pb2.FINISH_REASON_CANCELLED,
}


class Reply:
    """Deltas of the answers to one request -> the messages of its stream.

    The first message of all brings the adapters, each answer's first one the prompt if it was asked for, each answer's
    last one the finish reason, and the last of all the usage and the timing.
    """

    def __init__(
        self,
        request_id: str,
        adapters: Sequence[AdapterRef],
        prompt: Shown | None,
        *,
        num_answers: int = 1,
        prompt_logprobs: bool = False,
    ) -> None:
        """prompt_logprobs: the first answer's first delta brings those of the prompt, which other answers wait for."""
        self._request_id = request_id
        self._adapters = adapters
        self._prompt = prompt
        self._num_answers = num_answers
        self._waits = prompt_logprobs
        self._held: list[tuple[int, Delta]] = []
        self._prompt_tokens: Sequence[pb2.Token] = []
        self._opened: set[int] = set()
        self._finishes: list[Finish] = []

    def push(self, index: int, delta: Delta) -> list[pb2.StreamGenerateResponse]:
        """The messages that one answer's next delta makes due."""
        if self._waits and index != 0:
            self._held.append((index, delta))
            return []
        if not self._opened and self._prompt is not None:
            self._prompt_tokens = _prompt_tokens(self._prompt, delta.prompt)
        self._waits = False
        due = [(index, delta), *self._held]
        self._held = []
        return [self._message(*one) for one in due]

    def _message(self, index: int, delta: Delta) -> pb2.StreamGenerateResponse:
        message = pb2.StreamGenerateResponse(request_id=self._request_id, index=index)
        if not self._opened:
            message.adapters.extend(to_refs(self._adapters))
        if index not in self._opened and self._prompt is not None:
            message.text = self._prompt.text
            message.tokens.extend(self._prompt_tokens)
        self._opened.add(index)
        message.text += delta.text
        message.tokens.extend(_token(token) for token in delta.tokens)
        if delta.finish is not None:
            message.finish_reason = _REASONS[delta.finish.reason]
            message.stop_sequence = delta.finish.stop_sequence
            self._finishes.append(delta.finish)
            if len(self._finishes) == self._num_answers:
                message.usage.CopyFrom(to_usage(self._finishes))
                message.timing.CopyFrom(_timing(self._finishes))
        return message


def join(messages: Sequence[pb2.StreamGenerateResponse]) -> pb2.GenerateResponse:
    """A whole stream, at least one message, as one response."""
    first, last = messages[0], messages[-1]
    response = pb2.GenerateResponse(
        usage=last.usage, adapters=first.adapters, timing=last.timing, request_id=first.request_id
    )
    answers: list[pb2.GenerateResponse | pb2.Alternative] = [response]
    answers += [response.alternatives.add() for _ in range(max(message.index for message in messages))]
    texts: list[list[str]] = [[] for _ in answers]
    for message in messages:
        answer = answers[message.index]
        texts[message.index].append(message.text)
        answer.tokens.extend(message.tokens)
        if message.finish_reason:
            answer.finish_reason = message.finish_reason
            answer.stop_sequence = message.stop_sequence
    for answer, parts in zip(answers, texts, strict=True):
        answer.text = "".join(parts)
    return response


def to_score(tokens: Sequence[Token]) -> pb2.ContinuationScore:
    """The score of a continuation's tokens, each with its log-probability and rank."""
    return pb2.ContinuationScore(
        logprob=math.fsum(token.logprob for token in tokens if token.logprob is not None),
        num_tokens=len(tokens),
        is_greedy=all(token.rank == 1 for token in tokens),
    )


def to_classification(
    classes: Classes, request_id: str, adapters: Sequence[AdapterRef], delta: Delta, num_dropped: int
) -> pb2.ClassifyResponse:
    """What a head made of an input, with its scores."""
    logits = _vector(delta)
    match classes.problem_type:
        case ProblemType.SINGLE_LABEL:
            scores = logits.softmax(0)
        case ProblemType.MULTI_LABEL:
            scores = logits.sigmoid()
        case _:
            scores = logits
    told = zip(classes.labels, scores.tolist(), logits.tolist(), strict=True)
    return pb2.ClassifyResponse(
        scores=[pb2.LabelScore(label=label, score=score, logit=logit) for label, score, logit in told],
        usage=to_usage([_finish(delta)]),
        adapters=to_refs(adapters),
        request_id=request_id,
        truncated_tokens=num_dropped,
        problem_type=PROBLEM_TYPES[classes.problem_type],
    )


def to_embedding(
    request: Request, adapters: Sequence[AdapterRef], delta: Delta, num_dropped: int, *, normalize: bool
) -> pb2.EmbedResponse:
    """The vector of an input, of length 1 if wanted; one of zeros stays as it is."""
    vector = _vector(delta)
    return pb2.EmbedResponse(
        values=(functional.normalize(vector, dim=0) if normalize else vector).tolist(),
        usage=to_usage([_finish(delta)]),
        adapters=to_refs(adapters),
        request_id=request.request_id,
        truncated_tokens=num_dropped,
        pooling=POOLINGS[request.pooling] if request.pooling is not None else None,
    )


def _vector(delta: Delta) -> torch.Tensor:
    assert delta.vector is not None, "a pooled request's only delta has its vector"
    return delta.vector


def _finish(delta: Delta) -> Finish:
    assert delta.finish is not None, "a pooled request's only delta is its last"
    return delta.finish


def to_usage(finishes: Sequence[Finish]) -> pb2.Usage:
    """Of all answers to one prompt, which counts once; as cached counts what none of them computed."""
    return pb2.Usage(
        prompt_tokens=finishes[0].prompt_tokens,
        completion_tokens=sum(finish.completion_tokens for finish in finishes),
        cached_prompt_tokens=min(finish.cached_prompt_tokens for finish in finishes),
    )


def to_refs(adapters: Sequence[AdapterRef]) -> list[pb2.AdapterRef]:
    """The adapter versions that were applied."""
    return [pb2.AdapterRef(adapter_id=ref.name, digest=ref.version.digest) for ref in adapters]


def to_duration(seconds: float) -> Duration:
    """Seconds as a Duration, to the nanosecond."""
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


class Phases(NamedTuple):
    """Seconds of a request's life, one after the other."""

    queue: float
    prefill: float
    decode: float


def to_phases(finishes: Sequence[Finish]) -> Phases:
    """Of all answers to one prompt: queued until the first began, decoding until the last ended."""
    started_s = min(finish.queue_s for finish in finishes)
    first_token_s = min(finish.queue_s + finish.prefill_s for finish in finishes)
    ended_s = max(finish.queue_s + finish.prefill_s + finish.decode_s for finish in finishes)
    return Phases(started_s, first_token_s - started_s, ended_s - first_token_s)


def _timing(finishes: Sequence[Finish]) -> pb2.Timing:
    queue, prefill, decode = map(to_duration, to_phases(finishes))
    return pb2.Timing(queue=queue, prefill=prefill, decode=decode)


def _prompt_tokens(prompt: Shown, reported: Sequence[Token]) -> list[pb2.Token]:
    """The prompt's tokens; those that are reported, which the first never is, with their log-probabilities."""
    tokens = [pb2.Token(id=token, text=text) for token, text in zip(prompt.ids, prompt.pieces, strict=True)]
    for token, report in zip(tokens[1:], reported, strict=False):
        token.MergeFrom(_token(replace(report, text="")))
    return tokens


def _token(token: Token) -> pb2.Token:
    return pb2.Token(
        id=token.id,
        text=token.text,
        logprob=token.logprob,
        rank=token.rank,
        top=[pb2.TopLogprob(id=top.id, text=top.text, logprob=top.logprob) for top in token.top],
    )
