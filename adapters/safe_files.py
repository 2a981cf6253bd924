"""Files that somebody else wrote, looked at before anything is allocated for what they claim to hold."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from weft.errors import InvalidAdapter, Problem

MAX_HEADER_BYTES = 16 << 20
"""Of a safetensors file; a hundred thousand tensors need about ten million."""

_LENGTH_BYTES = 8
_MAX_DIGITS = 20


def open_regular(path: Path) -> BinaryIO:
    """Open for reading, and refuse at once what would block or never end: pipes, sockets, devices.

    Raises OSError; it is one too where the path is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


@contextmanager
def open_safetensors(path: Path, source: str) -> Iterator[tuple[BinaryIO, dict[str, Any]]]:
    """The file, read up to where its data begins, and its header, by tensor; source names the adapter in messages.

    Raises InvalidAdapter where its length is more than the file holds or MAX_HEADER_BYTES, where it is not JSON or
    holds a key twice (readers differ in which one they take), or where a tensor claims bytes that the file does not
    have; also for an OSError or a ValueError of the block.
    """
    try:
        with open_regular(path) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            header = file.read(_header_bytes(file.read(_LENGTH_BYTES), num_bytes))
            tensors = json.loads(
                header.decode(), object_pairs_hook=_without_twins, parse_constant=_no_constant, parse_int=_short_int
            )
            _check_extents(tensors, num_bytes - _LENGTH_BYTES - len(header))
            tensors.pop("__metadata__", None)
            yield file, tensors
    except OSError as error:
        raise InvalidAdapter(source, [Problem(path.name, f"can't be read ({error.strerror})")]) from None
    except RecursionError:
        raise InvalidAdapter(source, [Problem(path.name, "has a header that is nested too deep")]) from None
    except UnicodeDecodeError:
        raise InvalidAdapter(source, [Problem(path.name, "has a header that is not UTF-8")]) from None
    except json.JSONDecodeError as error:
        raise InvalidAdapter(source, [Problem(path.name, f"has a header that is not JSON ({error.msg})")]) from None
    except ValueError as error:
        raise InvalidAdapter(source, [Problem(path.name, str(error))]) from None


def _header_bytes(first: bytes, num_bytes: int) -> int:
    if len(first) < _LENGTH_BYTES:
        raise ValueError(f"has {num_bytes} bytes, too few for a safetensors file")
    length = int.from_bytes(first, "little")
    if length > min(MAX_HEADER_BYTES, num_bytes - _LENGTH_BYTES):
        raise ValueError(
            f"claims a header of {length:,} bytes; the file has {num_bytes:,}, and {MAX_HEADER_BYTES:,} are allowed"
        )
    return length


def _without_twins(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"has a header that holds {key[:200]!r} twice")
        found[key] = value
    return found


def _short_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"has a header that holds a number of {len(digits)} digits")
    return int(digits)


def _no_constant(name: str) -> None:
    raise ValueError(f"has a header that holds {name}, which is not JSON")


def _check_extents(tensors: Any, num_data_bytes: int) -> None:
    if type(tensors) is not dict:
        raise ValueError("has a header that is not a JSON object")
    for name, tensor in tensors.items():
        if name == "__metadata__":
            continue
        offsets = tensor.get("data_offsets") if isinstance(tensor, dict) else None
        if not _lies_within(offsets, num_data_bytes):
            raise ValueError(f"has a header whose {name[:200]!r} lies outside the {num_data_bytes:,} bytes of data")


def _lies_within(offsets: Any, num_bytes: int) -> bool:
    is_pair = isinstance(offsets, list) and len(offsets) == 2 and all(type(at) is int for at in offsets)
    return is_pair and 0 <= offsets[0] <= offsets[1] <= num_bytes
