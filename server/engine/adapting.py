"""Adapters at work: what a step's plan does to one module's output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weft.kernels.bottleneck import NativeBottleneck, together_of
from weft.kernels.lora import AddLora
from weft.kernels.plan import Plan
from weft.kernels.site import SiteGroup
from weft.server.engine.step import RESIDUAL, current_step


@dataclass(frozen=True, slots=True)
class Adapting:
    """Where the adapters' rows are, by the modules that share a product, and the kernel that adds them."""

    groups: Mapping[tuple[str, ...], SiteGroup]
    add_lora: AddLora

    def adapt(
        self, plan: Plan, modules: tuple[str, ...], inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
    ) -> None:
        """Change the outputs' rows in place: first each adapter's patches of the modules, then all rank rows."""
        rows = [rows_of(tensor, plan.num_tokens) for tensor in outputs]
        group = self.groups.get(modules)
        for index, module in enumerate(modules if plan.patches else ()):
            wholes = rows if len(modules) == 1 or group is None else [rows[0][:, group.sites[index].columns]]
            for patched in plan.patches.get(module, ()):
                if isinstance(patched.patch, NativeBottleneck):
                    continue
                mine = [rows_of(tensor, plan.num_tokens)[patched.rows] for tensor in inputs]
                made = patched.patch.apply(wholes[0][patched.rows], mine, patched.weight)
                for whole, part in zip(wholes, as_tuple(made), strict=True):
                    whole[patched.rows] = part
            if (bottlenecks := plan.layout(together_of).get(module)) is not None:
                bottlenecks.add(wholes[0], rows_of(inputs[-1], plan.num_tokens))
        if group is not None:
            self.add_lora(rows[0], rows_of(inputs[0], plan.num_tokens), group, plan)


def as_tuple(output: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """What a module gave; a router gives several tensors."""
    return output if isinstance(output, tuple) else (output,)


def rows_of(tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    """[1, T, ...] or [T, ...] as [T, ...]; a view. Of one row of one number only ids have a batch before it."""
    is_batched = tensor.dim() > 2 or (tensor.dim() == 2 and not tensor.is_floating_point())
    return tensor[0] if is_batched and tensor.shape[:2] == (1, num_rows) else tensor


def let_adapt(model: nn.Module, names: Iterable[str]) -> None:
    """Have the running step change what these modules give."""
    for name in names:
        model.get_submodule(name).register_forward_hook(_Hook(name))


def keep_residual(model: nn.Module, norms: Iterable[str]) -> None:
    """Have the running step keep the residual stream that these norms read, for the sub-layers behind them."""
    for name in norms:
        model.get_submodule(name).register_forward_hook(_keep)


def _keep(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
    step = current_step()
    if step is not None:
        step.shared[RESIDUAL] = (inputs[0],)


@dataclass(frozen=True, slots=True)
class _Hook:
    name: str

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        step = current_step()
        if step is not None:
            step.adapt((self.name,), inputs, as_tuple(output))
