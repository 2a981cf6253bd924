"""A request on the wire -> a request of the engine, or every violation at once, each with its field's path."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from weft.adapters.names import MAX_NAME_CHARACTERS
from weft.errors import InvalidRequest, Problem
from weft.server.engine.request import Request, Sampling, Stopping
from weft.v1 import inference_pb2 as pb2

MAX_ADAPTERS = 8
MAX_ADAPTER_ID_CHARACTERS = MAX_NAME_CHARACTERS + len("@sha256:") + 64
MAX_CHAT_MESSAGES = 1024
MAX_STOP_SEQUENCES = 64
MAX_STOP_SEQUENCE_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_PROBLEMS = 256
"""Of one message that are kept; far more than fit in a status."""

MAX_REQUEST_ID_CHARACTERS = 128
ADAPTER_METADATA = ("x-gateway-model-name-rewrite", "x-llm-d-model-name-rewrite")

GenerateRequest = pb2.GenerateRequest | pb2.StreamGenerateRequest
Metadata = Iterable[tuple[str, str | bytes]]
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What the loaded model and the configuration allow."""

    vocab_size: int
    max_prompt_bytes: int
    has_chat_template: bool


@dataclass(frozen=True, slots=True)
class Range:
    """low ≤ value ≤ high, or low < value where `above`. No range holds NaN."""

    low: float
    high: float = math.inf
    above: bool = False

    def holds(self, value: float) -> bool:
        return math.isfinite(value) and (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'at least'} {_digits(self.low)}"
        return low if math.isinf(self.high) else f"{low} and at most {_digits(self.high)}"


def _digits(value: float) -> str:
    """An integer in all its digits, another number in those that a float32 has."""
    return str(value) if isinstance(value, int) else f"{value:.7g}"


WEIGHTS = Range(-100, 100)
BIASES = Range(-1000, 1000)


class Violations:
    """What is wrong with a message, noted field by field."""

    def __init__(self) -> None:
        self._problems: list[Problem] = []

    def add(self, path: str, description: str) -> None:
        if len(self._problems) < MAX_PROBLEMS:
            self._problems.append(Problem(path, description))

    def fits(self, items: Sized, path: str, limit: int) -> bool:
        """Whether a field has no more items than that; noted if not. Who gets False leaves the items alone."""
        if len(items) > limit:
            self.add(path, f"has {len(items)} entries; at most {limit} are taken")
        return len(items) <= limit

    def number(self, message: Message, path: str, default: Number, allowed: Range) -> Number:
        """The field's value, or its default where it is not set; noted if out of range."""
        name = path.rpartition(".")[2]
        if not message.HasField(name):
            return default
        value: Number = getattr(message, name)
        self.value(value, path, allowed)
        return value

    def value(self, value: float, path: str, allowed: Range) -> None:
        """Note a number that is out of range."""
        if not allowed.holds(value):
            self.add(path, f"is {_digits(value)}; must be {'' if math.isfinite(value) else 'finite, '}{allowed}")

    def token_ids(self, ids: Iterable[int], path: str, vocab_size: int) -> None:
        """Note the first id that is outside of the vocabulary."""
        for index, token in enumerate(ids):
            if token >= vocab_size:
                self.add(f"{path}[{index}]", f"is {token}; token ids end at {vocab_size - 1}")
                return

    def raise_any(self) -> None:
        """Raises InvalidRequest if anything was noted."""
        if self._problems:
            raise InvalidRequest(self._problems)


def to_engine_request(
    request: GenerateRequest, metadata: Metadata, limits: RequestLimits, deadline_s: float
) -> Request:
    """The engine's request, still without its prompt's token ids.

    deadline_s: on the engine's clock. Raises InvalidRequest with every violation.
    """
    violations = Violations()
    check_prompt(request, limits, violations)
    if request.WhichOneof("prompt") == "text" and not request.text:
        violations.add("text", "is empty; give a prompt")
    translated = Request(
        request_id=_request_id(request.request_id, violations),
        prompt=(),
        adapters=_adapters(request, metadata, violations),
        sampling=_sampling(request.sampling, limits, violations),
        stopping=_stopping(request.stopping, limits, violations),
        logprobs=request.output.logprobs or request.output.top_logprobs > 0,
        top_logprobs=violations.number(request.output, "output.top_logprobs", 0, Range(0, MAX_TOP_LOGPROBS)),
        deadline_s=deadline_s,
    )
    violations.raise_any()
    return translated


