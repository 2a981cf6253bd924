"""Rows as token ids: prompts with completions, chats, and texts with labels.

Ids are put together as a server sees them: a prompt is tokenized alone, and its answer follows it. Only answers are
learnt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from weft.adapters.classes import MAX_LABEL_CHARACTERS
from weft.errors import InvalidConfig, InvalidData
from weft.making.config import TEXT_MARK, Columns, DataConfig, Task
from weft.making.rows import Row

IGNORED = -100
"""The label of a token that is not learnt."""

Form = Literal["prompt", "chat", "label"]
Example = dict[str, Any]
"""`input_ids`, and `labels`: one a token, or the class; with a teacher, what it is given as `teacher_…`."""

_TASK_OF: Mapping[Form, Task] = {"prompt": "generate", "chat": "generate", "label": "classify"}
_NEEDS: Mapping[Form, Callable[[Columns], tuple[str, ...]]] = {
    "prompt": lambda columns: (columns.prompt, columns.completion),
    "chat": lambda columns: (columns.messages,),
    "label": lambda columns: (columns.text, columns.label),
}

Segments = list[tuple[list[int], bool]]
"""Token ids, and whether they are an answer."""


def form_of(row: Row, data: DataConfig, *, may_lack_answers: bool = False) -> Form:
    """The form of the data by the columns of its first row. Raises InvalidData where they are of none, or of two."""
    wanted = [form for form, task in _TASK_OF.items() if data.task in (None, task)]
    needs = {form: _NEEDS[form](data.columns) for form in wanted}
    if may_lack_answers and "prompt" in needs:
        needs["prompt"] = (data.columns.prompt,)
    fitting = [form for form in wanted if set(needs[form]) <= row.values.keys()]
    if len({_TASK_OF[form] for form in fitting}) > 1:
        raise row.refuse("could be to generate or to classify: say which with --task")
    if not fitting:
        ways = ", or ".join(" and ".join(names) for names in needs.values())
        raise row.refuse(
            f"has the columns {_listed(row.values)}; needs {ways}: say with --prompt-column and the like what they are"
        )
    return fitting[0]


def task_of(form: Form) -> Task:
    """What data of a form is for."""
    return _TASK_OF[form]


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(map(str, values)) or "none"


def text_of(row: Row, column: str, *, may_be_empty: bool = False) -> str:
    """The text in a column. Raises InvalidData where there is none."""
    if column not in row.values:
        raise row.refuse(f"has no {column}; it has the columns {_listed(row.values)}")
    value = row.values[column]
    if not isinstance(value, str):
        raise row.refuse(f"{column} is {_shown(value)}; must be a text")
    if not value and not may_be_empty:
        raise row.refuse(f"{column} is empty")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


class Encoder:
    """Rows to examples, for one tokenizer and one context. truncated: how many were cut so far."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, max_length: int, teacher_prompt: str | None = None
    ) -> None:
        """teacher_prompt: goes before what the teacher is asked; None where there is no teacher."""
        self._tokenizer = tokenizer
        self._data = data
        self._columns = data.columns
        self._max_length = max_length
        self._teacher_prompt = teacher_prompt
        self.truncated = 0

    def example(self, row: Row, form: Form, labels: Sequence[str] = (), *, is_multi: bool = False) -> Example:
        """What is learnt of a row. Raises InvalidData where it is none."""
        if form == "label":
            return self._classified(row, labels, is_multi=is_multi)
        example = self._joined(row, self._segments(row, form, ""))
        if self._teacher_prompt is not None:
            taught = self._joined(row, self._segments(row, form, self._teacher_prompt), is_teacher=True)
            example["teacher_input_ids"], example["teacher_labels"] = taught["input_ids"], taught["labels"]
        return example

    def question(self, row: Row, form: Form) -> list[int]:
        """What the teacher is asked, where it writes the answer."""
        prompt = self._teacher_prompt or ""
        if form == "chat":
            return self._ids(self._render(row, _with_system(self._messages(row), prompt), asks=True))
        return self._ids(prompt + text_of(row, self._columns.prompt, may_be_empty=True), special=True)

    def _segments(self, row: Row, form: Form, before: str) -> Segments:
        if form == "chat":
            return self._chat(row, _with_system(self._messages(row), before))
        prompt = before + text_of(row, self._columns.prompt, may_be_empty=True)
        asked = self._ids(prompt, special=True)
        if not asked:
            raise row.refuse(f"{self._columns.prompt} is empty, and this tokenizer begins no text by itself")
        return [(asked, False), (self._ended(self._ids(text_of(row, self._columns.completion))), True)]

    def _chat(self, row: Row, messages: list[dict[str, str]]) -> Segments:
        """The template's text before each answer and the answers, up to the last one."""
        segments: Segments = []
        done = ""
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise row.refuse(
                f"{self._columns.messages} holds no message of the assistant, so there is nothing to learn"
            )
        for place in answers:
            asked = self._render(row, messages[:place], asks=True)
            answered = self._render(row, messages[: place + 1], asks=False)
            if not (asked.startswith(done) and answered.startswith(asked)):
                if len(answers) > 1:
                    raise row.refuse(
                        "the model's chat template writes earlier turns anew when another follows: "
                        "give each answer a row of its own"
                    )
                answered = asked + messages[place]["content"]
            answer = answered.removeprefix(asked)
            ids = self._ids(answer)
            segments += [(self._ids(asked.removeprefix(done)), False)]
            segments += [(self._ended(ids) if answer.strip() == messages[place]["content"].strip() else ids, True)]
            done = answered
        return segments

    def _messages(self, row: Row) -> list[dict[str, str]]:
        column = self._columns.messages
        found = row.values.get(column)
        if isinstance(found, str):
            try:
                found = json.loads(found)
            except ValueError:
                raise row.refuse(f"{column} is a text that is no JSON") from None
        if not isinstance(found, list) or not found:
            raise row.refuse(f"{column} is {_shown(found)}; must be a list of messages")
        for message in found:
            given = (
                {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
            )
            if given.keys() != {"role", "content"} or not all(isinstance(value, str) for value in given.values()):
                raise row.refuse(f"{column} holds {_shown(message)}; a message is a role and a content, both texts")
            if given["role"] == "assistant" and not given["content"]:
                raise row.refuse(f"{column} holds an empty answer")
        return [{"role": message["role"], "content": message["content"]} for message in found]

    def _render(self, row: Row, messages: list[dict[str, str]], *, asks: bool) -> str:
        if not self._tokenizer.chat_template:
            raise InvalidConfig("the model has no chat template: give prompts and completions instead of messages")
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))
        except Exception as error:  # noqa: BLE001 - a template raises what it likes, and says what is wrong with a chat
            raise row.refuse(f"the model's chat template refuses it ({' '.join(str(error).split())})") from None

    def _classified(self, row: Row, labels: Sequence[str], *, is_multi: bool) -> Example:
        text = text_of(row, self._columns.text)
        ids = self._ids(self._data.template.replace(TEXT_MARK, text) if self._data.template else text, special=True)
        return {"input_ids": self._fitted(row, ids, keep_end=False), "labels": self._target(row, labels, is_multi)}

    def _target(self, row: Row, labels: Sequence[str], is_multi: bool) -> int | list[float]:
        given = labels_of(row, self._columns)
        if is_multi != isinstance(row.values[self._columns.label], list):
            raise row.refuse(f"{self._columns.label} is a list in some rows and not in others")
        for label in given:
            if label not in labels:
                raise row.refuse(f"{self._columns.label} is {label!r}; must be one of {', '.join(labels)}")
        return [float(label in given) for label in labels] if is_multi else labels.index(given[0])

    def _joined(self, row: Row, segments: Segments, *, is_teacher: bool = False) -> Example:
        ids = [token for tokens, _ in segments for token in tokens]
        labels = [token if is_answer else IGNORED for tokens, is_answer in segments for token in tokens]
        if is_teacher and len(ids) > self._max_length:
            raise row.refuse(f"has {len(ids)} tokens with the teacher's prompt; the context is {self._max_length}")
        ids = self._fitted(row, ids, keep_end=True)
        labels = labels[-len(ids) :]
        labels[0] = IGNORED  # nothing comes before it to predict it from
        if all(label == IGNORED for label in labels):
            raise row.refuse("has no token to learn: its answer is empty")
        return {"input_ids": ids, "labels": labels}

    def _fitted(self, row: Row, ids: list[int], *, keep_end: bool) -> list[int]:
        if len(ids) <= self._max_length:
            return ids
        if not self._data.truncate:
            raise row.refuse(
                f"has {len(ids)} tokens and the context is {self._max_length}: shorten it, or cut such with --truncate"
            )
        self.truncated += 1
        return ids[-self._max_length :] if keep_end else ids[: self._max_length]

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def _ended(self, ids: list[int]) -> list[int]:
        return [*ids, self._tokenizer.eos_token_id] if self._tokenizer.eos_token_id is not None else ids


