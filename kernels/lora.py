"""The one way into the batched gather-matmul."""

from __future__ import annotations

from collections.abc import Callable

import torch

from weft.kernels import reference, segments
from weft.kernels.plan import Plan
from weft.kernels.site import SiteGroup

AddLora = Callable[[torch.Tensor, torch.Tensor, SiteGroup, Plan], torch.Tensor]


def _triton(y: torch.Tensor, x: torch.Tensor, group: SiteGroup, plan: Plan) -> torch.Tensor:
    try:
        from weft.kernels import triton_lora  # noqa: PLC0415 - Triton is not everywhere, and slow to load
    except ModuleNotFoundError as error:
        raise RuntimeError("the LoRA backend 'triton' needs the package triton: pip install 'weft[cuda]'") from error
    return triton_lora.add_lora(y, x, group, plan)


BACKENDS: dict[str, AddLora] = {"reference": reference.add_lora, "torch": segments.add_lora, "triton": _triton}
"""Backends by name; all obey `reference.add_lora`'s docstring."""
