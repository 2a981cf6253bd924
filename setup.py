"""The C library of kernels/, once for each level of processor; an install without a compiler goes on without it."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

from setuptools import Extension, setup

FLAGS = ["-std=gnu11", "-O3", "-fno-math-errno", "-fvisibility=default", "-pthread", "-Werror=implicit"]
LEVELS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS |= {"v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}

SOURCES = hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(Path("kernels/c").glob("*.[ch]"))))
"""Kept in the library, so that one left over from other sources is not used (kernels/native.py)."""

setup(
    ext_modules=[
        Extension(
            f"weft.kernels._native_{level}",
            sources=sorted(map(str, Path("kernels/c").glob("*.c"))),
            depends=sorted(map(str, Path("kernels/c").glob("*.h"))),
            define_macros=[("WEFT_SOURCES", f"0x{SOURCES.hexdigest()[:16]}ull")],
            extra_compile_args=[*FLAGS, *flags],
            extra_link_args=["-pthread"],
            optional=True,
        )
        for level, flags in LEVELS.items()
    ]
)
