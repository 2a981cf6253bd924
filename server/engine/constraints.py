"""What an answer must match: compiled once, then one matcher an answer says which tokens may come next.

The compiler is llguidance's. Its own limits bound what compiling takes and what one mask may hold. The time of a mask
grows faster than that where a grammar reads a text in many ways, so each answer has a budget of processor time too.
Masks are made without the interpreter's lock; a token is taken with it held, for llguidance never lets go of it there.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

import numpy
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from weft.errors import InvalidRequest
from weft.server.engine.grammars import check_grammar
from weft.server.engine.json_schemas import InvalidSchema, check_schema, parse_schema
from weft.server.engine.regexes import check_regex
from weft.server.engine.transfer import to_device

WHITESPACE = r"[ \t\r\n]{1,40}"
"""Between the parts of a JSON value, if any: enough to indent by, and not without an end."""

_SAMPLES = ('{"name": "Ada", "tags": [1, -2.5e3, true, null]}', "two  words\n\tand lines", "é 日本 😀")
_LIMITS = LLParserLimits(max_lexer_states=20_000, step_max_items=5_000, verbose_errors=False)
"""An object of 400 optional properties has parser rows of 1,600 items: a row keeps to llguidance's own 2,000."""

TOKEN_S = 0.005
"""Processor time for one token. Over an answer, a mask of 152k tokens takes 0.02 to 0.9 ms on the mean."""

MAX_DEBT_S = 0.1
"""Processor time beyond it: the first masks of an answer build their automaton, which takes milliseconds."""

Clock = Callable[[], float]

_STACK_BYTES = 64 << 20
_MAX_REASON_CHARACTERS = 300


class Kind(Enum):
    """How a constraint is written; the values are the fields of a request."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    GRAMMAR = "grammar"
    CHOICE = "choice"


@dataclass(frozen=True, slots=True)
class Spec:
    """A constraint as it was asked for: one text, or of a choice several."""

    kind: Kind
    texts: tuple[str, ...]


class Budget:
    """The processor time that one answer's constraint may take: so much a token, and once so much more.

    What a token leaves of its time is not saved for later ones: a constraint that grows dearer ends soon after it did.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._debt_s = 0.0

    @property
    def is_exceeded(self) -> bool:
        return self._debt_s > MAX_DEBT_S

    @contextmanager
    def spend(self) -> Iterator[None]:
        start_s = self._clock()
        yield
        self._debt_s += self._clock() - start_s

    def grant(self) -> None:
        """The time of one token; an exceeded budget stays exceeded."""
        if not self.is_exceeded:
            self._debt_s = max(0.0, self._debt_s - TOKEN_S)


class Matcher:
    """How far one answer has come with its constraint."""

    def __init__(self, matcher: LLMatcher, kind: Kind, num_words: int, clock: Clock) -> None:
        self._matcher = matcher
        self._kind = kind
        self._budget = Budget(clock)
        self.num_words = num_words
        """Of 32 tokens each, that `fill` sets."""

    @property
    def error(self) -> InvalidRequest | None:
        """Why no token can be told any more: the constraint led nowhere, or is too large or too slow to follow."""
        if self._matcher.is_error():
            reason = _reason(self._matcher)
        elif self._budget.is_exceeded:
            reason = "its tokens take too much time to tell; one that reads a text in fewer ways takes less"
        else:
            return None
        return InvalidRequest.of(self._kind.value, f"can't be followed any further: {reason}")

    @property
    def is_over(self) -> bool:
        """Whether the answer is complete and nothing but its end can follow."""
        return self._matcher.is_stopped() and self._matcher.is_accepting()

    def fill(self, bits: NDArray[numpy.int32]) -> None:
        """Set the bits of the tokens that may come next: int32 [num_words], the first in the lowest bit.

        The end of the answer is among them where the answer is complete. None is where there is an `error`.
        """
        if not self._budget.is_exceeded:
            with self._budget.spend():
                self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._budget.is_exceeded or self._matcher.is_error():
            bits.fill(0)

    def accept(self, token: int) -> None:
        """Take the token that was chosen; where the time is used up, none is taken any more."""
        if self._budget.is_exceeded:
            return
        with self._budget.spend():
            self._matcher.consume_token(token)
        self._budget.grant()


@dataclass(frozen=True, slots=True)
class Constraint:
    """A compiled constraint; may be shared by any number of answers."""

    kind: Kind
    _compiled: LLMatcher
    _num_words: int
    _clock: Clock

    def matcher(self) -> Matcher:
        """For one answer, at its beginning."""
        return Matcher(self._compiled.deep_copy(), self.kind, self._num_words, self._clock)


class UnsupportedTokenizer(ValueError):
    """A tokenizer whose tokens are not known byte by byte."""


def make_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: Iterable[int]) -> LLTokenizer:
    """The bytes of every token, and which of them end an answer. vocab_size: of the model's logits.

    Raises UnsupportedTokenizer.
    """
    ends = sorted(eos_token_ids)
    if not ends:
        raise UnsupportedTokenizer("it has no token that ends an answer")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnsupportedTokenizer(f"{type(tokenizer).__name__} is none of the tokenizers library")
    try:
        vocabulary = from_tokenizer(tokenizer, n_vocab=max(vocab_size, len(tokenizer)), eos_token=ends)
    except ValueError as error:
        raise UnsupportedTokenizer(_one_line(str(error))) from error
    for text in _SAMPLES:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        shown = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ids = [token for token in ids if token not in tokenizer.all_special_ids]
        if vocabulary.decode_bytes(ids).decode(errors="replace").strip(" ") != str(shown).strip(" "):
            raise UnsupportedTokenizer(f"its tokens for {text!r} have other bytes than their text")
    return vocabulary


