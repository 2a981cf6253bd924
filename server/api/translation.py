"""A request on the wire -> a request of the engine, or every violation at once, each with its field's path."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from google.protobuf.duration_pb2 import Duration

from weft.adapters.names import MAX_NAME_CHARACTERS
from weft.server.api.callers import current_caller
from weft.server.api.chat import check_chat
from weft.server.api.constraint_fields import check_constraint
from weft.server.api.observing import MAX_REQUEST_ID_CHARACTERS
from weft.server.api.violations import Number, Range, Violations
from weft.server.engine.limits import Abilities
from weft.server.engine.request import Pooling, Request, Sampling, Stopping
from weft.v1 import inference_pb2 as pb2

MAX_ADAPTERS = 8
MAX_ADAPTER_ID_CHARACTERS = MAX_NAME_CHARACTERS + len("@sha256:") + 64
MAX_STOP_SEQUENCES = 64
MAX_STOP_SEQUENCE_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_ANSWERS = 16
MAX_CONTINUATIONS = 256
MAX_CACHE_SALT_CHARACTERS = 128
MAX_CALLER_CHARACTERS = 256
CALLER_METADATA = ("x-gateway-inference-fairness-id", "x-llm-d-inference-fairness-id")
ADAPTER_METADATA = ("x-gateway-model-name-rewrite", "x-llm-d-model-name-rewrite")

GenerateRequest = pb2.GenerateRequest | pb2.StreamGenerateRequest
Metadata = Iterable[tuple[str, str | bytes]]
PooledRequest = pb2.ClassifyRequest | pb2.EmbedRequest
AnyRequest = GenerateRequest | pb2.ScoreRequest | PooledRequest

WEIGHTS = Range(-100, 100)
BIASES = Range(-1000, 1000)
PENALTIES = Range(-2, 2)
REPETITION_PENALTIES = Range(0.001, 1000)
PRIORITIES = Range(-100, 100)
NUM_SEEDS = 1 << 64
MAX_DURATION_S = 315_576_000_000
MAX_NANOS = 999_999_999

POOLINGS = {
    Pooling.LAST: pb2.POOLING_LAST,
    Pooling.MEAN: pb2.POOLING_MEAN,
    Pooling.CLS: pb2.POOLING_CLS,
}

MAX_REPEATS = 16
"""How many times the longest text the prompts of a score's continuations may be together."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What the loaded model and the configuration allow.

    max_requests: to one adapter that can be queued and running at once, as several answers and continuations are.
    """

    vocab_size: int
    context_length: int
    max_prompt_bytes: int
    max_requests: int
    has_chat_template: bool
    abilities: Abilities = field(default_factory=Abilities)

    @property
    def max_prompt_tokens(self) -> int:
        return self.context_length - 1

    @property
    def max_answers(self) -> int:
        return min(MAX_ANSWERS, self.max_requests)

    @property
    def queue_bound(self) -> str:
        """Why there can't be more answers or continuations, where that is not by their own limits."""
        return (
            f"at most {self.max_requests} can be queued and running at once "
            "(--max-running-requests, and --max-queued-requests or --max-queued-per-adapter)"
        )

    @property
    def max_continuations(self) -> int:
        return min(MAX_CONTINUATIONS, self.max_requests)


def to_engine_request(
    request: GenerateRequest, metadata: Metadata, limits: RequestLimits, deadline_s: float
) -> Request:
    """The engine's request, still without its prompt's token ids; with `several`, each of the answers' requests.

    deadline_s: on the engine's clock. Raises InvalidRequest with every violation.
    """
    violations = Violations()
    translated = replace(
        _shared(request, metadata, limits, deadline_s, violations),
        sampling=_sampling(request.sampling, limits, violations),
        stopping=_stopping(request.stopping, limits, violations),
        logprobs=request.output.logprobs or request.output.top_logprobs > 0,
        top_logprobs=violations.number(request.output, "output.top_logprobs", 0, Range(0, MAX_TOP_LOGPROBS)),
    )
    if request.output.prompt_logprobs and not request.output.include_prompt:
        violations.add("output.prompt_logprobs", "is true, but include_prompt, which lists the prompt's tokens, is not")
    _check_num_answers(request, translated.sampling.temperature, limits, violations)
    check_constraint(request, violations.add)
    violations.raise_any()
    return translated


