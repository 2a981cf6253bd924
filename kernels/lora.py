"""The one way into the batched gather-matmul."""

from __future__ import annotations

from collections.abc import Callable

import torch

from weft.errors import InvalidConfig
from weft.kernels import reference, segments
from weft.kernels.lora_native import NativeLora
from weft.kernels.native import Native
from weft.kernels.plan import Plan
from weft.kernels.site import SiteGroup

AddLora = Callable[[torch.Tensor, torch.Tensor, SiteGroup, Plan], torch.Tensor]

BACKENDS = ("reference", "torch", "cpu")
"""Names of backends; all obey `reference.add_lora`'s docstring."""


def available(native: Native | None) -> dict[str, AddLora]:
    """The backends that can run here, by name."""
    found: dict[str, AddLora] = {"reference": reference.add_lora, "torch": segments.add_lora}
    if native is not None:
        found["cpu"] = NativeLora(native)
    return found
