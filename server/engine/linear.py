"""The frozen linear modules of the base: how their products are computed, and where adapters add to them."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from weft.adapters.base import Function, Parameters
from weft.server.engine.step import current_step

_PACKED_ROWS = 16
"""Rows of x that the packed layout is made for; it is used for any number of them."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x W + b and nothing else: some classes derived from Linear, routers say, do more.

    Conv1D is GPT-2's, with W stored as [d_in, d_out].
    """
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


class FrozenLinear(nn.Module):
    """In the place of a linear module: its product, and then what the running step's adapters do to it."""

    def __init__(self, base: nn.Module, name: str) -> None:
        super().__init__()
        self._name = name
        self.is_conv1d = isinstance(base, Conv1D)
        weight, product = _pack(base) if _is_packable(base) else (_weight(base).detach(), base)
        self.weight = weight
        self._product: Callable[[torch.Tensor], torch.Tensor] = product
        self.bias = base.bias.detach() if isinstance(base.bias, torch.Tensor) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., d_in] -> [..., d_out]."""
        y = self._product(x)
        step = current_step()
        if step is not None:
            step.adapt(self._name, (x,), (y,))
        return y


def freeze(model: nn.Module, names: Iterable[str]) -> None:
    """Put a `FrozenLinear` in the place of each named module."""
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        setattr(parent, child, FrozenLinear(model.get_submodule(name), name))


def read(module: nn.Module, key: str) -> torch.Tensor:
    """A parameter as a plain tensor; the weight of a linear module, frozen or not, as [d_out, d_in]."""
    tensor: torch.Tensor = getattr(module, key)
    if key == "weight" and isinstance(module, FrozenLinear):
        tensor = tensor.to_dense() if tensor.is_mkldnn else tensor
    is_conv1d = isinstance(module, Conv1D) or (isinstance(module, FrozenLinear) and module.is_conv1d)
    return tensor.detach().t() if key == "weight" and is_conv1d else tensor.detach()


def linear_with(parameters: Parameters, *, is_conv1d: bool) -> Function:
    """The function of a linear module with these parameters, `weight` in the module's own layout."""
    weight, bias = parameters["weight"], parameters.get("bias")
    weight = weight.t() if is_conv1d else weight
    return lambda x: functional.linear(x, weight, bias)


def _weight(module: nn.Module) -> torch.Tensor:
    weight: torch.Tensor = getattr(module, "weight")  # noqa: B009 - typed as a Tensor or a Module
    return weight


def _is_packable(module: nn.Module) -> bool:
    """Whether oneDNN's packed product is to be had for a module; on other processors it was not measured."""
    weight = _weight(module)
    return (
        isinstance(module, nn.Linear)
        and weight.device.type == "cpu"
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _packs_bfloat16()))
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and platform.machine() in ("x86_64", "AMD64")
    )


def _packs_bfloat16() -> bool:
    """Whether the processor has the instructions that oneDNN wants for it."""
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001 - no public name
    return supported


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
