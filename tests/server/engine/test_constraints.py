"""Constraints against plain readings of what they say, over tokenizers of every kind; and hostile ones."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from transformers import PreTrainedTokenizerBase
from vocabularies import TOKENIZERS, Vocabulary, byte_tokens

from weft.errors import InvalidRequest
from weft.server.engine.constraints import (
    MAX_DEBT_S,
    TOKEN_S,
    Compiler,
    Constraint,
    Kind,
    Matcher,
    Spec,
    UnsupportedTokenizer,
    constrain,
    make_vocabulary,
)
from weft.server.engine.grammars import MAX_RULES
from weft.server.engine.json_schemas import MAX_DEPTH

VOCABULARIES = {name: Vocabulary(tokenizer) for name, tokenizer in TOKENIZERS.items()}
BYTES = VOCABULARIES["bytes"]


@pytest.fixture(params=VOCABULARIES)
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return VOCABULARIES[request.param]


def accepts(vocabulary: Vocabulary, kind: Kind, text: str, *texts: str) -> bool:
    """Whether an answer of this text is let through token by token, and may end there."""
    matcher = vocabulary.compile(kind, *texts).matcher()
    for token in vocabulary.encode(text):
        if token not in vocabulary.allowed(matcher):
            return False
        matcher.accept(token)
    return vocabulary.eos in vocabulary.allowed(matcher)


def test_a_choice_is_one_of_its_options_to_the_letter(vocabulary: Vocabulary) -> None:
    options = ("yes", "yes, but", "no (.*) [a-z]+ \\d $", "日本 é\n\t", "{}|", "/a/")
    constraint = vocabulary.compile(Kind.CHOICE, *options)
    drawn = {vocabulary.draw(constraint, seed) for seed in range(40)}
    assert all(complete for _, complete in drawn)
    assert {text for text, _ in drawn} <= set(options)
    assert len(drawn) >= 4


REGEXES = [
    r"[0-9]{3}-[0-9]{4}",
    r"[A-Z][a-z]{2,10}( [A-Z][a-z]+)?\.",
    r"(?i)yes|no",
    r"[^a-c ]{3,6}",
    r"(ab?)+c",
    r"é+日?",
    r"a*",
]


@pytest.mark.parametrize("regex", REGEXES)
def test_an_answer_matches_its_regular_expression(vocabulary: Vocabulary, regex: str) -> None:
    constraint = vocabulary.compile(Kind.REGEX, regex)
    for seed in range(10):
        text, complete = vocabulary.draw(constraint, seed)
        assert complete
        assert re.fullmatch(regex, text), text


def test_an_answer_follows_its_grammar(vocabulary: Vocabulary) -> None:
    grammar = 'start: sum\nsum: (sum /[+-]/)? product\nproduct: (product "*")? atom\natom: /[0-9]{1,3}/ | "(" sum ")"'
    constraint = vocabulary.compile(Kind.GRAMMAR, grammar)
    ended = [text for text, complete in (vocabulary.draw(constraint, seed) for seed in range(20)) if complete]
    assert len(ended) >= 10
    for text in ended:
        assert re.fullmatch(r"[0-9()+*-]+", text)
        assert text.count("(") == text.count(")")
        assert not re.search(r"[+*-][)+*-]|\([)+*-]|^[+*-]|[+*-]$|\d\(|\)\d", text)


def test_the_end_may_come_exactly_where_the_answer_is_complete(vocabulary: Vocabulary) -> None:
    texts = {"a": True, "ab": True, "b": False, "abb": False, "": False}
    for text, complete in texts.items():
        assert accepts(vocabulary, Kind.REGEX, text, "ab?") is complete


def test_nothing_but_the_end_is_seen_at_once() -> None:
    matcher = BYTES.compile(Kind.CHOICE, "ab", "abc").matcher()
    for letter, over in (("a", False), ("b", False), ("c", True)):
        (token,) = BYTES.encode(letter)
        matcher.accept(token)
        assert matcher.is_over is over


VALUES: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(-999, 999), st.text(st.characters(exclude_categories=["C"]), max_size=6)
)


def leaves() -> st.SearchStrategy[dict[str, Any]]:
    low, size = st.integers(-300, 300), st.integers(0, 4)
    return st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["integer", "null"]}]),
        st.builds(lambda a, n: {"type": "integer", "minimum": a, "maximum": a + n}, low, st.integers(0, 500)),
        st.builds(lambda a: {"type": "integer", "exclusiveMinimum": a, "multipleOf": 7}, low),
        st.builds(
            lambda a, n: {"type": "number", "minimum": a / 8, "exclusiveMaximum": a / 8 + n}, low, st.integers(1, 9)
        ),
        st.builds(lambda a, n: {"type": "string", "minLength": a, "maxLength": a + n}, size, size),
        st.sampled_from(["^a+b$", "[0-9]{2}", "^(x|yy)*$", "é.?$", '"']).map(
            lambda pattern: {"type": "string", "pattern": pattern, "maxLength": 12}
        ),
        st.lists(VALUES, min_size=1, max_size=3).map(lambda values: {"enum": values}),
        VALUES.map(lambda value: {"const": {"deep": [value]}}),
    )


def branches(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(["a", "b c", 'q"\\', "é", "$ref", "a/b"])
    size = st.integers(0, 2)
    return st.one_of(
        st.builds(lambda i, a, n: {"type": "array", "items": i, "minItems": a, "maxItems": a + n}, inner, size, size),
        st.builds(lambda i, j: {"type": "array", "prefixItems": [i, j], "items": False, "minItems": 1}, inner, inner),
        st.builds(
            lambda properties, required, more: (
                {
                    "type": "object",
                    "properties": properties,
                    "required": [*properties][:required],
                    "additionalProperties": more,
                    "maxProperties": 6,
                }
                if required >= len(properties)
                else {
                    "type": "object",
                    "properties": properties,
                    "required": [*properties][:required],
                    "additionalProperties": more,
                }
            ),
            st.dictionaries(names, inner, max_size=3),
            st.integers(0, 3),
            st.one_of(st.just(False), inner),
        ),
        inner.map(lambda i: {"type": "object", "patternProperties": {"^a": i}, "additionalProperties": False}),
        st.builds(lambda i, j: {"anyOf": [i, j], "title": "either"}, inner, inner),
        inner.map(lambda i: {"allOf": [i], "description": "the same"}),
        inner.map(lambda i: {"$ref": "#/$defs/node", "$defs": {"node": i}}),
    )


SCHEMAS = st.recursive(leaves(), branches, max_leaves=6)


def without_definitions(schema: Any, root: dict[str, Any]) -> Any:
    """References are to the root's definitions: move them there, each under a name of its own."""
    if isinstance(schema, list):
        return [without_definitions(each, root) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("$ref") == "#/$defs/node" and "$defs" in schema:
        name = f"node{len(root)}"
        root[name] = None
        root[name] = without_definitions(schema["$defs"]["node"], root)
        return {"$ref": f"#/$defs/{name}"}
    return {key: without_definitions(value, root) for key, value in schema.items()}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SCHEMAS, st.sampled_from(sorted(VOCABULARIES)), st.integers(0, 99))
