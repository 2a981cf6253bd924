"""Experts as transformers stores them, a stack of weights a projection, with low-rank terms of an adapter's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

_WEIGHTS = ({"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"})
_MARKS = ("has_gate", "has_bias", "is_transposed")


def are_experts(module: nn.Module) -> bool:
    """Whether a module is a stack of experts in the layout that transformers' expert functions share."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    return (
        any(weights <= names <= weights | {f"{name}_bias" for name in weights} for weights in _WEIGHTS)
        and all(hasattr(module, mark) for mark in _MARKS)
        and not getattr(module, "has_post_expert_norm", False)
    )


@dataclass(frozen=True, slots=True)
class LowRankExperts:
    """The function of a stack of experts whose weights have low-rank terms added.

    terms: by the weight's name, `name.a` [experts, r, d_in] and `name.b` [experts, d_out, r]; may be of some only.
    """

    experts: Any
    terms: Mapping[str, torch.Tensor]

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x: [n, d], chosen: int64 [n, k], the experts of each row, weights: [n, k] -> [n, d]."""
        chosen, weights = chosen.view(len(x), -1), weights.view(len(x), -1)  # one expert of one row may come flat
        y = torch.zeros_like(x)
        for expert in torch.unique(chosen).tolist():
            rows, place = torch.where(chosen == expert)
            made = self._run(expert, x[rows]) * weights[rows, place, None]
            y.index_add_(0, rows, made.to(y.dtype))
        return y

    def _run(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        if self.experts.has_gate:
            inner = self.experts._apply_gate(self._product("gate_up_proj", expert, x))  # noqa: SLF001 - theirs to share
        else:
            inner = self.experts.act_fn(self._product("up_proj", expert, x))
        return self._product("down_proj", expert, inner)

    def _product(self, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        weight = getattr(self.experts, name)[expert]
        y = x @ weight if self.experts.is_transposed else functional.linear(x, weight)
        if self.experts.has_bias:
            y = y + getattr(self.experts, f"{name}_bias")[expert]
        if f"{name}.a" not in self.terms:
            return y
        a, b = self.terms[f"{name}.a"][expert], self.terms[f"{name}.b"][expert]
        return torch.addmm(y, x @ a.t(), b.t())