def _check_num_answers(
    request: GenerateRequest, temperature: float, limits: RequestLimits, violations: Violations
) -> None:
    if limits.max_answers < min(request.n, MAX_ANSWERS):
        violations.add("n", f"is {request.n}; {limits.queue_bound}")
        return
    num_answers = violations.number(request, "n", 1, Range(1, limits.max_answers))
    if 1 < num_answers <= limits.max_answers and temperature == 0:
        violations.add("n", f"is {num_answers}, but temperature is 0: all answers would be the same")


def several(request: Request, count: int) -> list[Request]:
    """The requests of several answers: where a seed was given, each takes the next one, in a ring."""
    seed = request.sampling.seed
    seeds = [None if seed is None else (seed + index) % NUM_SEEDS for index in range(count)]
    return [replace(request, sampling=replace(request.sampling, seed=seed)) for seed in seeds]


def to_score_request(
    request: pb2.ScoreRequest, metadata: Metadata, limits: RequestLimits, deadline_s: float
) -> Request:
    """As `to_engine_request`: what the requests of all continuations share, which generate nothing."""
    violations = Violations()
    translated = _shared(request, metadata, limits, deadline_s, violations)
    _check_continuations(request, limits, violations)
    violations.raise_any()
    return replace(translated, stopping=Stopping(max_tokens=0))


def to_pooled_request(request: PooledRequest, metadata: Metadata, limits: RequestLimits, deadline_s: float) -> Request:
    """As `to_engine_request`, of one that is answered with a vector."""
    violations = Violations()
    translated = replace(_shared(request, metadata, limits, deadline_s, violations), stopping=Stopping(max_tokens=0))
    violations.number(request, "truncate", 0, Range(0))
    pooling = _pooling(request, limits, violations)
    violations.raise_any()
    return replace(translated, pooling=pooling, through_head=isinstance(request, pb2.ClassifyRequest))


def _pooling(request: PooledRequest, limits: RequestLimits, violations: Violations) -> Pooling | None:
    """For a head the one that the model's class has."""
    abilities = limits.abilities
    able = {POOLINGS[pooling]: pooling for pooling in abilities.poolings}
    if not able:
        violations.add("input", "becomes no vector: the base has no backbone apart from its head")
        return None
    if isinstance(request, pb2.ClassifyRequest):
        return abilities.class_pooling
    if request.pooling == pb2.POOLING_UNSPECIFIED:
        return abilities.poolings[0]
    if request.pooling not in able:
        names = ", ".join(map(pb2.Pooling.Name, able))
        violations.add("pooling", f"is {_pooling_name(request.pooling)}; this base serves {names}")
    return able.get(request.pooling)


def _pooling_name(pooling: int) -> str:
    known = pb2.Pooling.DESCRIPTOR.values_by_number.get(pooling)
    return known.name if known is not None else str(pooling)


def _check_continuations(request: pb2.ScoreRequest, limits: RequestLimits, violations: Violations) -> None:
    path, continuations = "continuations", request.continuations
    if not continuations:
        violations.add(path, "is empty; give at least one")
    elif limits.max_continuations < min(len(continuations), MAX_CONTINUATIONS):
        violations.add(path, f"has {len(continuations)} entries; {limits.queue_bound}")
    elif violations.fits(continuations, path, limits.max_continuations):
        for index, continuation in enumerate(continuations):
            if not continuation:
                violations.add(f"{path}[{index}]", "is empty; give a text")
        num_bytes = sum(len(continuation.encode()) for continuation in continuations)
        violations.size(num_bytes, path, limits.max_prompt_bytes)
        before, most = len(request.text.encode()) * len(continuations), MAX_REPEATS * limits.max_prompt_bytes
        if before > most:
            violations.add(
                path, f"has {len(continuations)} entries, before each the text: {before} bytes; at most {most}"
            )


def _shared(
    request: AnyRequest, metadata: Metadata, limits: RequestLimits, deadline_s: float, violations: Violations
) -> Request:
    """What every request has that runs the model on a prompt."""
    check_prompt(request, limits, violations)
    if given_as(request) == "text" and not request.text:
        violations.add("text", "is empty; give a prompt")
    violations.length(request.cache_salt, "cache_salt", MAX_CACHE_SALT_CHARACTERS)
    caller = current_caller.get()
    other = _other(metadata, violations) if caller.on_behalf else ""
    return Request(
        request_id=_request_id(request.request_id, violations),
        prompt=(),
        adapters=_adapters(request, metadata, violations),
        priority=violations.number(request, "priority", 0, PRIORITIES),
        caller=caller.asking_for(other),
        cache_salt=caller.salted(request.cache_salt, other),
        deadline_s=deadline_s,
    )