def test_an_answer_is_json_that_its_schema_holds_for(drawn: dict[str, Any], name: str, seed: int) -> None:
    definitions: dict[str, Any] = {}
    schema = {**without_definitions(drawn, definitions), "$defs": definitions}
    try:
        constraint = VOCABULARIES[name].compile(Kind.JSON_SCHEMA, json.dumps(schema))
    except InvalidRequest as error:
        event(f"refused: {str(error)[:60]}")
        return
    text, complete = VOCABULARIES[name].draw(constraint, seed)
    event("complete" if complete else "cut off")
    if complete:
        Draft202012Validator(schema).validate(json.loads(text))


def test_true_is_a_schema_for_any_value() -> None:
    for text in ("null", '{"a":[1,-2.5e3,"x"]}'):
        assert accepts(BYTES, Kind.JSON_SCHEMA, text, "true")


LIST = {"type": "object", "properties": {"value": {"type": "integer"}, "next": {"$ref": "#"}}, "required": ["value"]}


def test_a_schema_may_refer_to_itself(vocabulary: Vocabulary) -> None:
    text = json.dumps({"value": 1, "next": {"value": 2, "next": {"value": 3}}})
    schema = json.dumps({**LIST, "additionalProperties": False})
    assert accepts(vocabulary, Kind.JSON_SCHEMA, text, schema)
    assert not accepts(vocabulary, Kind.JSON_SCHEMA, text.replace("3", '"x"'), schema)


