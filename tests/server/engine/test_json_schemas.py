"""Which JSON schemas are refused before they are compiled, and with what words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from weft.server.engine.json_schemas import MAX_DEPTH, InvalidSchema, check_schema, parse_schema


def refusal(schema: Any) -> str:
    with pytest.raises(InvalidSchema) as caught:
        check_schema(parse_schema(schema if isinstance(schema, str) else json.dumps(schema)))
    return str(caught.value)


@pytest.mark.parametrize(
    "keyword",
    [
        *("not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames"),
        *("dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems"),
        *("$dynamicRef", "$recursiveRef", "nullable", "minimun", "x-guidance"),
    ],
)
def test_a_keyword_that_would_be_ignored_is_refused_with_its_place(keyword: str) -> None:
    schema = {"type": "object", "properties": {"a/b": {"items": [{"anyOf": [{keyword: True}]}]}}}
    place = "/properties/a~1b/items/0/anyOf/0"
    assert refusal(schema) == f"at {place}: has the keyword {keyword!r}, which is not supported"


def test_annotations_and_extensions_are_no_constraints() -> None:
    annotations = {"title": "t", "description": "d", "default": {"not": 1}, "examples": [3], "$comment": "c"}
    flags = {"deprecated": True, "readOnly": False, "writeOnly": False, "contentMediaType": "text/plain", "x-mine": 1}
    check_schema({**annotations, **flags, "$defs": {"unused": {"type": "string"}}, "const": {"not": {}}})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ('{"type": "string", "type": "integer"}', "has the key 'type' twice in one object"),
        ('{"minimum": NaN}', "is not JSON: NaN is no JSON number"),
        ("[]", "must be an object or a boolean"),
        ('{"properties": {"a": 1}}', "at /properties/a: must be an object or a boolean"),
        ('{"properties": []}', "at /properties: must be an object"),
        ('{"anyOf": {}}', "at /anyOf: must be an array"),
        ('{"$ref": "#/default", "default": {}}', "at /$ref: is '#/default', where no schema is"),
        ('{"$ref": 3}', "at /$ref: must be a string"),
        (
            '{"minProperties": 2}',
            "at /minProperties: is 2; above 1 it is supported only where as many keys are required",
        ),
        (
            '{"prefixItems": [{}], "additionalItems": false}',
            "has additionalItems without an array of items, where it means nothing",
        ),
        ("[" * 100_000, "is nested too deeply; at most 128 schemas inside each other are taken"),
        (
            '{"items":' * 129 + "{}" + "}" * 129,
            "is nested too deeply; at most 128 schemas inside each other are taken",
        ),
    ],
)
def test_what_is_no_schema_is_refused(text: str, reason: str) -> None:
    assert refusal(text) == reason


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
        {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
        {"type": "object", "required": ["next"], "additionalProperties": {"$ref": "#"}},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}},
    ],
)
def test_a_schema_that_never_ends_is_refused(schema: Any) -> None:
    assert refusal(schema) == "refers to itself without an end: no value matches it"


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        {"type": "object", "properties": {"next": {"$ref": "#"}}},
        {"type": "array", "items": {"$ref": "#"}},
        {"$ref": "#end", "$defs": {"a": {"$anchor": "end", "type": "integer"}}},
    ],
)
def test_a_schema_that_may_end_is_not(schema: Any) -> None:
    check_schema(schema)


def test_references_are_followed_so_deep_and_no_deeper() -> None:
    def chain(links: int) -> Any:
        defs = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(links)}
        return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{links}": {"type": "null"}}}

    check_schema(chain(MAX_DEPTH // 2 - 2))
    assert f"at most {MAX_DEPTH} are taken" in refusal(chain(MAX_DEPTH // 2))
    hidden = chain(MAX_DEPTH // 2)
    hidden["$defs"]["d0"]["$id"] = "http://example.org/d0"  # where references begin anew, each may mean any
    assert f"at most {MAX_DEPTH} are taken" in refusal(hidden)


@pytest.mark.parametrize(
    "schema",
    [
        {"const": "a\x00"},
        {"enum": [[{"\x1f": 1}]]},
        {"properties": {"\x01": {}}},
        {"pattern": "^a\\x00$"},
        {"pattern": "[\\u0007]"},
        {"pattern": "a\\vb"},
        {"patternProperties": {"\\x0b": {}}},
    ],
)
def test_control_characters_that_answers_do_not_have_are_refused(schema: Any) -> None:
    assert "names a control character" in refusal(schema)


@pytest.mark.parametrize(
    "schema", [{"const": "a\n\t\r\b\f"}, {"pattern": "[^\\x00-\\x1f]\\n\\x41"}, {"pattern": "\\\\x00"}]
)
def test_other_characters_are_taken(schema: Any) -> None:
    check_schema(schema)
