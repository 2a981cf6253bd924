"""Answers that the data leaves to the teacher: written by it, greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from weft.making.config import Columns
from weft.making.examples import Encoder, Form
from weft.making.rows import Row

_BATCH = 8


@torch.inference_mode()
def write_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], max_tokens: int
) -> list[str]:
    """What a model of transformers, or one with an adapter by peft, says to each prompt."""
    texts: list[str] = []
    for start in range(0, len(prompts), _BATCH):
        part = prompts[start : start + _BATCH]
        longest = max(map(len, part))
        ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(each)) + each for each in part])
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in part])
        made = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts += tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)
    return texts


def with_answers(
    rows: Sequence[Row],
    form: Form,
    columns: Columns,
    encoder: Encoder,
    write: Callable[[Sequence[list[int]]], list[str]],
) -> list[Row]:
    """The rows, with answers where they had none. `write` is asked only if there are such."""
    lacking = [place for place, row in enumerate(rows) if not _has_answer(row, form, columns)]
    found = list(rows)
    if lacking:
        texts = write([encoder.question(rows[place], form) for place in lacking])
        for place, text in zip(lacking, texts, strict=True):
            found[place] = _answered(rows[place], form, columns, text)
    return found


def _has_answer(row: Row, form: Form, columns: Columns) -> bool:
    if form == "prompt":
        return row.values.get(columns.completion) is not None
    messages = row.values.get(columns.messages)
    return not isinstance(messages, list) or any(
        isinstance(message, dict) and message.get("role") == "assistant" for message in messages
    )


def _answered(row: Row, form: Form, columns: Columns, text: str) -> Row:
    if form == "prompt":
        return replace(row, values={**row.values, columns.completion: text})
    messages = [*row.values[columns.messages], {"role": "assistant", "content": text}]
    return replace(row, values={**row.values, columns.messages: messages})