def check_prompt(request: GenerateRequest | pb2.TokenizeRequest, limits: RequestLimits, violations: Violations) -> None:
    """Note what is wrong with a prompt, before it is tokenized. An empty text is left to the caller."""
    match request.WhichOneof("prompt"):
        case "text":
            _check_size(request.text, "text", limits, violations)
        case "chat":
            _check_chat(request.chat, limits, violations)
        case "token_ids":
            assert not isinstance(request, pb2.TokenizeRequest)
            if not request.token_ids.ids:
                violations.add("token_ids.ids", "is empty; give at least one token")
            violations.token_ids(request.token_ids.ids, "token_ids.ids", limits.vocab_size)
        case _:
            violations.add("prompt", "is missing; set one of its fields")


def _check_size(text: str, path: str, limits: RequestLimits, violations: Violations) -> None:
    num_bytes = len(text.encode())
    if num_bytes > limits.max_prompt_bytes:
        violations.add(path, f"has {num_bytes} bytes; at most {limits.max_prompt_bytes} are taken")


def _check_chat(chat: pb2.ChatPrompt, limits: RequestLimits, violations: Violations) -> None:
    if not limits.has_chat_template:
        violations.add("chat", "can't be laid out: this model's tokenizer has no chat template; send text or token_ids")
    if not chat.messages:
        violations.add("chat.messages", "is empty; give at least one")
    if chat.add_generation_prompt and chat.continue_final_message:
        violations.add("chat.continue_final_message", "is true, and so is add_generation_prompt; choose one")
    if not violations.fits(chat.messages, "chat.messages", MAX_CHAT_MESSAGES):
        return
    for index, message in enumerate(chat.messages):
        if not message.role:
            violations.add(f"chat.messages[{index}].role", "is empty; name a role that the chat template knows")
    _check_size("".join(message.content for message in chat.messages), "chat.messages", limits, violations)


def _request_id(given: str, violations: Violations) -> str:
    if len(given) > MAX_REQUEST_ID_CHARACTERS:
        violations.add("request_id", f"has {len(given)} characters; at most {MAX_REQUEST_ID_CHARACTERS} are taken")
    elif not given.isprintable():
        violations.add("request_id", f"is {given!r}; must be printable")
    return given or uuid.uuid4().hex


def _adapters(request: GenerateRequest, metadata: Metadata, violations: Violations) -> tuple[tuple[str, float], ...]:
    """(id, weight) of each adapter; empty for the base."""
    adapter_id = _adapter_id(request.adapter_id, metadata, violations)
    if adapter_id and request.adapters:
        violations.add("adapters", f"is set, and so is adapter_id ({adapter_id!r}); choose one")
    terms = request.adapters if violations.fits(request.adapters, "adapters", MAX_ADAPTERS) else ()
    weights = []
    for index, term in enumerate(terms):
        if not term.adapter_id:
            violations.add(f"adapters[{index}].adapter_id", "is empty; name an adapter")
        _check_length(term.adapter_id, f"adapters[{index}].adapter_id", violations)
        weights.append(_weight(term, f"adapters[{index}].weight", violations))
    if adapter_id:
        return ((adapter_id, 1.0),)
    return tuple((term.adapter_id, weight) for term, weight in zip(terms, weights, strict=True))


def _weight(term: pb2.AdapterWeight, path: str, violations: Violations) -> float:
    weight = violations.number(term, path, 1.0, WEIGHTS)
    if weight == 0:
        violations.add(path, "is 0; leave the adapter out")
    return weight


def _check_length(adapter_id: str, path: str, violations: Violations) -> None:
    if len(adapter_id) > MAX_ADAPTER_ID_CHARACTERS:
        violations.add(
            path, f"has {len(adapter_id)} characters; no adapter's id has more than {MAX_ADAPTER_ID_CHARACTERS}"
        )


