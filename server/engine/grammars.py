"""Grammars before they are compiled: what would not mean what it says in an answer is refused, with its line.

Grammars are written as Lark's are (https://lark-parser.readthedocs.io), in the variant that llguidance reads.
"""

from __future__ import annotations

import re

from weft.server.engine.json_schemas import DECODER, InvalidSchema, check_schema
from weft.server.engine.regexes import check_regex

MAX_RULES = 512
"""The compiler follows rules into each other, so a chain of them takes as much of its stack as there are rules."""

_LEXEME = re.compile(
    r"""
      (?P<blank> \s+ | //[^\n]* | \#[^\n]* )
    | (?P<literal> "(?:\\.|[^"\\\n])*"i? | /(?:\\.|[^/\\\n])+/[a-z]* )
    | (?P<directive> %[a-z]+ )
    | (?P<special> <[^>\n]*> )
    | (?P<name> [!?]?[A-Za-z_][\w-]* )
    | (?P<other> . )
    """,
    re.VERBOSE | re.DOTALL,
)
_OPTIONS = {
    "max_tokens": "tokens are not counted by a rule",
    "stop": "what it stops at would be missing from the rule and not from the answer; use suffix",
    "temperature": "a rule has no temperature of its own",
}


class InvalidGrammar(ValueError):
    """Says on which line and what."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")


def check_grammar(text: str) -> None:
    """Raises InvalidGrammar for what the compiler takes and an answer could not keep to, and for what is too large.

    That is too many rules, or too many parts that may be missing, wherever they are: a terminal is an expression, too.
    """
    try:
        check_regex(text)
    except ValueError as error:
        raise InvalidGrammar(1, str(error)) from None
    at, num_rules, previous = 0, 0, ""
    while found := _LEXEME.match(text, at):
        kind, word, at = found.lastgroup, found.group(), found.end()
        if kind == "blank":
            continue
        num_rules += word == ":"
        if num_rules > MAX_RULES:
            raise InvalidGrammar(_line(text, at), f"is rule {num_rules}; at most {MAX_RULES} are taken")
        if kind == "directive":
            at = _after_directive(text, word, at)
        elif kind == "special":
            raise InvalidGrammar(_line(text, at), f"names the special token {word}, and an answer's text has none")
        elif word == "=" and previous in _OPTIONS:
            reason = _OPTIONS[previous]
            raise InvalidGrammar(_line(text, at), f"has the option {previous}, which is not supported: {reason}")
        previous = word


def _after_directive(text: str, word: str, at: int) -> int:
    """Where the text goes on after a directive and its JSON."""
    if word == "%llguidance":
        raise InvalidGrammar(_line(text, at), "has %llguidance options, which are not supported")
    if word != "%json":
        return at
    start = len(text) - len(text[at:].lstrip())
    try:
        schema, end = DECODER.raw_decode(text, start)
        check_schema(schema)
    except RecursionError:
        raise InvalidGrammar(_line(text, at), "has a schema that is nested too deeply") from None
    except InvalidSchema as error:
        raise InvalidGrammar(_line(text, at), f"has a schema that is refused: {error}") from None
    except ValueError as error:
        raise InvalidGrammar(_line(text, at), f"has a schema that is not JSON: {error}") from None
    return end


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
