"""Messages that no client would send: made from the descriptors with odd values, and spoilt as bytes after that."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from weft.v1 import adapter_pb2, inference_pb2, server_pb2

FILES: tuple[FileDescriptor, ...] = (inference_pb2.DESCRIPTOR, adapter_pb2.DESCRIPTOR, server_pb2.DESCRIPTOR)
METHODS: Mapping[str, Descriptor] = {
    f"/{service.full_name}/{method.name}": method.input_type
    for file in FILES
    for service in file.services_by_name.values()
    for method in service.methods
}

CONTROL = "two"
"""An adapter that no message names."""

ODD = "odd"
"""An adapter that is there whenever a message is sent, whatever the ones before did to it."""

TIMEOUT_S = 5.0
MAX_MESSAGES = 3
"""Of a stream that are read before it is cancelled."""

DEPTH = 6
LONG = 3000
"""Items of a list that is far too long."""

CODES = frozenset(
    {
        *("OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "ALREADY_EXISTS"),
        *("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNIMPLEMENTED"),
    }
)
"""How a call may end, whatever is sent."""

_TEXTS = (
    *(
        "",
        ODD,
        ODD + "@sha256:" + "0" * 64,
        "even",
        "a,b",
        "../one",
        "@",
        "x" * 200,
        "é€😀",
        "\0",
        "\n",
        "user",
        "assistant",
    ),
    *("a*", "(a|b)+c", "(" * 40, "[^", "(a{1,9}){1,9}", 'start: "a" | "b"', "start: start", "{}", '{"type": "object"}'),
    *(
        '{"type": "string", "maxLength": 3}',
        '{"$ref": "#"}',
        '{"enum": []}',
        "[",
        "file:/etc",
        "file:",
        "hf:a/b",
        "s3://a",
    ),
    *("http://127.0.0.1:1/x", "source", "labels", "pinned", "nothing", "state = LOADING", "hello"),
)
_INTS = (
    0,
    1,
    2,
    3,
    5,
    7,
    16,
    100,
    255,
    256,
    259,
    260,
    -1,
    2**31 - 1,
    -(2**31),
    2**32 - 1,
    2**63 - 1,
    -(2**63),
    2**64 - 1,
)
_FLOATS = (0.0, 1.0, -1.0, 0.5, 0.9, 2.0, 1e-9, 1e9, 1e38, 1e308, -0.0, float("nan"), float("inf"), float("-inf"))

_FIELD = FieldDescriptor
_RANGES = {
    _FIELD.CPPTYPE_INT32: (-(2**31), 2**31),
    _FIELD.CPPTYPE_INT64: (-(2**63), 2**63),
    _FIELD.CPPTYPE_UINT32: (0, 2**32),
    _FIELD.CPPTYPE_UINT64: (0, 2**64),
}


_PROMPT = {"token_ids": {"ids": [5, 6, 7]}}
_ASK = {**_PROMPT, "adapter_id": ODD, "stopping": {"max_tokens": 4}}
SOUND: Mapping[str, Mapping[str, Any]] = {
    "GenerateRequest": _ASK,
    "StreamGenerateRequest": _ASK,
    "ScoreRequest": {**_PROMPT, "continuations": ["a", "b"]},
    "ClassifyRequest": {**_PROMPT, "adapter_id": ODD},
    "EmbedRequest": {**_PROMPT, "adapter_id": ODD},
    "TokenizeRequest": {"text": "hello"},
    "UpdateAdapterRequest": {"adapter": {"name": ODD}},
}
"""Messages that are answered, to be spoilt in one place."""


def make(rng: random.Random, descriptor: Descriptor, depth: int = DEPTH) -> Message:
    """A message that parses, with some of its fields set, or a sound one with one or two that are odd."""
    message = GetMessageClass(descriptor)(**SOUND.get(descriptor.name, {}))
    if descriptor.name in SOUND and rng.random() < 0.7:
        for _ in range(rng.randrange(3)):
            _set(rng, message, rng.choice(descriptor.fields), depth)
        return message
    message.Clear()
    share = rng.choice((0.1, 0.3, 0.6))
    for field in descriptor.fields:
        if rng.random() < share and (field.message_type is None or depth):
            _set(rng, message, field, depth)
    return message


def _set(rng: random.Random, message: Any, field: FieldDescriptor, depth: int) -> None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        for _ in range(rng.randrange(4)):
            getattr(message, field.name)[_value(rng, key)] = _value(rng, value)
    elif field.is_repeated:
        count = LONG if rng.random() < 0.03 and depth == DEPTH else rng.randrange(4)
        items = getattr(message, field.name)
        for _ in range(count):
            if field.message_type is None:
                items.append(_value(rng, field))
            else:
                items.add().CopyFrom(make(rng, field.message_type, depth - 1))
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(make(rng, field.message_type, depth - 1))
    else:
        setattr(message, field.name, _value(rng, field))


def _value(rng: random.Random, field: FieldDescriptor) -> Any:
    match field.cpp_type:
        case _FIELD.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case _FIELD.CPPTYPE_STRING:
            text = rng.choice(_TEXTS)
            return text.encode() if field.type == _FIELD.TYPE_BYTES else text
        case _FIELD.CPPTYPE_FLOAT | _FIELD.CPPTYPE_DOUBLE:
            return rng.choice(_FLOATS)
        case _FIELD.CPPTYPE_ENUM:
            return rng.choice((*range(6), 99, -1))
        case kind:
            low, high = _RANGES[kind]
            return rng.choice([number for number in _INTS if low <= number < high])


def spoil(rng: random.Random, data: bytes) -> bytes:
    """Some bytes flipped, cut, doubled, put in, or fields that nobody knows; often nothing at all."""
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0:
                data = data[:at]
            case 1:
                data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
            case 2:
                data = data[:at] + rng.randbytes(rng.randrange(1, 20)) + data[at:]
            case 3:
                data += data
            case 4:
                data += b"\x98\x06" + bytes([rng.randrange(128)])
            case _:
                data = data[:at] + b"\xff\xff\xff\xff\x0f" + data[at:]
    return data


def end_of(channel: grpc.Channel, method: str, payload: bytes) -> tuple[str, str]:
    """The code that a call with these bytes ends with, and its words; a stream is not read for ever."""
    call = channel.unary_stream(method)(payload, timeout=TIMEOUT_S)
    try:
        for number, _ in enumerate(call, 1):
            if number == MAX_MESSAGES:
                call.cancel()
                break
    except grpc.RpcError as error:
        status: Any = error
        return status.code().name, status.details() or ""
    return "OK", ""
