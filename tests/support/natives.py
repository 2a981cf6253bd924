"""Builds of the C library to test: this processor's, the plain one, and the widest vectors made of whatever it has."""

from __future__ import annotations

import functools
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import pytest

from weft.kernels import native as native_module
from weft.kernels.native import Native, find_native, load_native, open_native

SOURCES = sorted((Path(native_module.__file__).resolve().parent / "c").glob("*.c"))


@functools.cache
def builds() -> tuple[Native, ...]:
    """None of them where the library was not built."""
    best, baseline, threaded = find_native(1), open_native("baseline", 1), find_native(3)
    if best is None or baseline is None or threaded is None:
        return ()
    return (*{build.level: build for build in (baseline, best)}.values(), threaded, *_wide())


def _wide() -> tuple[Native, ...]:
    """Vectors as wide as AVX-512's, which the compiler makes of narrower ones."""
    library = Path(tempfile.mkdtemp()) / "wide.so"
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    command = [compiler, "-std=gnu11", "-O1", "-w", "-DVL=16", "-fPIC", "-shared", "-pthread", *SOURCES, "-o", library]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except OSError:
        return ()  # the library that is there was built elsewhere
    return (load_native(str(library), "wide", 1),)


each_build = pytest.mark.parametrize("native", builds(), ids=[f"{b.level} on {b.threads}" for b in builds()])