def _adapter_id(given: str, metadata: Metadata, violations: Violations) -> str:
    """The one adapter that the field and the metadata agree on, or ""; a pinned version goes before its name."""
    named = [(f"metadata {key}", str(value)) for key, value in metadata if key in ADAPTER_METADATA and value]
    if given:
        _check_length(given, "adapter_id", violations)
        named.append(("the field", given))
    ids = {adapter_id for _, adapter_id in named}
    pinned = {adapter_id for adapter_id in ids if "@" in adapter_id} or ids
    if len(pinned) > 1 or len({adapter_id.partition("@")[0] for adapter_id in ids}) > 1:
        said = ", ".join(f"{where} says {adapter_id!r}" for where, adapter_id in named)
        violations.add("adapter_id", f"is named in ways that disagree: {said}")
    return min(pinned, default="")


def _sampling(sampling: pb2.Sampling, limits: RequestLimits, violations: Violations) -> Sampling:
    def number(name: str, default: Number, allowed: Range) -> Number:
        return violations.number(sampling, f"sampling.{name}", default, allowed)

    return Sampling(
        temperature=number("temperature", 0.0, Range(0, 100)),
        top_k=number("top_k", 0, Range(0)),
        top_p=number("top_p", 1.0, Range(0, 1, above=True)),
        min_p=number("min_p", 0.0, Range(0, 1)),
        typical_p=number("typical_p", 1.0, Range(0, 1, above=True)),
        repetition_penalty=number("repetition_penalty", 1.0, Range(0, above=True)),
        presence_penalty=number("presence_penalty", 0.0, Range(-2, 2)),
        frequency_penalty=number("frequency_penalty", 0.0, Range(-2, 2)),
        seed=sampling.seed if sampling.HasField("seed") else None,
        logit_bias=_logit_bias(sampling, limits, violations),
    )


def _logit_bias(sampling: pb2.Sampling, limits: RequestLimits, violations: Violations) -> dict[int, float]:
    if not violations.fits(sampling.logit_bias, "sampling.logit_bias", MAX_LOGIT_BIAS):
        return {}
    bias = dict(sampling.logit_bias)
    for token, value in sorted(bias.items()):
        path = f"sampling.logit_bias[{token}]"
        if token >= limits.vocab_size:
            violations.add(path, f"names token {token}; token ids end at {limits.vocab_size - 1}")
        violations.value(value, path, BIASES)
    return bias


def _stopping(stopping: pb2.Stopping, limits: RequestLimits, violations: Violations) -> Stopping:
    defaults = Stopping()
    max_tokens = violations.number(stopping, "stopping.max_tokens", defaults.max_tokens, Range(1))
    min_tokens = violations.number(stopping, "stopping.min_tokens", defaults.min_tokens, Range(0))
    if min_tokens > max_tokens >= 1:
        violations.add("stopping.min_tokens", f"is {min_tokens}; must be at most max_tokens, which is {max_tokens}")
    return Stopping(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_sequences=_stop_sequences(stopping.stop_sequences, violations),
        stop_token_ids=_stop_token_ids(stopping.stop_token_ids, limits, violations),
        include_stop_sequence=stopping.include_stop_sequence,
        ignore_eos=stopping.ignore_eos,
        time_limit_s=_time_limit_s(stopping.time_limit, violations) if stopping.HasField("time_limit") else None,
    )


def _stop_sequences(sequences: Sequence[str], violations: Violations) -> tuple[str, ...]:
    path = "stopping.stop_sequences"
    if not violations.fits(sequences, path, MAX_STOP_SEQUENCES):
        return ()
    for index, sequence in enumerate(sequences):
        if not 1 <= len(sequence) <= MAX_STOP_SEQUENCE_CHARACTERS:
            violations.add(
                f"{path}[{index}]", f"has {len(sequence)} characters; must have 1 to {MAX_STOP_SEQUENCE_CHARACTERS}"
            )
    return tuple(sequences)


def _stop_token_ids(ids: Sequence[int], limits: RequestLimits, violations: Violations) -> frozenset[int]:
    path = "stopping.stop_token_ids"
    if not violations.fits(ids, path, MAX_STOP_TOKEN_IDS):
        return frozenset()
    violations.token_ids(ids, path, limits.vocab_size)
    return frozenset(ids)


def _time_limit_s(limit: Duration, violations: Violations) -> float:
    seconds = limit.seconds + limit.nanos / 1e9
    if seconds <= 0:
        violations.add("stopping.time_limit", f"is {seconds:g} s; must be above 0")
    return seconds
