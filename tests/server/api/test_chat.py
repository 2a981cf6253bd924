"""Conversations: what the template gets of them, and what is refused because it would not get there."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from house import MAX_PROMPT_BYTES, House, generate, refusal
from tiny import save_tokenizer
from transformers import AutoTokenizer

from weft.errors import InvalidRequest
from weft.server.api.prompts import Prompts
from weft.v1 import inference_pb2 as pb2

USER = {"role": "user", "content": "hi"}
CALL = {"role": "assistant", "tool_calls": '[{"name": "look"}, {"name": "go"}]'}
DEEP = "[" * 2000 + "]" * 2000


def laid_out(house: House, **chat: Any) -> str:
    ids = house.inference.Tokenize(pb2.TokenizeRequest(chat=chat)).token_ids
    return str(house.inference.Detokenize(pb2.DetokenizeRequest(token_ids=ids)).text)


@pytest.mark.parametrize(
    ("chat", "expected"),
    [
        ({"messages": [USER], "tools": ['{"name": "é"}', '{"name": "b"}']}, "[é][b]<user>hi</><assistant>"),
        ({"messages": [USER, CALL]}, "<user>hi</><assistant>!look!go</><assistant>"),
        (
            {"messages": [{"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"}]},
            "<tool:add#c1>3</><assistant>",
        ),
        ({"messages": [USER], "template_variables": '{"mood": "good"}'}, "(good)<user>hi</><assistant>"),
        ({"messages": [USER], "template_variables": '{"mood": [1, null]}'}, "([1, None])<user>hi</><assistant>"),
        ({"messages": [USER], "template_variables": "{}"}, "<user>hi</><assistant>"),
    ],
)
def test_the_template_gets_what_is_set(house: House, chat: dict[str, Any], expected: str) -> None:
    assert laid_out(house, **chat) == expected


def test_the_answer_continues_the_final_message(house: House) -> None:
    begun = {"messages": [USER, {"role": "assistant", "content": "yes, "}], "continue_final_message": True}
    assert laid_out(house, **begun) == "<user>hi</><assistant>yes, "


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": ["{"]}, "chat.tools[0]", "is not JSON that can be read"),
    ({"tools": ["{}", "[]"]}, "chat.tools[1]", "is JSON, but no object"),
    ({"tools": ['{"a": NaN}']}, "chat.tools[0]", "NaN is no JSON value"),
    ({"tools": ["{}"] * 129}, "chat.tools", "has 129 entries; at most 128"),
    ({"messages": [{**CALL, "tool_calls": "{}"}]}, "chat.messages[0].tool_calls", "is JSON, but no array"),
    ({"messages": [USER, {**CALL, "tool_calls": DEEP}]}, "chat.messages[1].tool_calls", "RecursionError"),
    ({"template_variables": "[]"}, "chat.template_variables", "is JSON, but no object"),
    ({"template_variables": '{"colour": 1}'}, "chat.template_variables", "does not read"),
    ({"template_variables": '{"chat_template": "{{ 1 }}"}'}, "chat.template_variables", "sets 'chat_template'"),
    ({"template_variables": '{"messages": []}'}, "chat.template_variables", "sets 'messages'"),
    ({"template_variables": '{"bos_token": ""}'}, "chat.template_variables", "sets 'bos_token'"),
    ({"template_variables": '{"mood": "\\ud800"}'}, "chat.template_variables", "surrogates"),
    ({"messages": [{"role": "u" * (MAX_PROMPT_BYTES + 1)}]}, "chat", "bytes; at most 4096"),
    ({"messages": [{**USER, "name": "n" * MAX_PROMPT_BYTES}]}, "chat", "bytes; at most 4096"),
    ({"tools": ['{"a": "' + "x" * MAX_PROMPT_BYTES + '"}']}, "chat", "bytes; at most 4096"),
]


@pytest.mark.parametrize(("chat", "path", "words"), BAD)
def test_what_is_wrong_is_named(house: House, chat: dict[str, Any], path: str, words: str) -> None:
    for call in (
        lambda: house.inference.Generate(generate(chat={"messages": [USER], **chat})),
        lambda: house.inference.Tokenize(pb2.TokenizeRequest(chat={"messages": [USER], **chat})),
    ):
        refused = refusal(call)
        assert list(refused.violations) == [path]
        assert words in refused.violations[path]


def test_all_json_that_is_wrong_is_listed(house: House) -> None:
    chat = {"messages": [{**CALL, "tool_calls": "1"}], "tools": ["{", "{}", "0"], "template_variables": "x"}
    refused = refusal(lambda: house.inference.Generate(generate(chat=chat)))
    assert set(refused.violations) == {
        "chat.messages[0].tool_calls",
        "chat.tools[0]",
        "chat.tools[2]",
        "chat.template_variables",
    }


def test_what_a_template_does_not_read_is_refused_rather_than_dropped(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}")
    prompts = Prompts(AutoTokenizer.from_pretrained(tmp_path))
    for fields, path in (
        ({"messages": [USER], "tools": ["{}"]}, "chat.tools"),
        ({"messages": [USER, CALL]}, r"chat.messages\[1\].tool_calls"),
        ({"messages": [{**USER, "tool_call_id": "1"}]}, r"chat.messages\[0\].tool_call_id"),
        ({"messages": [USER, {**USER, "name": "Ada"}]}, r"chat.messages\[1\].name"),
        ({"messages": [USER], "template_variables": '{"mood": 1}'}, "chat.template_variables"),
    ):
        with pytest.raises(InvalidRequest, match=f"{path}: gives '.*', which this model's chat template does not read"):
            asyncio.run(prompts.encode(pb2.TokenizeRequest(chat=fields)))


def test_a_template_for_tools_is_used_where_there_is_one(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = {"default": "plain", "tool_use": "{{ tools[0].name }}"}
    prompts = Prompts(tokenizer)

    def text(**fields: Any) -> str:
        request = pb2.TokenizeRequest(chat={"messages": [USER], **fields})
        return str(tokenizer.decode(asyncio.run(prompts.encode(request))))

    assert text() == "plain"
    assert text(tools=['{"name": "look"}']) == "look"
