"""Prompts to token ids: what tokenizer.json asks for besides is not done."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tiny import save_tokenizer
from transformers import AutoTokenizer

from weft.errors import InvalidRequest
from weft.server.api.prompts import Prompts
from weft.v1 import inference_pb2 as pb2


def prompts(folder: Path, chat_template: str | None = None) -> Prompts:
    save_tokenizer(folder, chat_template)
    return Prompts(AutoTokenizer.from_pretrained(folder))


def test_a_truncation_in_the_tokenizers_file_cuts_no_prompt(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    served = Prompts(tokenizer)

    async def main() -> list[list[int]]:
        requests = [pb2.TokenizeRequest(text="x" * length) for length in (1, 8, 1000) for _ in range(20)]
        return await asyncio.gather(*(served.encode(request) for request in requests))

    lengths = [len(ids) for ids in asyncio.run(main())]
    assert lengths == [1 + length for length in (1, 8, 1000) for _ in range(20)]


@pytest.mark.parametrize(
    "template", ["{{ messages[9].role }}", "{{ 1 / 0 }}", "{% if %}", "{{ messages | nothing }}", "{{ messages + 1 }}"]
)
def test_a_template_that_fails_is_the_requests_error(tmp_path: Path, template: str) -> None:
    chat = pb2.ChatPrompt(messages=[pb2.ChatMessage(role="user", content="hi")])
    with pytest.raises(InvalidRequest, match="chat template"):
        asyncio.run(prompts(tmp_path, template).encode(pb2.TokenizeRequest(chat=chat)))


def test_a_tokenizer_knows_whether_it_has_a_template(tmp_path: Path) -> None:
    assert prompts(tmp_path / "with", "{{ messages }}").has_chat_template
    assert not prompts(tmp_path / "without").has_chat_template
