"""How Triton kernels are launched: by their interpreter where TRITON_INTERPRET=1 was set when Triton was loaded."""

from __future__ import annotations

from typing import Any, Protocol

import triton


class Launch(Protocol):
    """Does with a kernel, its grid, its arguments and its compile-time constants what is to be done with them."""

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None: ...


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run it."""
    kernel[grid](*arguments, **constants)


def is_interpreted() -> bool:
    """Whether what is launched is interpreted, on the host."""
    return bool(triton.knobs.runtime.interpret)
