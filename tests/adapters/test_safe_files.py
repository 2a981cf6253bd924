"""Headers of safetensors files, looked at before anything is allocated for what they claim."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weft.adapters.safe_files import MAX_HEADER_BYTES, open_regular, open_safetensors
from weft.errors import InvalidAdapter


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter_model.safetensors"


def write(path: Path, header: str | bytes, data: bytes = bytes(16), length: int | None = None) -> None:
    raw = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def refusal(path: Path) -> str:
    with pytest.raises(InvalidAdapter) as raised, open_safetensors(path, "file:/x"):
        pass
    (problem,) = raised.value.problems
    assert problem.subject == path.name
    assert "\n" not in problem.description
    return problem.description


def tensor(**fields: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **fields}


def test_a_sound_file_is_known_by_its_tensors(path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(0)}, path, metadata={"format": "pt"})
    with open_safetensors(path, "file:/x") as (_, tensors):
        assert set(tensors) == {"a", "b"}
        assert tensors["a"]["shape"] == [2, 3]


@pytest.mark.parametrize("num_bytes", [0, 1, 7])
def test_too_few_bytes_for_a_length(path: Path, num_bytes: int) -> None:
    path.write_bytes(bytes(num_bytes))
    assert refusal(path) == f"has {num_bytes} bytes, too few for a safetensors file"


@pytest.mark.parametrize("length", [27, 1 << 20, 1 << 60, (1 << 64) - 1])
def test_a_header_that_is_longer_than_the_file(path: Path, length: int) -> None:
    write(path, "{}", length=length)
    assert refusal(path).startswith(f"claims a header of {length:,} bytes; the file has 26, and ")


def test_a_header_that_is_larger_than_any_honest_one(path: Path) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(1 << 30)  # holes take no space
    assert f"{MAX_HEADER_BYTES:,} are allowed" in refusal(path)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("7", "not a JSON object"),
        ("null", "not a JSON object"),
        (b"\xff\xfe{}", "not UTF-8"),
        ("[" * 100_000, "nested too deep"),
        ('{"a": NaN}', "holds NaN, which is not JSON"),
        ('{"a": 1, "a": 2}', "holds 'a' twice"),
        ('{"a": {"dtype": "F32", "dtype": "F16"}}', "holds 'dtype' twice"),
        ('{"__metadata__": {"k": "1", "k": "2"}}', "holds 'k' twice"),
        ('{"a": {"data_offsets": [' + "9" * 5000 + ", 0]}}", "a number of 5000 digits"),
        (json.dumps({"a": 7}), "'a' lies outside the 16 bytes of data"),
        (json.dumps({"a": {}}), "'a' lies outside"),
        (json.dumps({"a": tensor(data_offsets=[0, 17])}), "'a' lies outside"),
        (json.dumps({"a": tensor(data_offsets=[-1, 15])}), "'a' lies outside"),
        (json.dumps({"a": tensor(data_offsets=[8, 4])}), "'a' lies outside"),
        (json.dumps({"a": tensor(data_offsets=[0, 1 << 60])}), "'a' lies outside"),
        (json.dumps({"a": tensor(data_offsets=[0])}), "'a' lies outside"),
        (json.dumps({"a": tensor(data_offsets=[0, True])}), "'a' lies outside"),
        (json.dumps({"a": tensor(data_offsets=[0.0, 16.0])}), "'a' lies outside"),
        (json.dumps({"x\n" * 500: tensor(data_offsets=[0, 99])}), "lies outside"),
    ],
)
def test_a_header_that_is_none(path: Path, header: str | bytes, words: str) -> None:
    write(path, header)
    assert words in refusal(path)


def test_what_is_no_regular_file_is_not_waited_for(path: Path) -> None:
    os.mkfifo(path)
    assert refusal(path) == "can't be read (is not a regular file)"
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(Path("/dev/zero"))
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(path.parent)


def test_a_file_that_is_not_there(path: Path) -> None:
    assert refusal(path) == "can't be read (No such file or directory)"
