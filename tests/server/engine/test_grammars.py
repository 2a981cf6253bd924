"""Which grammars are refused before they are compiled, and with what words."""

from __future__ import annotations

import pytest

from weft.server.engine.grammars import MAX_RULES, InvalidGrammar, check_grammar


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('start: "a"\n  <eos>', "line 2: names the special token <eos>, and an answer's text has none"),
        ('start: <[5-7]> "a"', "line 1: names the special token <[5-7]>, and an answer's text has none"),
        ('%llguidance {"no_forcing": true}\nstart: "a"', "line 1: has %llguidance options, which are not supported"),
        (
            'start: x\nx[stop="c"]: /a*/',
            (
                "line 2: has the option stop, which is not supported: what it stops at would be missing from the rule "
                "and not from the answer; use suffix"
            ),
        ),
        (
            "start: x\nx[capture, max_tokens=3]: /a*/",
            "line 2: has the option max_tokens, which is not supported: tokens are not counted by a rule",
        ),
        (
            "start: x\nx[temperature=0.5]: /a*/",
            "line 2: has the option temperature, which is not supported: a rule has no temperature of its own",
        ),
        (
            'start: %json {"not": {}}',
            "line 1: has a schema that is refused: has the keyword 'not', which is not supported",
        ),
        (
            'start: %json {"a": 1, "a": 2}',
            "line 1: has a schema that is refused: has the key 'a' twice in one object",
        ),
        (
            "start: %json {",
            (
                "line 1: has a schema that is not JSON: Expecting property name enclosed in double quotes: line 1 "
                "column 15 (char 14)"
            ),
        ),
        ("start: %json " + "[" * 100_000, "line 1: has a schema that is nested too deeply"),
        (
            "\n".join(f"r{i}: r{i + 1}" for i in range(MAX_RULES + 1)),
            f"line {MAX_RULES + 1}: is rule {MAX_RULES + 1}; at most {MAX_RULES} are taken",
        ),
    ],
)
def test_what_an_answer_could_not_keep_to_is_refused(text: str, reason: str) -> None:
    with pytest.raises(InvalidGrammar) as caught:
        check_grammar(text)
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    "text",
    [
        'start: "<eos>" | /<eos>/ | "%llguidance" // <eos> %llguidance\n# <eos>',
        'start: stop temperature\nstop: "a"\ntemperature: [stop] "b"i\n',
        'start: A\nA[suffix="x", lazy]: /\\/[^\\/]*/ & ~/b/\n%ignore /[ \\t]+/\n%import common.INT',
        'start: "x" %json {"type": "object", "properties": {"a": {"const": "} <eos>"}}} "y"',
    ],
)
def test_what_only_looks_like_it_is_not(text: str) -> None:
    check_grammar(text)
