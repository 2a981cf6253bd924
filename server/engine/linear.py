"""The frozen linear modules of the base: how their products are computed, and where adapters add to them."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from weft.adapters.folder import ModuleShapes
from weft.kernels.lora import AddLora
from weft.kernels.site import Site
from weft.server.engine.attention import current_step

_PACKED_ROWS = 16
"""Rows of x that the packed layout is made for; it is used for any number of them."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x W + b and nothing else: some classes derived from Linear, routers say, do more.

    Conv1D is GPT-2's, with W stored as [d_in, d_out].
    """
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def linear_shapes(model: nn.Module, names: Iterable[str]) -> ModuleShapes:
    """(d_in, d_out) by name."""
    shapes = {}
    for name in names:
        module = model.get_submodule(name)
        rows, columns = _weight(module).shape
        shapes[name] = (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
    return shapes


class FrozenLinear(nn.Module):
    """In the place of a linear module: its product, plus the running step's adapters on the rows that asked for them.

    site: where the adapters' rows for this module are; None for a module that adapters can't touch.
    """

    def __init__(self, base: nn.Module, site: Site | None, add_lora: AddLora) -> None:
        super().__init__()
        weight, product = _pack(base) if _is_packable(base) else (_weight(base).detach(), base)
        self.weight = weight
        self._product: Callable[[torch.Tensor], torch.Tensor] = product
        self._site = site
        self._add_lora = add_lora

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., d_in] -> [..., d_out]; with a plan, the leading dimensions flatten to the step's rows."""
        y = self._product(x)
        step = current_step()
        if self._site is not None and step is not None and step.plan is not None:
            self._add_lora(y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), self._site, step.plan)
        return y


def freeze(model: nn.Module, names: Iterable[str], sites: Mapping[str, Site], add_lora: AddLora) -> None:
    """Put a `FrozenLinear` in the place of each named module."""
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        setattr(parent, child, FrozenLinear(model.get_submodule(name), sites.get(name), add_lora))


def _weight(module: nn.Module) -> torch.Tensor:
    weight: torch.Tensor = getattr(module, "weight")  # noqa: B009 - typed as a Tensor or a Module
    return weight


def _is_packable(module: nn.Module) -> bool:
    """Whether oneDNN's packed product is to be had for a module; on other processors it was not measured."""
    weight = _weight(module)
    return (
        isinstance(module, nn.Linear)
        and weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and platform.machine() in ("x86_64", "AMD64")
    )


def _pack(module: nn.Module) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """The weight in oneDNN's own layout, and the product with it.

    On small batches `F.linear` lays the weight out anew in every call; packed once, it is about twice as fast. The
    module's own copy is dropped with the module.
    """
    bias = module.bias if isinstance(module.bias, torch.Tensor) else None
    onednn = torch.ops.mkldnn
    packed: torch.Tensor = onednn._reorder_linear_weight(_weight(module).detach(), _PACKED_ROWS)  # noqa: SLF001
    multiply = onednn._linear_pointwise.default  # noqa: SLF001 - PyTorch has no public name for either

    def product(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = multiply(x, packed, bias, "none", [], "")
        return y

    return packed, product
