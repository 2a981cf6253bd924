"""Rows as token ids: only answers are learnt, and a row that is wrong is named by file and line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tokenizer
from transformers import PreTrainedTokenizerBase

from weft.errors import InvalidConfig, InvalidData
from weft.making.config import Columns, DataConfig, Task
from weft.making.examples import IGNORED, Encoder, find_labels, form_of
from weft.making.loading import load_tokenizer
from weft.making.rows import Row

GROWING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
LAST_ALONE = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}={% endif %}"


def tokenizer_with(folder: Path, template: str | None) -> PreTrainedTokenizerBase:
    save_tokenizer(folder, template)
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return tokenizer_with(tmp_path_factory.mktemp("tokenizer"), GROWING)


def row(**values: Any) -> Row:
    return Row("f.jsonl:7", values)


def data(**settings: Any) -> DataConfig:
    return DataConfig((Path("f.jsonl"),), **settings)


def learn(
    tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any], length: int = 100, **settings: Any
) -> list[str]:
    """The text of an example, and the part of it that is learnt."""
    found, config = row(**values), data(**settings)
    example = Encoder(tokenizer, config, length).example(found, form_of(found, config))
    learnt = [label for label in example["labels"] if label != IGNORED]
    return [tokenizer.decode(ids) for ids in (example["input_ids"], learnt)]


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def test_a_completion_is_learnt_and_its_prompt_is_not(tokenizer: PreTrainedTokenizerBase) -> None:
    assert learn(tokenizer, {"prompt": "ab=", "completion": "AB"}) == ["<bos>ab=AB<eos>", "AB<eos>"]


def test_columns_may_have_other_names(tokenizer: PreTrainedTokenizerBase) -> None:
    columns = Columns(prompt="q", completion="a")
    assert learn(tokenizer, {"q": "x", "a": "y", "rest": 1}, columns=columns)[1] == "y<eos>"


def test_every_answer_of_a_chat_is_learnt(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"))
    text, learnt = learn(tokenizer, {"messages": messages})
    assert text == "[user]a<eos>[assistant]b<eos>[user]c<eos>[assistant]d<eos>"
    assert learnt == "b<eos>d<eos>"


def test_a_chat_may_be_json_in_a_text(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = json.dumps(chat(("user", "a"), ("assistant", "b")))
    assert learn(tokenizer, {"messages": messages})[1] == "b<eos>"


def test_a_template_that_shows_the_last_message_alone_takes_one_answer(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, LAST_ALONE)
    assert learn(tokenizer, {"messages": chat(("user", "a"), ("assistant", "b"))}) == ["a=b<eos>", "b<eos>"]
    twice = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(InvalidData, match=r"f.jsonl:7: .* give each answer a row of its own"):
        learn(tokenizer, {"messages": twice})


def test_messages_need_a_template(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="the model has no chat template"):
        learn(tokenizer_with(tmp_path, None), {"messages": chat(("user", "a"), ("assistant", "b"))})


def test_a_text_is_put_into_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = Encoder(tokenizer, data(template="<{text}>?"), 100)
    example = encoder.example(row(text="hi", label="no"), "label", ("yes", "no"))
    assert tokenizer.decode(example["input_ids"]) == "<bos><hi>?"
    assert example["labels"] == 1


def test_several_labels_are_one_number_a_class(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = Encoder(tokenizer, data(), 100)
    example = encoder.example(row(text="hi", label=["c", "a"]), "label", ("a", "b", "c"), is_multi=True)
    assert example["labels"] == [1.0, 0.0, 1.0]


def test_labels_are_those_of_the_data_in_their_order() -> None:
    assert find_labels([row(label=10), row(label=9), row(label="2")], Columns()) == ("2", "9", "10")
    assert find_labels([row(label="b"), row(label=["a", "c"])], Columns()) == ("a", "b", "c")


@pytest.mark.parametrize(
    ("task", "values", "form"),
    [
        (None, {"prompt": "", "completion": ""}, "prompt"),
        (None, {"messages": []}, "chat"),
        (None, {"text": "", "label": ""}, "label"),
        ("classify", {"prompt": "", "completion": "", "text": "", "label": ""}, "label"),
    ],
)
def test_the_columns_say_what_the_data_is_for(task: Task | None, values: Mapping[str, Any], form: str) -> None:
    assert form_of(row(**values), data(task=task)) == form


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"question": "a", "answer": "b"},
        {},
        "has the columns question, answer; needs prompt and completion, or messages",
    ),
    ({"prompt": "a", "completion": "b", "text": "c", "label": "d"}, {}, "say which with --task"),
    ({"prompt": 3, "completion": "b"}, {}, "prompt is 3; must be a text"),
    ({"prompt": "a", "completion": None}, {}, "completion is None; must be a text"),
    ({"prompt": "a", "completion": ""}, {}, "completion is empty"),
    ({"prompt": "a" * 90, "completion": "b" * 20}, {}, "has 112 tokens and the context is 100: .* --truncate"),
    ({"messages": []}, {}, r"messages is \[\]; must be a list of messages"),
    ({"messages": "no"}, {}, "messages is a text that is no JSON"),
    ({"messages": chat(("user", "a"))}, {}, "no message of the assistant"),
    ({"messages": chat(("assistant", ""))}, {}, "an empty answer"),
    ({"messages": [{"role": "user"}]}, {}, "a message is a role and a content"),
]


@pytest.mark.parametrize(("values", "settings", "message"), WRONG)
def test_a_row_that_is_wrong_is_named(
    tokenizer: PreTrainedTokenizerBase, values: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidData, match=f"f.jsonl:7: .*{message}"):
        learn(tokenizer, values, **settings)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("odd", "label is 'odd'; must be one of yes, no"),
        (None, "label is None; must be a label, or a list of them"),
        ("a\nb", "a label is printable"),
        (["yes"], "is a list in some rows and not in others"),
    ],
)
def test_a_label_that_is_none_is_named(tokenizer: PreTrainedTokenizerBase, label: object, message: str) -> None:
    with pytest.raises(InvalidData, match=f"f.jsonl:7: label .*{message.removeprefix('label ')}"):
        Encoder(tokenizer, data(), 100).example(row(text="a", label=label), "label", ("yes", "no"))


def test_one_label_alone_is_no_classification() -> None:
    with pytest.raises(InvalidData, match="the data holds the label yes alone"):
        find_labels([row(label="yes")], Columns())


def test_what_is_too_long_is_cut_when_asked_and_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = Encoder(tokenizer, data(truncate=True), 8)
    example = encoder.example(row(prompt="0123456789", completion="abc"), "prompt")
    assert tokenizer.decode(example["input_ids"]) == "6789abc<eos>", "the prompt's beginning goes, and not the answer"
    labelled = encoder.example(row(text="0123456789", label="a"), "label", ("a", "b"))
    assert tokenizer.decode(labelled["input_ids"]) == "<bos>0123456"
    assert encoder.truncated == 2


def test_a_teacher_is_given_its_prompt_and_the_same_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = Encoder(tokenizer, data(), 100, teacher_prompt="Shout. ")
    example = encoder.example(row(prompt="ab=", completion="AB"), "prompt")
    assert tokenizer.decode(example["teacher_input_ids"]) == "<bos>Shout. ab=AB<eos>"
    assert [label for label in example["teacher_labels"] if label != IGNORED] == [
        label for label in example["labels"] if label != IGNORED
    ]
    talk = encoder.example(row(messages=chat(("user", "a"), ("assistant", "b"))), "chat")
    assert tokenizer.decode(talk["teacher_input_ids"]) == "[system]Shout. <eos>[user]a<eos>[assistant]b<eos>"
