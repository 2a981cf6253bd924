"""What runs compiled by PyTorch, if that is asked for: proven like any other faster function, or not at all."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import torch

from weft.errors import InvalidConfig, one_line
from weft.kernels import pointwise_compiled as compiled
from weft.kernels.pointwise_compiled import CompiledPointwise
from weft.server.engine.fused import Attention, Mlp
from weft.server.engine.fusing import Fusion

_log = logging.getLogger(__name__)

_NAMES = {compiled.Norm: "norms", Attention: "rotary embeddings", Mlp: "activations"}
"""What is compiled of each of a model's parts."""


def compiler_for(device: torch.device) -> CompiledPointwise:
    """Raises InvalidConfig where PyTorch can't compile for the device."""
    pointwise = CompiledPointwise()
    try:
        pointwise.check(device)
    except Exception as error:  # whatever keeps a compiler from running, the user gets one line
        needed = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler"
        raise InvalidConfig(
            f"--compile needs PyTorch's compiler, which fails on {device} ({one_line(error)}): install {needed}, or "
            "leave --compile out"
        ) from error
    return pointwise


@torch.inference_mode()
def compile_parts(fusion: Fusion, pointwise: CompiledPointwise, clock: Callable[[], float]) -> None:
    """Have the parts that were found run compiled, all or none: none where one of them gives other numbers then.

    As steps run, so they are compiled: under inference mode, or the first step would compile all anew.
    """
    began_s = clock()
    counts = Counter(type(function) for function in fusion.fused.values())
    parts = ", ".join(f"{counts[kind]} {name}" for kind, name in _NAMES.items() if counts[kind])
    if not parts:
        _log.warning("--compile: this model has no norms, rotary embeddings or activations of a known form")
        return
    pointwise.compile()
    wrong = fusion.prove_again()
    if wrong:
        fusion.undo()
        _log.warning("--compile: %s gives other numbers compiled, so nothing runs compiled", wrong)
    else:
        _log.info("--compile: %s run compiled; compiling took %.1f s", parts, clock() - began_s)
