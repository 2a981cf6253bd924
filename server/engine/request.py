"""What the engine is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum

import torch

from weft.server.engine.constraints import Constraint


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; the defaults are greedy. Ranges are checked where the request enters.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0 and typical_p 1 are off. The penalties follow the field:
    repetition (> 1 discourages) over prompt and output, presence and frequency over the output. seed None draws one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stopping:
    """When the answer ends. max_tokens 0 generates none: only the prompt is computed.

    time_limit_s ends it with what there is, counted from the request's arrival.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    stop_sequences: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    include_stop_sequence: bool = False
    ignore_eos: bool = False
    time_limit_s: float | None = None


class Pooling(Enum):
    """Which of a prompt's last hidden states, those after the final norm, become its one vector."""

    LAST = "last"
    MEAN = "mean"
    CLS = "cls"
    """That of the first token."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt and how to answer it.

    adapters: ids (`name` or `name@sha256:…`), each with its weight in the mix; empty means the base alone.
    logprobs: report each token's log-probability and rank; top_logprobs: and that many of the likeliest alternatives.
    prompt_logprobs_from: report the prompt's tokens from this position on, which is at least 1, with their
    log-probabilities; None: not at all. pooling: answer with one vector instead of tokens (max_tokens 0 goes with it);
    through_head: and with what the output head of the one adapter makes of it. constraint: what the answer must match.
    priority: higher first among the requests of one caller. cache_salt: prefixes are shared only between equal ones.
    deadline_s: on the engine's clock, as arrived_s, None for when it is submitted.
    """

    request_id: str
    prompt: tuple[int, ...]
    adapters: tuple[tuple[str, float], ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    stopping: Stopping = field(default_factory=Stopping)
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs_from: int | None = None
    pooling: Pooling | None = None
    through_head: bool = False
    constraint: Constraint | None = None
    priority: int = 0
    caller: str = ""
    cache_salt: str = ""
    deadline_s: float | None = None
    arrived_s: float | None = None


class FinishReason(Enum):
    """Why an answer ended; the names are those of the wire."""

    STOP_TOKEN = "stop_token"
    STOP_SEQUENCE = "stop_sequence"
    MAX_TOKENS = "max_tokens"
    CONTEXT_LENGTH = "context_length"
    TIME_LIMIT = "time_limit"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the likeliest tokens at a position."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer, or of a prompt.

    text: what it completed of the answer; of a prompt's token, its own, apart from the others. logprob and rank
    (1 = likeliest) are under the model's own distribution, before temperature, penalties and truncation; None unless
    asked for.
    """

    id: int
    text: str
    logprob: float | None = None
    rank: int | None = None
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """How an answer ended: reason, usage in tokens, and seconds spent queued, in prefill and in decode."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    stop_sequence: str = ""
    cached_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to an answer: text that is final, the tokens, and at the end how it finished.

    prompt: with the first delta, the prompt's tokens that were asked for with their log-probabilities; only the first
    of them where the time limit came before the rest. vector: what a pooled request asked for, float32 on the host:
    [hidden], or [labels] where it went through a head.
    """

    text: str
    tokens: tuple[Token, ...]
    finish: Finish | None = None
    prompt: tuple[Token, ...] = ()
    vector: torch.Tensor | None = None

    @classmethod
    def join(cls, deltas: Seq[Delta]) -> Delta:
        """What several steps added to one answer, in order, as if one had; at least one."""
        if len(deltas) == 1:
            return deltas[0]
        return cls(
            "".join(delta.text for delta in deltas),
            tuple(token for delta in deltas for token in delta.tokens),
            deltas[-1].finish,
            tuple(token for delta in deltas for token in delta.prompt),
            deltas[-1].vector,
        )