def labels_of(row: Row, columns: Columns) -> list[str]:
    """The labels of a row: one, or those of a list. A whole number counts as its digits."""
    value = row.values.get(columns.label)
    given = value if isinstance(value, list) else [value]
    if any(isinstance(label, bool) or not isinstance(label, str | int) or label == "" for label in given):
        raise row.refuse(f"{columns.label} is {_shown(value)}; must be a label, or a list of them")
    labels = [str(label) for label in given]
    for label in labels:
        if not label.isprintable() or len(label) > MAX_LABEL_CHARACTERS:
            words = f"a label is printable, and at most {MAX_LABEL_CHARACTERS} characters long"
            raise row.refuse(f"{columns.label} is {_shown(label)}; {words}")
    return labels


def find_labels(rows: Sequence[Row], columns: Columns) -> tuple[str, ...]:
    """Every label of the data: numbers in their order, or words in theirs. Raises InvalidData where it is one alone."""
    found = {label for row in rows for label in labels_of(row, columns)}
    if len(found) < 2:
        raise InvalidData(f"the data holds the label {', '.join(found) or 'of no row'} alone: classes are two or more")
    return tuple(sorted(found, key=int if all(label.isdecimal() for label in found) else str))


def _with_system(messages: list[dict[str, str]], prompt: str) -> list[dict[str, str]]:
    """The messages with a prompt before what the first, of the system, says."""
    if not prompt:
        return messages
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{prompt}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": prompt}, *messages]
