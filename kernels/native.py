"""The C library: found, loaded at the processor's level, and its functions with their types.

It is part of the package's own build, and optional: where it is missing, spoilt, or built from other sources,
`find_native` gives None and torch serves.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""How numbers lie in memory, as vectors.h has it."""

_LEVELS = {4: ("v4", "v3", "baseline"), 3: ("v3", "baseline")}
_POINTER, _INT64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "weft_sources": (ctypes.c_uint64, ()),
    "weft_level": (_INT, ()),
    "weft_panel": (_INT64, ()),
    "weft_linear": (None, (*(_POINTER,) * 4, *(_INT64,) * 5, *(_INT,) * 3)),
    "weft_pack": (_INT, (*(_POINTER,) * 2, *(_INT64,) * 2, *(_INT,) * 3)),
    "weft_norm": (None, (*(_POINTER,) * 4, *(_INT64,) * 5, ctypes.c_float, *(_INT,) * 3)),
    "weft_rotate": (None, (*(_POINTER,) * 3, *(_INT64,) * 6, *(_INT,) * 3)),
    "weft_act": (None, (*(_POINTER,) * 3, *(_INT64,) * 4, *(_INT,) * 3)),
    "weft_attend": (None, (_POINTER,)),
    "weft_bottleneck": (None, (_POINTER, _INT64, *(_POINTER,) * 3, *(_INT64,) * 3, *(_INT,) * 2)),
    "weft_lora": (None, (*(_POINTER,) * 4, _INT64, _INT64, _INT, _INT)),
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Native:
    """One build of the library. level: of processor that it is for. call: its functions. panel: columns of a panel.

    threads: how many each call may use.
    """

    level: str
    call: ctypes.CDLL
    panel: int
    threads: int


def find_native(threads: int) -> Native | None:
    """The fastest build that was made and that this processor runs; None where there is none, or WEFT_NATIVE is 0."""
    if os.environ.get("WEFT_NATIVE") == "0":
        return None
    baseline = open_native("baseline", threads)
    if baseline is None:
        return None
    levels = _LEVELS.get(baseline.call.weft_level(), ("baseline",))
    return next(filter(None, (open_native(level, threads) for level in levels)))


def open_native(level: str, threads: int) -> Native | None:
    """The build for one level of processor; None where it was not made, or, with a warning, is not to be used."""
    spec = importlib.util.find_spec(f"weft.kernels._native_{level}")
    if spec is None or spec.origin is None or not is_usable(Path(spec.origin)):
        return None
    return load_native(spec.origin, level, threads)


def load_native(path: str, level: str, threads: int) -> Native:
    """The build in a file. Raises OSError and AttributeError for a file that is none."""
    call = ctypes.CDLL(path)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(call, name)
        function.restype, function.argtypes = result, arguments
    return Native(level, call, call.weft_panel(), threads)


@functools.cache
def is_usable(path: Path) -> bool:
    """Whether a file is a build of the sources beside this module, if there are any. Warns once where it is not."""
    try:
        problem = _problem(path)
    except (OSError, AttributeError) as error:
        problem = str(error)
    if problem:
        _log.warning("%s is not used: %s; build it again, or reinstall", path.name, problem)
    return not problem


def _problem(path: Path) -> str:
    if not _is_whole(path):
        return "it is not whole"
    built_from = load_native(str(path), "", 1).call.weft_sources()
    sources = sources_digest(Path(__file__).resolve().parent / "c")
    return "it was built from other sources" if sources not in (0, built_from) else ""


def _is_whole(path: Path) -> bool:
    """False for an ELF file that is cut off: to load it would end the process. Its table of sections comes last."""
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 64:
        return False
    if head[:6] != b"\x7fELF\x02\x01":
        return True  # for the loader to judge
    (start,), (size, count) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
    return int(start + size * count) <= path.stat().st_size


def sources_digest(folder: Path) -> int:
    """Of the C sources, as setup.py computes it; 0 where there are none, as in a wheel."""
    sources = sorted(folder.glob("*.[ch]"))
    digest = hashlib.sha256(b"\0".join(source.read_bytes() for source in sources))
    return int(digest.hexdigest()[:16], 16) if sources else 0