def test_json_may_be_indented_but_not_without_an_end() -> None:
    schema = '{"type": "array", "items": {"type": "integer"}}'
    assert accepts(BYTES, Kind.JSON_SCHEMA, json.dumps([1, 2], indent=8), schema)
    assert accepts(BYTES, Kind.JSON_SCHEMA, "[1,2]", schema)
    assert not accepts(BYTES, Kind.JSON_SCHEMA, "[" + " " * 60 + "1]", schema)
    assert not accepts(BYTES, Kind.JSON_SCHEMA, " [1]", schema)


def test_a_key_has_one_spelling() -> None:
    schema = '{"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": true}'
    assert accepts(BYTES, Kind.JSON_SCHEMA, '{"a":1,"b":"x"}', schema)
    assert not accepts(BYTES, Kind.JSON_SCHEMA, '{"\\u0061":"x"}', schema)


TOO_MANY = "has 1001 parts that may be missing or repeat (?, *, {}); at most 1000 are taken"


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        (Kind.REGEX, "a(b", "regex: unclosed group"),
        (Kind.REGEX, "a(?=b)", "regex: look-around, including look-ahead and look-behind, is not supported"),
        (Kind.REGEX, r"(a)\1", "regex: backreferences are not supported"),
        (Kind.REGEX, r"[^\s\S]", "regex: nothing can follow that would match"),
        (Kind.REGEX, "a?" * 1001, f"regex: {TOO_MANY}"),
        (Kind.REGEX, "(a|)" * 1001, f"regex: {TOO_MANY}"),
        (Kind.GRAMMAR, "start: A\nA: " + '"a"? ' * 1001, f"grammar: line 1: {TOO_MANY}"),
        (Kind.JSON_SCHEMA, json.dumps({"pattern": "a?" * 1001}), f"json_schema: has a pattern that {TOO_MANY}"),
        (Kind.GRAMMAR, "start: foo", 'grammar: at 1(8): unknown name: "foo"'),
        (Kind.GRAMMAR, "start: start", "grammar: nothing can follow that would match"),
        (Kind.GRAMMAR, 'rule: "a"', "grammar: no start rule found"),
        (Kind.JSON_SCHEMA, '{"type": "text"}', "json_schema: Invalid type: text"),
        (Kind.JSON_SCHEMA, '{"format": "idn-email"}', "json_schema: Unknown format: idn-email"),
        (Kind.JSON_SCHEMA, "false", "json_schema: is false: no value matches it"),
        (
            Kind.JSON_SCHEMA,
            '{"type": "integer", "minimum": 3, "maximum": 2}',
            "json_schema: Unsatisfiable schema: minimum (3) is greater than maximum (2)",
        ),
        (
            Kind.JSON_SCHEMA,
            '{"oneOf": [{}, {}]}',
            "json_schema: oneOf is supported only where the compiler can tell its options apart: use anyOf",
        ),
        (Kind.JSON_SCHEMA, '{"enum": ["\\ud800"]}', "json_schema: unexpected end of hex escape at line 1 column 18"),
    ],
)
def test_what_can_not_be_followed_is_refused_in_one_line(kind: Kind, text: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        BYTES.compile(kind, text)
    assert str(caught.value) == reason


@pytest.mark.parametrize("uri", ["http://127.0.0.1:1/schema", "file:///etc/hostname"])
def test_nothing_is_fetched_for_a_schema(uri: str) -> None:
    with pytest.raises(InvalidRequest, match="does not fetch"):
        BYTES.compile(Kind.JSON_SCHEMA, json.dumps({"$ref": uri}))


HOSTILE = {
    "nested repetition": (Kind.REGEX, "((a{0,100}){0,100}){0,100}"),
    "backtracking": (Kind.REGEX, "(x+x+)+y|" + "(.*a.{20}|.*b.{19}|.*c.{18}){1,50}"),
    "parentheses": (Kind.REGEX, "(" * 30_000 + ")" * 30_000),
    "alternatives": (Kind.REGEX, "|".join(f"{i:x}.*{i:o}" for i in range(4000))),
    "lookup tables": (Kind.REGEX, r"\p{L}{1,3000}" * 20),
    "rules": (Kind.GRAMMAR, "start: r1\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(1, 5000)) + '\nr5000: "a"'),
    "terminals": (
        Kind.GRAMMAR,
        "start: R1\n"
        + "\n".join(f'R{i}: "c"? R{i + 1} "b"' for i in range(1, MAX_RULES - 2))
        + f'\nR{MAX_RULES - 2}: "a"',
    ),
    "ambiguity": (Kind.GRAMMAR, 'start: a\na: a a | "x" | '),
    "intersection": (Kind.GRAMMAR, "start: A\nA: " + " & ".join(f"/(?s:.*){c}(?s:.{{12}})/" for c in "abcdefgh")),
    "brackets": (Kind.GRAMMAR, "start: " + "(" * 30_000),
    "references": (
        Kind.JSON_SCHEMA,
        json.dumps(
            {
                "$ref": "#/$defs/d0",
                "$defs": {
                    **{f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(MAX_DEPTH // 2 - 2)},
                    f"d{MAX_DEPTH // 2 - 2}": {"type": "null"},
                },
            }
        ),
    ),
    "products": (
        Kind.JSON_SCHEMA,
        json.dumps({"allOf": [{"anyOf": [{"properties": {f"{c}{i}": {}}} for c in "ab"]} for i in range(20)]}),
    ),
    "counts": (Kind.JSON_SCHEMA, '{"items": {"items": {"minItems": 60000}, "minItems": 60000}, "minItems": 60000}'),
    "properties": (
        Kind.JSON_SCHEMA,
        json.dumps({"properties": {f"p{i}": {"type": "integer", "maximum": i * 7919} for i in range(1200)}}),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_constraints_are_refused_or_followed_and_end_nothing_else(name: str) -> None:
    kind, text = HOSTILE[name]
    try:
        constraint = BYTES.compile(kind, text)
    except InvalidRequest as error:
        refusal = str(error)
    else:
        refusal = follow(constraint, 30)
    assert len(refusal) < 400
    assert "\n" not in refusal


def follow(constraint: Constraint, steps: int) -> str:
    """Why it can't be followed for so many tokens, or nothing."""
    matcher = constraint.matcher()
    for _ in range(steps):
        allowed = BYTES.allowed(matcher)
        if matcher.error is not None:
            assert not allowed
            return str(matcher.error)
        if allowed == [BYTES.eos]:
            break
        matcher.accept(max(allowed))
    return ""


AMBIGUOUS = 'start: a\na: a a | "x" | "xx" | a a a'
"""Each token can be read in more ways than the one before it."""


def test_an_ambiguous_grammar_ends_before_its_tokens_take_long() -> None:
    reason = follow(BYTES.compile(Kind.GRAMMAR, AMBIGUOUS), 1000)
    assert reason.startswith("grammar: can't be followed any further: ")


def test_a_mask_that_holds_too_much_is_told_at_its_token() -> None:
    names = [f"a{i}" for i in range(40)]
    readings = [f'{a}: {a} {b} | {b} {a} {a} | "x" | "xx"' for a, b in zip(names, names[1:] + names[:1], strict=True)]
    grammar = "\n".join(["start: /y{5}/ (" + "|".join(names) + ")", *readings])
    free = Compiler(make_vocabulary(BYTES.tokenizer, BYTES.size, [BYTES.eos]), clock=lambda: 0.0)
    reason = follow(free.compile(Spec(Kind.GRAMMAR, (grammar,))), 60)
    assert reason.startswith("grammar: can't be followed any further: ")
    assert "Too many items" in reason


class CostlyClock:
    """By which every mask takes so long, and so does every token that is taken."""

    def __init__(self, cost_s: float) -> None:
        self._now_s = 0.0
        self.cost_s = cost_s

    def __call__(self) -> float:
        """Read twice for each: before it and after."""
        self._now_s += self.cost_s
        return self._now_s


def matcher_at(clock: CostlyClock) -> Matcher:
    compiler = Compiler(make_vocabulary(BYTES.tokenizer, BYTES.size, [BYTES.eos]), clock)
    return compiler.compile(Spec(Kind.REGEX, ("x*",))).matcher()


def num_tokens(matcher: Matcher, most: int) -> int:
    """That can be told and taken before there is an error, up to so many."""
    (token,) = BYTES.encode("x")
    for taken in range(most):
        if token not in BYTES.allowed(matcher):
            return taken
        matcher.accept(token)
    return most


def test_an_answer_may_take_its_time_a_token_for_ever() -> None:
    matcher = matcher_at(CostlyClock(TOKEN_S / 2))
    assert num_tokens(matcher, 2000) == 2000
    assert matcher.error is None


def test_an_answer_that_takes_too_much_time_is_ended_for_good_and_says_why() -> None:
    clock = CostlyClock(TOKEN_S)
    matcher = matcher_at(clock)
    taken = num_tokens(matcher, 2000)
    assert taken == pytest.approx(MAX_DEBT_S / TOKEN_S, abs=2)
    clock.cost_s = 0.0
    assert num_tokens(matcher, 10) == 0
    assert not matcher.is_over
    assert str(matcher.error) == (
        "regex: can't be followed any further: its tokens take too much time to tell; "
        "one that reads a text in fewer ways takes less"
    )


def test_time_that_was_not_taken_is_not_saved() -> None:
    clock = CostlyClock(0.0)
    matcher = matcher_at(clock)
    assert num_tokens(matcher, 500) == 500
    clock.cost_s = TOKEN_S
    assert num_tokens(matcher, 2000) == pytest.approx(MAX_DEBT_S / TOKEN_S, abs=2)


def test_one_dear_token_is_paid_off_by_cheap_ones() -> None:
    clock = CostlyClock(0.0)
    matcher = matcher_at(clock)
    for _ in range(3):
        clock.cost_s = MAX_DEBT_S / 3
        assert num_tokens(matcher, 1) == 1
        clock.cost_s = 0.0
        assert num_tokens(matcher, 200) == 200


def test_columns_of_a_head_past_the_vocabulary_are_never_allowed() -> None:
    matcher = BYTES.compile(Kind.REGEX, "[^a]+").matcher()
    scores = torch.zeros(1, BYTES.size + 70)
    constrain(scores, [0], [matcher])
    assert (scores[0] > float("-inf")).nonzero()[:, 0].tolist() == BYTES.allowed(matcher)


def test_a_dead_end_is_told_and_lets_nothing_follow() -> None:
    matcher = BYTES.compile(Kind.GRAMMAR, 'start: "a" b\nb: b "x"').matcher()
    (token,) = BYTES.encode("a")
    matcher.accept(token)
    assert BYTES.allowed(matcher) == []
    assert str(matcher.error) == "grammar: can't be followed any further: nothing can follow that would match"
    assert not matcher.is_over


def test_tokenizers_that_can_not_be_followed_are_refused_by_name() -> None:
    tokenizer = byte_tokens()
    with pytest.raises(UnsupportedTokenizer, match="no token that ends an answer"):
        make_vocabulary(tokenizer, 300, [])
    with pytest.raises(UnsupportedTokenizer, match="PreTrainedTokenizerBase is none of the tokenizers library"):
        make_vocabulary(PreTrainedTokenizerBase(), 300, [2])
    with pytest.raises(InvalidRequest, match="regex: can't be followed with this model's tokenizer: it is odd"):
        Compiler(UnsupportedTokenizer("it is odd")).compile(Spec(Kind.REGEX, ("a",)))


def test_ids_without_text_and_special_tokens_are_never_allowed(vocabulary: Vocabulary) -> None:
    allowed = vocabulary.allowed(vocabulary.compile(Kind.REGEX, "(?s:.{5,})").matcher())
    assert not set(allowed) & {
        *vocabulary.tokenizer.all_special_ids,
        *range(len(vocabulary.tokenizer), vocabulary.size),
    }
    assert len(allowed) > 100
