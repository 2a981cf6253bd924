"""The linear modules of the base, each with a place where adapters add to its output."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from weft.adapters.folder import ModuleShapes
from weft.kernels.lora import AddLora
from weft.kernels.site import Site
from weft.server.engine.attention import current_step

LINEAR = (nn.Linear, Conv1D)
"""Modules that compute x W + b; Conv1D is GPT-2's, with W stored as [d_in, d_out]."""


def linear_shapes(model: nn.Module, names: list[str]) -> ModuleShapes:
    """(d_in, d_out) by name."""
    shapes = {}
    for name in names:
        module = model.get_submodule(name)
        rows, columns = _parameter(module, "weight").shape
        shapes[name] = (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
    return shapes


def _parameter(module: nn.Module, name: str) -> torch.Tensor:
    value: torch.Tensor = getattr(module, name)
    return value


class AdaptedLinear(nn.Module):
    """A frozen linear module; the running step's adapters add their deltas to the rows that asked for them."""

    def __init__(self, base: nn.Module, site: Site, add_lora: AddLora) -> None:
        super().__init__()
        self.base = base
        self._site = site
        self._add_lora = add_lora

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight: some models look at its dtype or device."""
        return _parameter(self.base, "weight")

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias."""
        return self.base.bias if isinstance(self.base.bias, torch.Tensor) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., d_in] -> [..., d_out]; with a plan, the leading dimensions flatten to the step's rows."""
        y: torch.Tensor = self.base(x)
        step = current_step()
        if step is not None and step.plan is not None:
            self._add_lora(y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), self._site, step.plan)
        return y


def adapt(model: nn.Module, sites: Mapping[str, Site], add_lora: AddLora) -> None:
    """Put an `AdaptedLinear` in the place of each named module."""
    for name, site in sites.items():
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        setattr(parent, child, AdaptedLinear(model.get_submodule(name), site, add_lora))
