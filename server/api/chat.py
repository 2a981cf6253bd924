"""A conversation on the wire -> what a chat template takes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from weft.errors import one_line
from weft.server.api.violations import Violations
from weft.v1 import inference_pb2 as pb2

MAX_CHAT_MESSAGES = 1024
MAX_TOOLS = 128

Json = Any
"""A value as json.loads gives it."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """messages: a mapping each, with no key that was not set but `content`. tools: None where there are none."""

    messages: list[dict[str, Json]]
    tools: list[dict[str, Json]] | None
    variables: Mapping[str, Json]

    @property
    def given(self) -> Iterator[tuple[str, str]]:
        """The names by which a template reads what not every template knows, each with its field's path."""
        if self.tools:
            yield "tools", "chat.tools"
        for index, message in enumerate(self.messages):
            for name in ("tool_calls", "tool_call_id", "name"):
                if name in message:
                    yield name, f"chat.messages[{index}].{name}"
        for name in self.variables:
            yield name, "chat.template_variables"


def check_chat(chat: pb2.ChatPrompt, max_bytes: int, violations: Violations) -> None:
    """Note what is wrong with a conversation, but for what its JSON holds. max_bytes: of all its texts together."""
    if not chat.messages:
        violations.add("chat.messages", "is empty; give at least one")
    if chat.add_generation_prompt and chat.continue_final_message:
        violations.add("chat.continue_final_message", "is true, and so is add_generation_prompt; choose one")
    fits = violations.fits(chat.messages, "chat.messages", MAX_CHAT_MESSAGES)
    if not violations.fits(chat.tools, "chat.tools", MAX_TOOLS) or not fits:
        return
    for index, message in enumerate(chat.messages):
        if not message.role:
            violations.add(f"chat.messages[{index}].role", "is empty; name a role that the chat template knows")
    violations.size(_num_bytes(chat), "chat", max_bytes)


def to_conversation(chat: pb2.ChatPrompt) -> Conversation:
    """A checked conversation with its JSON read. Raises InvalidRequest with every violation."""
    violations = Violations()
    messages = [_message(message, f"chat.messages[{index}]", violations) for index, message in enumerate(chat.messages)]
    tools = [_read(tool, f"chat.tools[{index}]", dict, violations) for index, tool in enumerate(chat.tools)]
    variables: dict[str, Json] = {}
    if chat.template_variables:
        variables = _read(chat.template_variables, "chat.template_variables", dict, violations)
    violations.raise_any()
    return Conversation(messages, tools or None, variables)


def _num_bytes(chat: pb2.ChatPrompt) -> int:
    texts = [chat.template_variables, *chat.tools]
    for message in chat.messages:
        texts += [message.role, message.content, message.tool_calls, message.tool_call_id, message.name]
    return sum(len(text.encode()) for text in texts)


def _message(message: pb2.ChatMessage, path: str, violations: Violations) -> dict[str, Json]:
    laid_out: dict[str, Json] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        laid_out["tool_calls"] = _read(message.tool_calls, f"{path}.tool_calls", list, violations)
    if message.tool_call_id:
        laid_out["tool_call_id"] = message.tool_call_id
    if message.name:
        laid_out["name"] = message.name
    return laid_out


def _read(text: str, path: str, kind: type[dict[str, Json] | list[Json]], violations: Violations) -> Json:
    """The JSON value of a field, or None with what is wrong with it noted."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode()  # half a character, which JSON can hold, is no text
    except (ValueError, RecursionError) as error:
        violations.add(path, f"is not JSON that can be read: {one_line(error)}")
        return None
    if not isinstance(value, kind):
        violations.add(path, f"is JSON, but no {'object' if kind is dict else 'array'}")
        return None
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")
