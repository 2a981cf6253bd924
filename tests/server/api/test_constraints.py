"""Constraints over real gRPC: what comes back, and how bad ones are refused while others run on."""

from __future__ import annotations

import json
import re
from typing import Any

import grpc
import pytest
from house import ENDLESS, House, generate, refusal, stream

from weft.v1 import inference_pb2 as pb2
from weft.v1 import server_pb2

PROMPT = {"token_ids": {"ids": [5, 6, 7]}}
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"word": {"type": "string", "maxLength": 3}, "count": {"type": "integer", "maximum": 9}},
        "required": ["word", "count"],
        "additionalProperties": False,
    }
)
GRAMMAR = 'start: WORD ("," WORD){2}\nWORD: /[a-z]{1,4}/'

FIELDS: dict[str, dict[str, Any]] = {
    "json_schema": {"json_schema": SCHEMA},
    "regex": {"regex": "[0-9]{3}(-[0-9]{2}){2}"},
    "grammar": {"grammar": GRAMMAR},
    "choice": {"choice": {"options": ["left", "right", "日本"]}},
}


def matches(field: str, text: str) -> bool:
    match field:
        case "json_schema":
            value = json.loads(text)
            return set(value) == {"word", "count"} and len(value["word"]) <= 3 and value["count"] <= 9
        case "regex":
            return re.fullmatch("[0-9]{3}(-[0-9]{2}){2}", text) is not None
        case "grammar":
            return re.fullmatch("[a-z]{1,4}(,[a-z]{1,4}){2}", text) is not None
        case _:
            return text in {"left", "right", "日本"}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("adapter_id", ["", "one"])
def test_an_answer_keeps_to_its_constraint(house: House, field: str, adapter_id: str) -> None:
    fields: dict[str, Any] = {**PROMPT, **FIELDS[field], "adapter_id": adapter_id, "n": 3}
    sampling = {"temperature": 1.5, "seed": 4, "logit_bias": {5: 4.0, 29: 4.0}}  # `"` and `:` sooner than later
    whole = house.inference.Generate(generate(sampling=sampling, **fields))
    answers = [whole, *whole.alternatives]
    assert len(answers) == 3
    for answer in answers:
        assert answer.finish_reason == pb2.FINISH_REASON_STOP_TOKEN
        assert matches(field, answer.text)
    parts = list(house.inference.StreamGenerate(stream(sampling=sampling, **fields)))
    for index, answer in enumerate(answers):
        assert "".join(part.text for part in parts if part.index == index) == answer.text


BAD: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "no JSON": ({"json_schema": "{"}, {"json_schema": "is not JSON: "}),
    "no schema": ({"json_schema": "[1]"}, {"json_schema": "must be an object or a boolean"}),
    "an unknown keyword": (
        {"json_schema": '{"properties": {"a": {"uniqueItems": true}}}'},
        {"json_schema": "at /properties/a: has the keyword 'uniqueItems', which is not supported"},
    ),
    "an impossible schema": (
        {"json_schema": '{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}'},
        {"json_schema": "refers to itself without an end: no value matches it"},
    ),
    "a remote reference": (
        {"json_schema": '{"$ref": "http://127.0.0.1:1/x"}'},
        {"json_schema": "Resource 'http://127.0.0.1:1/x' is not present"},
    ),
    "a bad pattern": ({"regex": "a("}, {"regex": "unclosed group"}),
    "a catastrophe": ({"regex": "((a{0,1000}){0,1000}){0,1000}" * 2000}, {"regex": ""}),
    "a bad grammar": ({"grammar": "start: other"}, {"grammar": 'at 1(8): unknown name: "other"'}),
    "no choice": ({"choice": {}}, {"choice.options": "has 0 entries; must have from 1 to 1024"}),
    "too much choice": (
        {"choice": {"options": ["x"] * 100_000}},
        {"choice.options": "has 100000 entries; must have from 1 to 1024"},
    ),
    "long choices": (
        {"choice": {"options": ["é" * 16384, "é" * 16385]}},
        {"choice.options": "has 65538 bytes; at most 65536 are taken"},
    ),
    "an empty schema": ({"json_schema": ""}, {"json_schema": "is empty; leave it out for an answer of any kind"}),
    "an empty pattern": ({"regex": ""}, {"regex": "is empty; leave it out for an answer of any kind"}),
    "a book of a schema": (
        {"json_schema": '{"title": "' + "x" * 65536 + '"}'},
        {"json_schema": "has 65549 bytes; at most 65536 are taken"},
    ),
    "no end": (
        {"regex": "a", "stopping": {"ignore_eos": True}},
        {"stopping.ignore_eos": "is true, but regex says where the answer ends; choose one"},
    ),
    "another end": (
        {"choice": {"options": ["a"]}, "stopping": {"stop_token_ids": [5]}},
        {"stopping.stop_token_ids": "is set, but choice says where the answer ends: leave it out, or use stop_seq"},
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_constraint_is_refused_with_its_field_and_the_batch_does_not_notice(house: House, case: str) -> None:
    fields, expected = BAD[case]
    stopping = {"max_tokens": 40, "ignore_eos": True}
    alone = [token.id for token in house.inference.Generate(generate(stopping=stopping, **PROMPT)).tokens]
    beside = house.inference.StreamGenerate(stream(stopping=stopping, **PROMPT))
    tokens = [token.id for token in next(beside).tokens]
    refused = refusal(lambda: house.inference.Generate(generate(**PROMPT, **fields)))
    tokens += [token.id for part in beside for token in part.tokens]
    assert tokens == alone
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.violations.keys() == expected.keys()
    for path, description in expected.items():
        assert refused.violations[path].startswith(description)
        assert "\n" not in refused.violations[path]
    house.audit()


def test_all_that_is_wrong_is_told_at_once(house: House) -> None:
    request = generate(choice={}, sampling={"top_p": 2}, stopping={"ignore_eos": True}, **PROMPT)
    refused = refusal(lambda: house.inference.Generate(request))
    assert refused.violations.keys() == {"choice.options", "sampling.top_p", "stopping.ignore_eos"}


def test_one_that_turns_out_to_lead_nowhere_ends_with_its_field(house: House) -> None:
    request = generate(grammar='start: "a" b\nb: b "x"', **PROMPT)
    refused = refusal(lambda: house.inference.Generate(request))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.violations == {"grammar": "can't be followed any further: nothing can follow that would match"}
    house.audit()


def test_free_and_constrained_requests_answer_as_each_does_alone(house: House) -> None:
    stopping = {"max_tokens": 24}
    requests = [generate(stopping=stopping, adapter_id=name, **PROMPT) for name in ("", "one", "two")]
    requests += [generate(stopping=stopping, adapter_id="one", **PROMPT, **fields) for fields in FIELDS.values()]
    alone = [list(house.inference.Generate(request).tokens) for request in requests]
    calls = [house.inference.Generate.future(request) for request in requests]
    assert [list(call.result().tokens) for call in calls] == alone
    house.audit()


def test_a_client_that_leaves_a_constrained_answer_frees_it(house: House) -> None:
    call = house.inference.StreamGenerate(stream(regex="[a-z]*", stopping={"max_tokens": ENDLESS}, **PROMPT))
    next(call)
    call.cancel()
    house.audit()


def test_the_server_tells_what_it_takes(house: House) -> None:
    info = house.info.GetServerInfo(server_pb2.GetServerInfoRequest())
    assert info.limits.max_constraint_bytes == 65536
    assert {"json-schema", "regex", "grammar", "choice"} <= set(info.capabilities)
