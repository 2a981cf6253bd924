"""Prompts to token ids and back, off the event loop: a long text must not hold up everybody's streams."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from weft.errors import InvalidRequest, one_line
from weft.server.api.chat import Conversation, to_conversation
from weft.server.api.translation import AnyRequest, GenerateRequest, PooledRequest, given_as, prompt_path
from weft.server.api.violations import Violations
from weft.server.engine.text import Detokenizer
from weft.v1 import inference_pb2 as pb2

_TEMPLATE_ERRORS = (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError)
"""What a chat template can raise: its own words, or Python's about a conversation that it was not made for."""

_GIVEN_BY_US = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"documents"}
"""Names that mean something else to transformers, its template among them: no variables of a request."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A prompt as a response shows it: its text, and its tokens with the text that each completed."""

    text: str
    ids: Sequence[int]
    pieces: Sequence[str]


class Prompts:
    """A tokenizer for the API."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # The first call drops truncation and padding that tokenizer.json may ask for. Rust's side refuses such a
        # change while another thread encodes, so it is made here, before there are any.
        self._encode_text("", add_special_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    async def encode(self, request: AnyRequest | pb2.TokenizeRequest, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a checked prompt. Raises InvalidRequest for a conversation that the template refuses."""
        match given_as(request):
            case "text":
                return await asyncio.to_thread(self._encode_text, request.text, add_special_tokens=add_special_tokens)
            case "chat":
                assert not isinstance(request, PooledRequest)
                return await asyncio.to_thread(self._encode_chat, request.chat)
            case _:
                assert not isinstance(request, pb2.TokenizeRequest)
                return list(request.token_ids.ids)

    async def encode_input(self, request: PooledRequest, longest: int) -> tuple[list[int], int]:
        """Token ids of a checked input, at most `longest`, and how many were left out.

        Special tokens that the tokenizer puts around a text stay there. Raises InvalidRequest for one that is too long
        and may not be cut.
        """
        ids = await self.encode(request)
        most = min(request.truncate or longest, longest)
        if len(ids) <= most:
            return ids, 0
        if not request.HasField("truncate"):
            words = f"has {len(ids)} tokens; at most {longest} fit: set truncate to have the rest left out"
            raise InvalidRequest.of(prompt_path(request), words)
        text = request.text if given_as(request) == "text" else None
        return await asyncio.to_thread(self._cut, text, ids, most), len(ids) - most

    async def encode_continuations(self, request: pb2.ScoreRequest, prompt: Sequence[int]) -> list[list[int]]:
        """Token ids of each continuation of a checked request, whose prompt has become these ids.

        A text and its continuation are tokenized as one: so the ids are those that the whole text would have. Where the
        prompt's own ids are not the beginning of them, and after a chat or token ids, the continuation is tokenized by
        itself. Raises InvalidRequest for a continuation that is no token.
        """
        text = request.text if request.WhichOneof("prompt") == "text" else None
        return await asyncio.to_thread(self._encode_continuations, text, list(prompt), request.continuations)

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids."""
        return await asyncio.to_thread(self._decode, ids, skip_special_tokens)

    async def show(self, request: GenerateRequest, ids: Sequence[int]) -> Shown:
        """The prompt for a response: a text as it was sent, else the text of its ids."""
        given = request.text if request.WhichOneof("prompt") == "text" else None
        return await asyncio.to_thread(self._show, given, ids)

    def _encode_text(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def _cut(self, text: str | None, ids: list[int], most: int) -> list[int]:
        """The first ids, and of a text what the tokenizer puts behind it."""
        bare = ids if text is None else self._encode_text(text, add_special_tokens=False)
        end = _after(ids, bare)[-most:]
        return [*ids[: most - len(end)], *end]

    def _encode_continuations(
        self, text: str | None, prompt: list[int], continuations: Sequence[str]
    ) -> list[list[int]]:
        violations, encoded = Violations(), []
        for index, continuation in enumerate(continuations):
            encoded.append(self._encode_continuation(text, prompt, continuation))
            if not encoded[-1]:
                violations.add(f"continuations[{index}]", "is no token: the tokenizer drops it")
        violations.raise_any()
        return encoded

    def _encode_continuation(self, text: str | None, prompt: list[int], continuation: str) -> list[int]:
        if text is not None:
            whole = self._encode_text(text + continuation, add_special_tokens=True)
            if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
                return whole[len(prompt) :]
        return self._encode_text(continuation, add_special_tokens=False)

    def _encode_chat(self, chat: pb2.ChatPrompt) -> list[int]:
        conversation = to_conversation(chat)
        opens_turn = (
            chat.add_generation_prompt if chat.HasField("add_generation_prompt") else not chat.continue_final_message
        )
        try:
            self._check_conversation(conversation)
            ids = self._tokenizer.apply_chat_template(
                conversation.messages,
                tools=[*conversation.tools] if conversation.tools else None,
                add_generation_prompt=opens_turn,
                continue_final_message=chat.continue_final_message,
                return_dict=False,
                **conversation.variables,
            )
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequest.of("chat", f"is refused by the model's chat template: {one_line(error)}") from None
        return list(ids)

    def _check_conversation(self, conversation: Conversation) -> None:
        """Raises InvalidRequest for what the template would drop without a word, and for variables that are taken."""
        violations = Violations()
        taken = {"messages", *_GIVEN_BY_US, *self._tokenizer.special_tokens_map}
        for name in sorted(conversation.variables.keys() & taken):
            violations.add("chat.template_variables", f"sets {name!r}, which is not the request's to set")
        violations.raise_any()
        template = self._tokenizer.get_chat_template(None, conversation.tools)
        for name, path in conversation.given:
            if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", template):
                violations.add(path, f"gives {name!r}, which this model's chat template does not read")
        violations.raise_any()

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        text = self._tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def _show(self, given: str | None, ids: Sequence[int]) -> Shown:
        detokenizer = Detokenizer(lambda window: self._decode(window, skip_special_tokens=True))
        pieces = [detokenizer.push(token) for token in ids]
        rest = detokenizer.flush()
        return Shown("".join([*pieces, rest]) if given is None else given, ids, pieces)


def _after(ids: list[int], bare: list[int]) -> list[int]:
    """What the tokenizer puts behind a text. ids: of the text with what is put around it, bare: without."""
    ends = (start + len(bare) for start in range(len(ids) - len(bare) + 1))
    return next((ids[end:] for end in ends if ids[end - len(bare) : end] == bare), [])
