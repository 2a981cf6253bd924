"""The frozen linear modules of the base: how their products are computed, and where adapters add to them."""

from __future__ import annotations

import platform
from collections.abc import Callable, Container, Iterable, Sequence

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from weft.adapters.base import Function, Parameters
from weft.kernels.linear import PackedLinear
from weft.kernels.native import FORMATS, Native
from weft.server.engine.step import RESIDUAL, current_step

Product = Callable[[torch.Tensor], torch.Tensor]

_PACKED_ROWS = 16
"""Rows of x that oneDNN's packed layout is made for; it is used for any number of them."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x W + b and nothing else: some classes derived from Linear, routers say, do more.

    Conv1D is GPT-2's, with W stored as [d_in, d_out].
    """
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


class Joint:
    """Linear modules that read the same x, or one alone: one product, and one change by the step's adapters, for all.

    names: of the modules, in the order of their columns in y. d_in, d_out: columns of x, and of y. ends_sub_layer:
    whether y is added to the residual stream, which adapters then see too.
    """

    def __init__(
        self, names: Sequence[str], modules: Sequence[nn.Module], native: Native | None, *, ends_sub_layer: bool = False
    ) -> None:
        self.names = tuple(names)
        self._ends_sub_layer = ends_sub_layer
        weights = [read(module, "weight") for module in modules]
        stops = torch.tensor([len(weight) for weight in weights]).cumsum(0).tolist()
        self.columns = [slice(stop - len(weight), stop) for weight, stop in zip(weights, stops, strict=True)]
        self.d_in, self.d_out = weights[0].shape[1], stops[-1]
        self._product, self._weight = _product(_joined(weights), _joined_bias(modules), native)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., d_in] -> [..., d_out of all]."""
        y = self._product(x)
        step = current_step()
        if step is not None:
            inputs = (x, *step.shared.get(RESIDUAL, ())) if self._ends_sub_layer else (x,)
            step.adapt(self.names, inputs, (y,))
        return y

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What the module at `index` makes of x: the step keeps the others' until they ask for the same x."""
        step = current_step()
        if len(self.names) == 1 or step is None:
            return self(x)[..., self.columns[index]]
        kept = step.shared.get(self)
        y = kept[1] if kept is not None and kept[0] is x else self(x)
        if index == len(self.names) - 1:
            step.shared.pop(self, None)
        else:
            step.shared[self] = (x, y)
        return y[..., self.columns[index]]

    def weight(self, index: int) -> torch.Tensor:
        """Of the module at `index`, [d_out, d_in]."""
        return self._weight()[self.columns[index]]


class FrozenLinear(nn.Module):
    """In the place of a linear module: its part, by its index, of its joint product."""

    def __init__(self, base: nn.Module, joint: Joint, index: int) -> None:
        super().__init__()
        self.joint = joint
        self.index = index
        self.is_conv1d = isinstance(base, Conv1D)
        self.bias = base.bias.detach() if isinstance(base.bias, torch.Tensor) else None

    @property
    def weight(self) -> torch.Tensor:
        """In the module's own layout; made anew where the product has one of its own."""
        weight = self.joint.weight(self.index)
        return weight.t() if self.is_conv1d else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., d_in] -> [..., d_out]."""
        return self.joint.part(self.index, x)


def freeze(
    model: nn.Module, groups: Iterable[Sequence[str]], native: Native | None, sub_layer_ends: Container[str] = ()
) -> None:
    """Put a `FrozenLinear` in the place of each named module; the modules of a group read the same x.

    sub_layer_ends: those whose output is added to the residual stream.
    """
    for names in groups:
        modules = [model.get_submodule(name) for name in names]
        joint = Joint(names, modules, native, ends_sub_layer=names[0] in sub_layer_ends)
        for index, (name, module) in enumerate(zip(names, modules, strict=True)):
            parent_name, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent_name), child, FrozenLinear(module, joint, index))


def read(module: nn.Module, key: str) -> torch.Tensor:
    """A parameter as a plain tensor; the weight of a linear module, frozen or not, as [d_out, d_in]."""
    tensor: torch.Tensor = getattr(module, key)
    is_conv1d = isinstance(module, Conv1D) or (isinstance(module, FrozenLinear) and module.is_conv1d)
    return tensor.detach().t() if key == "weight" and is_conv1d else tensor.detach()


def linear_with(parameters: Parameters, *, is_conv1d: bool) -> Function:
    """The function of a linear module, of its first input, with these parameters, `weight` in the module's layout."""
    weight, bias = parameters["weight"], parameters.get("bias")
    weight = weight.t() if is_conv1d else weight
    return lambda x, *_: functional.linear(x, weight, bias)


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _joined_bias(modules: Sequence[nn.Module]) -> torch.Tensor | None:
    biases = [getattr(module, "bias", None) for module in modules]
    if all(bias is None for bias in biases):
        return None
    parts = [
        read(module, "weight").new_zeros(len(read(module, "weight"))) if bias is None else bias.detach()
        for module, bias in zip(modules, biases, strict=True)
    ]
    return _joined(parts)


def _product(
    weight: torch.Tensor, bias: torch.Tensor | None, native: Native | None
) -> tuple[Product, Callable[[], torch.Tensor]]:
    """The fastest product that is to be had with a weight [d_out, d_in], and a way to read the weight."""
    if native is not None and weight.device.type == "cpu" and weight.dtype in FORMATS:
        packed = PackedLinear(weight, bias, native)
        return packed, packed.weight
    if _is_packable(weight):
        return _pack(weight, bias)
    return lambda x: functional.linear(x, weight, bias), lambda: weight


def _is_packable(weight: torch.Tensor) -> bool:
    """Whether oneDNN's packed product is to be had for a weight; on other processors it was not measured."""
    return (
        weight.device.type == "cpu"
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _packs_bfloat16()))
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and platform.machine() in ("x86_64", "AMD64")
    )


def _packs_bfloat16() -> bool:
    """Whether the processor has the instructions that oneDNN wants for it."""
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001 - no public name
    return supported


def _pack(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[Product, Callable[[], torch.Tensor]]:
    """The product with the weight in oneDNN's own layout.

    On small batches `F.linear` lays the weight out anew in every call; packed once, it is about twice as fast. The
    module's own copy is dropped with the module.
    """
    onednn = torch.ops.mkldnn
    packed: torch.Tensor = onednn._reorder_linear_weight(weight.contiguous(), _PACKED_ROWS)  # noqa: SLF001
    multiply = onednn._linear_pointwise.default  # noqa: SLF001 - PyTorch has no public name for either

    def product(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = multiply(x, packed, bias, "none", [], "")
        return y

    return product, packed.to_dense