def prompt_path(request: AnyRequest | pb2.TokenizeRequest) -> str:
    """The field that a checked prompt is in."""
    field = given_as(request)
    return "token_ids.ids" if field == "token_ids" else field


def given_as(request: AnyRequest | pb2.TokenizeRequest) -> str:
    """The field of the prompt that is set; "" for none."""
    is_pooled = isinstance(request, PooledRequest)
    return str((request.WhichOneof("input") if is_pooled else request.WhichOneof("prompt")) or "")


def check_prompt(request: AnyRequest | pb2.TokenizeRequest, limits: RequestLimits, violations: Violations) -> None:
    """Note what is wrong with a prompt, before it is tokenized. An empty text is left to the caller."""
    match given_as(request):
        case "text":
            violations.size(len(request.text.encode()), "text", limits.max_prompt_bytes)
        case "chat":
            assert not isinstance(request, PooledRequest)
            if not limits.has_chat_template:
                violations.add(
                    "chat", "can't be laid out: this model's tokenizer has no chat template; send text or token_ids"
                )
            check_chat(request.chat, limits.max_prompt_bytes, violations)
        case "token_ids":
            assert not isinstance(request, pb2.TokenizeRequest)
            ids, path = request.token_ids.ids, "token_ids.ids"
            longest = _longest(request, limits)
            if not ids:
                violations.add(path, "is empty; give at least one token")
            elif len(ids) > longest:
                violations.add(path, f"has {len(ids)} tokens; at most {longest} fit")
            else:
                violations.token_ids(ids, path, limits.vocab_size)
        case _:
            what = "input" if isinstance(request, PooledRequest) else "prompt"
            violations.add(what, "is missing; set one of its fields")


def _longest(request: AnyRequest, limits: RequestLimits) -> float:
    """Of token ids, how many there may be; an answer of tokens needs one more place."""
    if not isinstance(request, PooledRequest):
        return limits.max_prompt_tokens
    return math.inf if request.HasField("truncate") else limits.context_length


def _request_id(given: str, violations: Violations) -> str:
    violations.length(given, "request_id", MAX_REQUEST_ID_CHARACTERS)
    if len(given) <= MAX_REQUEST_ID_CHARACTERS and not given.isprintable():
        violations.add("request_id", f"is {given!r}; must be printable")
    return given or uuid.uuid4().hex


def _other(metadata: Metadata, violations: Violations) -> str:
    """Whom a gateway in front asks for; empty where it says nothing."""
    said = {str(value): key for key, value in metadata if key in CALLER_METADATA and value}
    if len(said) > 1:
        violations.add(f"metadata {max(said.values())}", f"names callers that disagree: {', '.join(map(repr, said))}")
    for caller, key in said.items():
        violations.length(caller, f"metadata {key}", MAX_CALLER_CHARACTERS)
    return next(iter(said), "")


def _adapters(request: AnyRequest, metadata: Metadata, violations: Violations) -> tuple[tuple[str, float], ...]:
    """(id, weight) of each adapter; empty for the base."""
    adapter_id = _adapter_id(request.adapter_id, metadata, violations)
    if isinstance(request, pb2.ClassifyRequest):
        return ((adapter_id, 1.0),) if adapter_id else ()
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
        repetition_penalty=number("repetition_penalty", 1.0, REPETITION_PENALTIES),
        presence_penalty=number("presence_penalty", 0.0, PENALTIES),
        frequency_penalty=number("frequency_penalty", 0.0, PENALTIES),
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
    path, seconds = "stopping.time_limit", limit.seconds + limit.nanos / 1e9
    if abs(limit.seconds) > MAX_DURATION_S:
        violations.add(
            f"{path}.seconds", f"is {limit.seconds}; a Duration has at most {MAX_DURATION_S}, of either sign"
        )
    elif abs(limit.nanos) > MAX_NANOS:
        violations.add(f"{path}.nanos", f"is {limit.nanos}; a Duration has at most {MAX_NANOS}, of either sign")
    elif limit.seconds * limit.nanos < 0:
        violations.add(path, f"has {limit.seconds} seconds and {limit.nanos} nanos; a Duration's have the same sign")
    elif seconds <= 0:
        violations.add(path, f"is {seconds:g} s; must be above 0")
    return seconds
