"""Three libraries for constrained output behind one seam: how right they are, and how fast.

Those that are not installed are left out: pip install xgrammar==0.2.8 outlines-core==0.2.14
"""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from report import Samples

FILE_LIMIT_S = 10.0
"""For all cases of one file of the test suite; one that takes longer counts as not compiled."""

_FORK = multiprocessing.get_context("fork")
_LONGEST = 16

SCHEMAS: Mapping[str, tuple[Any, Any]] = {
    "record": (
        {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "age": {"type": "integer"},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["name", "age", "tags"],
            "additionalProperties": False,
        },
        {"name": "Ada Lovelace", "age": 36, "tags": ["mathematics", "computing", "poetry"]},
    ),
    "tool call": (
        {
            "type": "object",
            "properties": {
                "name": {"enum": ["search", "open", "close"]},
                "query": {"type": "string", "maxLength": 200},
                "limit": {"type": "integer", "minimum": 1, "maximum": 100},
                "filters": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {
                            "field": {"type": "string"},
                            "op": {"enum": ["eq", "lt", "gt"]},
                            "value": {"anyOf": [{"type": "string"}, {"type": "number"}]},
                        },
                        "required": ["field", "op", "value"],
                        "additionalProperties": False,
                    },
                },
            },
            "required": ["name", "query", "limit", "filters"],
            "additionalProperties": False,
        },
        {
            "name": "search",
            "query": "the history of weaving in Flanders",
            "limit": 25,
            "filters": [{"field": "year", "op": "lt", "value": 1700}, {"field": "language", "op": "eq", "value": "nl"}],
        },
    ),
}
REGEXES: Mapping[str, tuple[str, str]] = {
    "date": (r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])", "2026-11-25"),
    "sentence": (r"[A-Z][a-z ,]{10,120}\.", "The weft is drawn through the warp, and one pass carries many threads."),
}


class LlGuidance:
    """The way Weft uses it, but without Weft's own checks."""

    package = "llguidance"

    def __init__(self, vocabulary: Sequence[bytes], eos: int) -> None:
        import llguidance  # noqa: PLC0415 - each is imported where it is measured

        class Tokenizer:
            eos_token_id = eos
            bos_token_id = None
            tokens = vocabulary
            special_token_ids = (eos,)

            def __call__(self, text: bytes | str) -> list[int]:
                return list(text.encode() if isinstance(text, str) else text)

        self._matcher = llguidance.LLMatcher
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Tokenizer()))

    def schema(self, text: str) -> Any:
        return self._compile(self._matcher.grammar_from_json_schema(text))

    def regex(self, text: str) -> Any:
        return self._compile(self._matcher.grammar_from_regex(text))

    def _compile(self, grammar: str) -> Any:
        compiled = self._matcher(self._tokenizer, grammar, log_level=0)
        if compiled.is_error():
            raise ValueError(compiled.get_error())
        return compiled

    def matcher(self, compiled: Any) -> Any:
        return compiled.deep_copy()

    def fill(self, matcher: Any, mask: torch.Tensor) -> None:
        matcher.unsafe_compute_mask_ptr(mask.data_ptr(), mask.nbytes)

    def accept(self, matcher: Any, token: int) -> bool:
        return bool(matcher.consume_token(token))

    def is_complete(self, matcher: Any) -> bool:
        return bool(matcher.is_accepting())


class XGrammar:
    package = "xgrammar"

    def __init__(self, vocabulary: Sequence[bytes], eos: int) -> None:
        import xgrammar  # noqa: PLC0415

        kind = xgrammar.VocabType.RAW
        info = xgrammar.TokenizerInfo(list(vocabulary), kind, vocab_size=len(vocabulary), stop_token_ids=[eos])
        self._eos = eos
        self._matcher = xgrammar.GrammarMatcher
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def schema(self, text: str) -> Any:
        return self._compiler.compile_json_schema(text, strict_mode=False)

    def regex(self, text: str) -> Any:
        return self._compiler.compile_regex(text)

    def matcher(self, compiled: Any) -> Any:
        return self._matcher(compiled)

    def fill(self, matcher: Any, mask: torch.Tensor) -> None:
        matcher.fill_next_token_bitmask(mask[None])

    def accept(self, matcher: Any, token: int) -> bool:
        return bool(matcher.accept_token(token))

    def is_complete(self, matcher: Any) -> bool:
        return bool(matcher.accept_token(self._eos))


class OutlinesCore:
    package = "outlines-core"

    def __init__(self, vocabulary: Sequence[bytes], eos: int) -> None:
        import outlines_core  # noqa: PLC0415

        ids: dict[bytes, list[int]] = {}
        for token, text in enumerate(vocabulary):
            if token != eos:
                ids.setdefault(text, []).append(token)
        self._eos = eos
        self._core = outlines_core
        self._vocabulary = outlines_core.Vocabulary(eos, ids)

    def schema(self, text: str) -> Any:
        return self.regex(self._core.json_schema.build_regex_from_schema(text))

    def regex(self, text: str) -> Any:
        return self._core.Index(text, self._vocabulary)

    def matcher(self, compiled: Any) -> Any:
        return self._core.Guide(compiled)

    def fill(self, matcher: Any, mask: torch.Tensor) -> None:
        matcher.write_mask_into(mask.data_ptr(), mask.numel(), mask.element_size())

    def accept(self, matcher: Any, token: int) -> bool:
        try:
            matcher.advance(token, False)
        except ValueError:
            return False
        return True

    def is_complete(self, matcher: Any) -> bool:
        return self._eos in matcher.get_tokens()


