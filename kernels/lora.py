"""The one way into the batched gather-matmul."""

from __future__ import annotations

from collections.abc import Callable

import torch

from weft.kernels import reference, segments
from weft.kernels.plan import Plan
from weft.kernels.site import SiteGroup

AddLora = Callable[[torch.Tensor, torch.Tensor, SiteGroup, Plan], torch.Tensor]

BACKENDS: dict[str, AddLora] = {"reference": reference.add_lora, "torch": segments.add_lora}
"""Backends by name; all obey `reference.add_lora`'s docstring."""