class Compiler:
    """Compiles constraints for one vocabulary. May be used from several threads."""

    def __init__(self, vocabulary: LLTokenizer | UnsupportedTokenizer, clock: Clock = time.thread_time) -> None:
        """vocabulary: as `make_vocabulary` gives it; or why there is none, with which each is refused.

        clock: of the thread that follows an answer, its processor seconds; what other threads do must not count.
        """
        self._vocabulary = vocabulary
        self._clock = clock

    def compile(self, spec: Spec) -> Constraint:
        """Raises InvalidRequest, with the field and what is wrong with it."""
        field, vocabulary = spec.kind.value, self._vocabulary
        if isinstance(vocabulary, UnsupportedTokenizer):
            raise InvalidRequest.of(field, f"can't be followed with this model's tokenizer: {vocabulary}")
        try:
            grammar = _GRAMMARS[spec.kind](spec.texts)
        except ValueError as error:
            raise InvalidRequest.of(field, _one_line(str(error))) from None
        compiled = _on_a_large_stack(lambda: _compile(vocabulary, grammar))
        if compiled.is_error():
            raise InvalidRequest.of(field, _reason(compiled))
        return Constraint(spec.kind, compiled, -(-vocabulary.vocab_size // 32), self._clock)


def _compile(vocabulary: LLTokenizer, grammar: str) -> LLMatcher:
    """The compiled grammar, or a matcher in error where it can't be compiled or no token can begin it."""
    compiled = LLMatcher(vocabulary, grammar, log_level=0, limits=_LIMITS)
    first = compiled.deep_copy()
    first.compute_bitmask()
    return first if first.is_error() else compiled


def constrain(scores: torch.Tensor, rows: Seq[int], matchers: Seq[Matcher]) -> None:
    """Make every token impossible that may not come next, in place. scores: float [n, vocab]; a matcher a row."""
    forbidden = ~allowed_tokens(matchers, scores.shape[-1], scores.device)
    for row, mask in zip(rows, forbidden, strict=True):
        scores[row].masked_fill_(mask, float("-inf"))


def allowed_tokens(matchers: Seq[Matcher], width: int, device: torch.device) -> torch.Tensor:
    """Which tokens may come next: bool [n, width], a row a matcher, all of one vocabulary.

    width: of the model's head; none of its columns past the vocabulary is allowed.
    """
    flags = numpy.unpackbits(_masks(matchers).view(numpy.uint8), axis=1, count=width, bitorder="little")
    return to_device(torch.from_numpy(flags.view(numpy.bool_)), device)


def is_only(ids: torch.Tensor, row: torch.Tensor) -> bool:
    """Whether no other token than these, int64 [n], is possible. row: [vocab]."""
    possible = row > float("-inf")
    return int(possible.sum()) == int(possible[ids].sum())


def _masks(matchers: Seq[Matcher]) -> NDArray[numpy.int32]:
    bits = numpy.empty((len(matchers), matchers[0].num_words), dtype=numpy.int32)
    for row, matcher in zip(bits, matchers, strict=True):
        matcher.fill(row)
    return bits


def _json_schema_grammar(texts: Seq[str]) -> str:
    r"""One spelling for each key, or \u0061 would pass for a key other than "a"; so no \u escapes."""
    (text,) = texts
    schema = parse_schema(text)
    check_schema(schema)
    if schema is False:
        raise InvalidSchema("", "is false: no value matches it")
    return LLMatcher.grammar_from_json_schema(
        "{}" if schema is True else text,
        overrides={"whitespace_pattern": WHITESPACE, "json_allowed_escapes": 'nrbtf\\"'},
    )


def _regex_grammar(texts: Seq[str]) -> str:
    (text,) = texts
    check_regex(text)
    return LLMatcher.grammar_from_regex(text)


def _lark_grammar(texts: Seq[str]) -> str:
    (text,) = texts
    check_grammar(text)
    return LLMatcher.grammar_from_lark(text)


def _choice_grammar(texts: Seq[str]) -> str:
    """Every character by its number, so that none means anything to a regular expression."""
    return LLMatcher.grammar_from_regex("|".join("".join(f"\\x{{{ord(c):x}}}" for c in text) for text in texts))


_GRAMMARS: Mapping[Kind, Callable[[Seq[str]], str]] = {
    Kind.JSON_SCHEMA: _json_schema_grammar,
    Kind.REGEX: _regex_grammar,
    Kind.GRAMMAR: _lark_grammar,
    Kind.CHOICE: _choice_grammar,
}


def _reason(matcher: LLMatcher) -> str:
    """What the compiler says, in one line without its own inner state."""
    error = matcher.get_error()
    if error.startswith("NoExtension"):
        return "nothing can follow that would match"
    text = error.partition("<non-verbose/>")[0]
    if text.startswith("oneOf constraints"):
        return "oneOf is supported only where the compiler can tell its options apart: use anyOf"
    inner = re.search(r"^error: (.+)$", text, re.MULTILINE)
    return _one_line(inner.group(1) if inner else re.split(r"\n *\d+ \| ", text)[0])


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_REASON_CHARACTERS else line[:_MAX_REASON_CHARACTERS] + " …"


_STACK_LOCK = threading.Lock()


def _on_a_large_stack(work: Callable[[], LLMatcher]) -> LLMatcher:
    """Run on a thread of its own: the compiler follows references by recursion, and a full stack ends the process.

    The size of a stack can only be set for all threads that start; others may start meanwhile, which does no harm.
    """
    made: Future[LLMatcher] = Future()

    def run() -> None:
        try:
            made.set_result(work())
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            made.set_exception(error)

    thread = threading.Thread(target=run, name="weft-compile", daemon=True)
    with _STACK_LOCK:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return made.result()
