"""The C library: found, loaded at the processor's level, and its functions with their types.

It is part of the package's own build, and optional: where it is missing, `find_native` gives None and torch serves.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from dataclasses import dataclass

import torch

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""How numbers lie in memory, as vectors.h has it."""

_LEVELS = {4: ("v4", "v3", "baseline"), 3: ("v3", "baseline")}
_POINTER, _INT64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "weft_level": (_INT, ()),
    "weft_panel": (_INT64, ()),
    "weft_linear": (None, (*(_POINTER,) * 4, *(_INT64,) * 5, *(_INT,) * 3)),
    "weft_norm": (None, (*(_POINTER,) * 4, *(_INT64,) * 5, ctypes.c_float, *(_INT,) * 3)),
    "weft_rotate": (None, (*(_POINTER,) * 3, *(_INT64,) * 6, *(_INT,) * 3)),
    "weft_act": (None, (*(_POINTER,) * 3, *(_INT64,) * 4, *(_INT,) * 3)),
    "weft_attend": (None, (_POINTER,)),
    "weft_lora": (None, (*(_POINTER,) * 4, _INT64, _INT64, _INT, _INT)),
}


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
    """The build for one level of processor; None where it was not made."""
    spec = importlib.util.find_spec(f"weft.kernels._native_{level}")
    return load_native(spec.origin, level, threads) if spec is not None and spec.origin is not None else None


def load_native(path: str, level: str, threads: int) -> Native:
    """The build in a file."""
    call = ctypes.CDLL(path)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(call, name)
        function.restype, function.argtypes = result, arguments
    return Native(level, call, call.weft_panel(), threads)
