"""Prompts to token ids: what tokenizer.json asks for besides is not done."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tiny import save_tokenizer
from tokenizers import processors
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


def test_an_input_is_cut_only_where_that_is_asked_for_and_keeps_what_is_put_behind_it(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    around = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)])
    tokenizer.backend_tokenizer.post_processor = around
    served, text = Prompts(tokenizer), "a" * 20
    letter = tokenizer("a", add_special_tokens=False)["input_ids"][0]

    def cut(longest: int, **fields: object) -> tuple[list[int], int]:
        return asyncio.run(served.encode_input(pb2.ClassifyRequest(**fields), longest))

    whole = [1, *[letter] * 20, 2]
    assert cut(22, text=text) == (whole, 0)
    assert cut(64, text=text, truncate=0) == (whole, 0)
    assert cut(64, text=text, truncate=9) == ([1, *[letter] * 7, 2], 13)
    assert cut(5, text=text, truncate=9) == cut(5, text=text, truncate=0) == ([1, *[letter] * 3, 2], 17)
    assert cut(64, text=text, truncate=1) == ([2], 21)
    assert cut(5, token_ids=pb2.TokenIds(ids=whole), truncate=0) == (whole[:5], 17)
    with pytest.raises(InvalidRequest, match="text: has 22 tokens; at most 21 fit: set truncate"):
        cut(21, text=text)
