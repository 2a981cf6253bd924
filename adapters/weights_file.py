"""The tensors of a safetensors file, read into memory of their own.

safetensors itself maps the file. A mapped file that is cut short, or whose disk fails, ends the whole process and
everybody's requests with it: so every byte is read, once, where failing is an error like any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from weft.adapters.safe_files import open_safetensors
from weft.errors import InvalidAdapter, Problem, cut_short

MAX_NAME_CHARACTERS = 512

_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip


def read_tensors(path: Path, source: str, most: int) -> dict[str, torch.Tensor]:
    """Every tensor of the file, by name.

    most: the elements of the largest tensor that could be of use; nothing is read of a file that has a larger one.
    Raises InvalidAdapter where the header is unsound or says what can't be so, or where the file can't be read.
    """
    with open_safetensors(path, source) as (file, header):
        problems = list(_problems(header, most))
        if problems:
            raise InvalidAdapter(source, cut_short(problems, path.name))
        in_order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        at = 0
        for name, entry in in_order:
            start, end = entry["data_offsets"]
            if start != at:
                raise ValueError(f"has a header that puts {name!r} at byte {start:,}, where {at:,} is next")
            at = end
        read = {name: _read(file, name, entry) for name, entry in in_order}
        if file.read(1):
            raise ValueError(f"has bytes that belong to no tensor after the {at:,} that do")
        return {name: read[name] for name in header}


def _problems(header: Mapping[str, Any], most: int) -> Iterator[Problem]:
    for name, entry in header.items():
        if not name or not name.isprintable() or len(name) > MAX_NAME_CHARACTERS:
            words = f"is a tensor's name; it must be printable, and {MAX_NAME_CHARACTERS} characters long at most"
            yield Problem(ascii(name[:80]), words)
        elif reason := _wrong(entry, most):
            yield Problem(name, reason)


def _wrong(entry: Mapping[str, Any], most: int) -> str:
    dtype, shape = entry.get("dtype"), entry.get("shape")
    start, end = entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        return f"has the type {str(dtype)[:40]!r} in the header, which is none that this server knows"
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        return f"has the shape {str(shape)[:80]} in the header, which is none"
    if math.prod(shape) > most:
        return f"has shape {str(shape)[:80]}, larger than anything that an adapter of this base and config can hold"
    if math.prod(shape) * _DTYPES[dtype].itemsize != end - start:
        return f"is {dtype} of shape {str(shape)[:80]} in the header, and {end - start:,} bytes long"
    return ""


def _read(file: BinaryIO, name: str, entry: Mapping[str, Any]) -> torch.Tensor:
    start, end = entry["data_offsets"]
    data = torch.empty(end - start, dtype=torch.uint8)
    if file.readinto(data.numpy()) != end - start:  # type: ignore[attr-defined]
        raise ValueError(f"ended while {name!r} was read")
    return data.view(_DTYPES[entry["dtype"]]).view(entry["shape"])