Library = LlGuidance | XGrammar | OutlinesCore
LIBRARIES: Mapping[str, type[Library]] = {kind.package: kind for kind in (LlGuidance, XGrammar, OutlinesCore)}


def installed() -> Iterator[str]:
    """The libraries that are there, as `name version`."""
    for name in LIBRARIES:
        if find_spec(name.replace("-", "_")) is not None:
            try:
                yield f"{name} {version(name)}"
            except PackageNotFoundError:
                yield name


def fetch_suite(folder: Path) -> Path:
    """JSON-Schema-Test-Suite, draft 2020-12, from the source package of `jsonschema`, which pip fetches."""
    command = [
        "-m",
        "pip",
        "download",
        "--no-binary",
        ":all:",
        "--no-deps",
        "--dest",
        str(folder),
        "jsonschema==4.26.0",
    ]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    (archive,) = folder.glob("jsonschema-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return next(folder.glob("jsonschema-*/json/tests/draft2020-12"))


def check_suite(name: str, suite: Path) -> Counter[str]:
    """How many schemas and cases of the suite went which way; each file in a process of its own."""
    counts: Counter[str] = Counter()
    for file in sorted(suite.glob("*.json")):
        receiver, sender = _FORK.Pipe(duplex=False)
        process = _FORK.Process(target=_send_file, args=(sender, name, file))
        process.start()
        sender.close()
        found: Counter[str] | None = None
        with suppress(EOFError):  # where it crashed
            found = receiver.recv() if receiver.poll(FILE_LIMIT_S) else None
        if found is None:
            found = Counter({"schemas refused": len(json.loads(file.read_text())), "files that failed": 1})
        counts.update(found)
        process.kill()
        process.join()
    return counts


def _send_file(sender: Connection, name: str, file: Path) -> None:
    sender.send(check_file(name, file))


def check_file(name: str, file: Path) -> Counter[str]:
    library = LIBRARIES[name]([bytes([byte]) for byte in range(256)] + [b"<eos>"], 256)
    counts: Counter[str] = Counter()
    for case in json.loads(file.read_text()):
        try:
            compiled = library.schema(json.dumps(case["schema"]))
        except Exception:  # noqa: BLE001 - each library has errors of its own
            counts["schemas refused"] += 1
            continue
        counts["schemas compiled"] += 1
        for test in case["tests"]:
            text = json.dumps(test["data"], separators=(",", ":"), ensure_ascii=False)
            accepted = _accepts(library, compiled, text.encode("utf-8", "surrogatepass"))
            counts[f"{'valid' if test['valid'] else 'invalid'} {'accepted' if accepted else 'refused'}"] += 1
    return counts


def _accepts(library: Library, compiled: Any, text: bytes) -> bool:
    matcher = library.matcher(compiled)
    return all(library.accept(matcher, byte) for byte in text) and library.is_complete(matcher)


def make_vocabulary(size: int) -> list[bytes]:
    """Bytes, then the commonest words and parts of words of Python's own library, then the end."""
    counts: Counter[bytes] = Counter()
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(
        file
        for folder in (".", "asyncio", "email", "unittest", "encodings")
        for file in (library / folder).glob("*.py")
    ):
        words = Counter(re.findall(rb" ?[A-Za-z_]+| ?[0-9]{1,3}| ?[^\sA-Za-z_0-9]+|\s+", file.read_bytes()))
        for word, times in words.items():
            for end in range(2, min(len(word), _LONGEST) + 1):
                counts[word[:end]] += times
            for start in range(1, len(word) - 1):
                counts[word[start : start + _LONGEST]] += times
    common = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    tokens = [*(bytes([byte]) for byte in range(256)), *common[: size - 257]]
    assert len(tokens) == size - 1, "the library has too few words"
    return [*tokens, b"<eos>"]


def tokenize(ids: Mapping[bytes, int], text: bytes) -> Iterator[int]:
    """The longest token first."""
    at = 0
    while at < len(text):
        word = next(word for n in range(_LONGEST, 0, -1) if (word := text[at : at + n]) in ids)
        at += len(word)
        yield ids[word]


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds to compile, and for the mask and the acceptance of each token of one answer."""

    compile_s: float
    tokens_s: Samples


def measure_speed(name: str, size: int) -> dict[str, Speed | None]:
    """By constraint; None where it took no such constraint."""
    vocabulary = make_vocabulary(size)
    library = LIBRARIES[name](vocabulary, size - 1)
    ids = {word: token for token, word in enumerate(vocabulary[:-1])}
    asked: dict[str, tuple[Callable[[str], Any], str, str]] = {
        title: (library.schema, json.dumps(schema), json.dumps(value, separators=(",", ":")))
        for title, (schema, value) in SCHEMAS.items()
    }
    asked |= {title: (library.regex, regex, text) for title, (regex, text) in REGEXES.items()}
    return {
        title: _measure(library, compile_one, constraint, list(tokenize(ids, text.encode())), size)
        for title, (compile_one, constraint, text) in asked.items()
    }


def _measure(
    library: Library, compile_one: Callable[[str], Any], constraint: str, tokens: Sequence[int], size: int
) -> Speed | None:
    start = time.perf_counter()
    compiled = compile_one(constraint)
    compile_s = time.perf_counter() - start
    mask = torch.zeros(-(-size // 32), dtype=torch.int32)
    matcher = library.matcher(compiled)
    samples = Samples()
    for token in tokens:
        start = time.perf_counter()
        library.fill(matcher, mask)
        accepted = library.accept(matcher, token)
        samples.values.append(time.perf_counter() - start)
        if not accepted:
            return None
    return Speed(compile_s, samples)
