"""docs/generation.md: every field of a request is there, with the default and the range that the server has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from google.protobuf.message import Message

from weft.server.api import chat, constraint_fields, translation
from weft.server.api.violations import Range
from weft.server.engine.request import Sampling, Stopping
from weft.v1 import inference_pb2 as pb2

PAGE = Path(__file__).parents[1] / "docs" / "generation.md"
REQUESTS: tuple[type[Message], ...] = (
    pb2.GenerateRequest,
    pb2.AdapterWeight,
    pb2.Sampling,
    pb2.Stopping,
    pb2.Output,
    pb2.ChatPrompt,
    pb2.ChatMessage,
    pb2.ScoreRequest,
    pb2.GenerateResponse,
    pb2.ClassifyRequest,
    pb2.ClassifyResponse,
    pb2.EmbedRequest,
    pb2.EmbedResponse,
)


def table(name: str) -> dict[str, list[str]]:
    """The cells of each row after the field's name, in the table of one message."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(f"| field of {name} |")
    rows = {}
    for line in rest.splitlines()[2:]:
        if not line.startswith("|"):
            break
        field, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[field.strip("`")] = cells
    return rows


@pytest.mark.parametrize("message", REQUESTS, ids=lambda message: message.DESCRIPTOR.name)
def test_every_field_has_a_row_and_no_row_is_of_another(message: type[Message]) -> None:
    assert list(table(message.DESCRIPTOR.name)) == [field.name for field in message.DESCRIPTOR.fields]


@pytest.mark.parametrize(("name", "defaults"), [("Sampling", Sampling()), ("Stopping", Stopping())])
def test_the_defaults_are_those_of_the_engine(name: str, defaults: Sampling | Stopping) -> None:
    for field, (said, *_) in table(name).items():
        value = getattr(defaults, "time_limit_s" if field == "time_limit" else field)
        if isinstance(value, bool):
            assert said == str(value).lower(), field
        elif isinstance(value, int | float):
            assert said.removesuffix(" (off)") == f"{value:g}", field
        else:
            assert said == ("a fresh one" if field == "seed" else "none"), field


def test_the_limits_are_those_of_the_server() -> None:
    def numbers(name: str, field: str) -> list[float]:
        cell = table(name)[field][1].replace(",", "")
        return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", cell)]

    def ends(allowed: Range) -> list[float]:
        return [allowed.low, allowed.high]

    assert numbers("GenerateRequest", "adapters") == [translation.MAX_ADAPTERS]
    assert numbers("GenerateRequest", "priority") == ends(translation.PRIORITIES)
    assert numbers("GenerateRequest", "request_id") == [translation.MAX_REQUEST_ID_CHARACTERS]
    assert numbers("GenerateRequest", "cache_salt") == [translation.MAX_CACHE_SALT_CHARACTERS]
    assert numbers("GenerateRequest", "n") == [1, translation.MAX_ANSWERS]
    assert numbers("GenerateRequest", "choice")[:2] == [1, constraint_fields.MAX_CHOICES]
    for field in ("json_schema", "regex", "grammar"):
        assert numbers("GenerateRequest", field) == [constraint_fields.MAX_CONSTRAINT_BYTES / 1024]
    assert numbers("AdapterWeight", "weight")[:2] == ends(translation.WEIGHTS)
    assert numbers("Sampling", "repetition_penalty") == ends(translation.REPETITION_PENALTIES)
    assert numbers("Sampling", "presence_penalty") == ends(translation.PENALTIES)
    assert numbers("Sampling", "frequency_penalty") == ends(translation.PENALTIES)
    assert numbers("Sampling", "logit_bias") == [translation.MAX_LOGIT_BIAS, *ends(translation.BIASES)]
    assert numbers("Stopping", "stop_sequences") == [
        *(translation.MAX_STOP_SEQUENCES, 1, translation.MAX_STOP_SEQUENCE_CHARACTERS)
    ]
    assert numbers("Stopping", "stop_token_ids") == [translation.MAX_STOP_TOKEN_IDS]
    assert numbers("Output", "top_logprobs") == [0, translation.MAX_TOP_LOGPROBS]
    assert numbers("ChatPrompt", "messages") == [1, chat.MAX_CHAT_MESSAGES]
    assert numbers("ChatPrompt", "tools") == [chat.MAX_TOOLS]
    assert numbers("ScoreRequest", "continuations") == [1, translation.MAX_CONTINUATIONS]
