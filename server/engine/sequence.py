"""A request while the engine works on it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from weft.adapters.residency import AdapterRef
from weft.server.engine.constraints import Matcher
from weft.server.engine.edits import RowEdits
from weft.server.engine.lookup import Lookup
from weft.server.engine.request import Finish, FinishReason, Pooling, Request, Token
from weft.server.engine.text import OutputText

NEVER = 1 << 62
"""A position that no sequence reaches."""


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt and answer so far, and how far the model has come with them.

    There is no prefill and no decode state: a sequence has *pending* tokens, a step computes some of them, and when
    none is left the next token is sampled. A decoding sequence has one pending token; a preempted one has all of them
    again. What a prefix cache had is not pending.

    num_cached: tokens that were not pending when it first ran; None before that, and without a prefix cache. For
    `prefix_cache.py`: block_keys, of the full blocks; num_published, how many of those others may use; awaited_key, of
    the last block that another sequence is to compute first.
    """

    request: Request
    adapters: tuple[AdapterRef, ...]
    text: OutputText
    rng: random.Random
    arrived_s: float
    tokens: list[int] = field(init=False)
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    started_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    matcher: Matcher | None = None
    """How far the answer has come with its constraint; None without one."""
    num_cached: int | None = None
    num_preemptions: int = 0
    num_published: int = 0
    block_keys: list[bytes] = field(default_factory=list)
    awaited_key: bytes = b""
    lookup: Lookup | None = None
    """Guesses what comes next; speculation makes it."""
    edits: RowEdits | None = None
    """What the request changes about its logits; the sampler makes it."""
    prompt_report: list[Token] = field(default_factory=list)
    """Of the prompt's tokens that the request wants to know about, those that were computed and not given out yet."""
    pooled: torch.Tensor | None = None
    """Of a pooled request, what its tokens so far make of its vector; `pooling.py` makes it."""
    _num_given: int = field(init=False)
    _num_reported: int = 0
    _uniforms: list[float] = field(default_factory=list)
    _first_uniform: int = 0
    _starts: dict[tuple[int, ...], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt[: self._num_seen()])
        self._num_given = len(self.tokens)

    def _num_seen(self) -> int:
        """How much of the prompt counts: for a causal model's classifier none of the padding that ends it.

        As in transformers' classes, whose heads take the last token that is no padding; of nothing else, the first.
        """
        prompt, length = self.request.prompt, len(self.request.prompt)
        classes = self.adapters[0].version.classes if self.adapters and self.request.through_head else None
        while classes is not None and length > 1 and prompt[length - 1] == classes.pad_token_id:
            length -= 1
        return length

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are not in the cache yet."""
        return len(self.tokens) - self.num_computed

    @property
    def first_wanted(self) -> int:
        """The first position whose logits, or whose last hidden state, are still wanted."""
        if self.request.pooling in (Pooling.MEAN, Pooling.CLS):
            return 0
        reported_from = self.request.prompt_logprobs_from
        if reported_from is None or self.num_generated:
            return len(self.tokens) - 1
        return min(reported_from, len(self.tokens)) - 1

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self._num_given

    @property
    def may_stop(self) -> bool:
        """Whether a stop sequence may end the answer by now."""
        return self.num_generated >= self.request.stopping.min_tokens

    def unreported(self, at: range) -> range:
        """Positions of `at` whose logits say how likely the next token of the prompt was, where that is wanted."""
        first = self.request.prompt_logprobs_from
        if first is None:
            return range(0)
        start = max(at.start, first - 1 + self._num_reported)
        return range(start, max(start, min(at.stop, len(self.request.prompt) - 1)))

    def report_prompt(self, tokens: list[Token]) -> None:
        """The next of the prompt's tokens that are wanted."""
        self.prompt_report += tokens
        self._num_reported += len(tokens)

    def take_prompt_report(self) -> tuple[Token, ...]:
        """What there is, to be given out: once."""
        taken = tuple(self.prompt_report)
        self.prompt_report.clear()
        return taken

    def uniform(self, ahead: int = 0) -> float:
        """The number in [0, 1) that picks a token: the next one, or one so many after it.

        One number belongs to one place in the answer, however often it is asked for.
        """
        at = self.num_generated + ahead
        del self._uniforms[: max(0, self.num_generated - self._first_uniform)]
        self._first_uniform = self.num_generated
        while self._first_uniform + len(self._uniforms) <= at:
            self._uniforms.append(self.rng.random())
        return self._uniforms[ahead]

    def start_of(self, invocation: tuple[int, ...]) -> int:
        """Where an adapter begins: at the last occurrence of its invocation in the prompt, never without one.

        An adapter that has no invocation begins at once.
        """
        if not invocation:
            return 0
        if invocation not in self._starts:
            prompt, length = self.request.prompt, len(invocation)
            found = (at for at in range(len(prompt) - length, -1, -1) if prompt[at : at + length] == invocation)
            self._starts[invocation] = next(found, NEVER)
        return self._starts[invocation]

    @property
    def ends_s(self) -> tuple[float, ...]:
        """When it ends at the latest, by its deadline and by its time limit."""
        limit_s = self.request.stopping.time_limit_s
        ends_s = (self.request.deadline_s, None if limit_s is None else self.arrived_s + limit_s)
        return tuple(end_s for end_s in ends_s if end_s is not None)

    @property
    def adapter_label(self) -> str:
        """The adapters' names as one word; empty for the base alone."""
        return "+".join(ref.name for ref in self.adapters)

    def finish(self, reason: FinishReason, now_s: float) -> Finish:
        """How the sequence ends now."""
        started = self.started_s if self.started_s is not None else now_s
        first = self.first_token_s if self.first_token_s is not None else now_s
        return Finish(
            reason=reason,
            prompt_tokens=len(self.request.prompt),
            completion_tokens=self.num_generated,
            queue_s=started - self.arrived_s,
            prefill_s=first - started,
            decode_s=now_s - first,
            stop_sequence=self.text.stop_sequence,
            cached_prompt_tokens=self.num_cached or 0,
        )
