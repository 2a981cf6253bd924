"""Bases described by hand, for tests that need no model."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from weft.adapters.base import Base, BaseModule, ModuleKind


def linear_base(shapes: Mapping[str, tuple[int, int]]) -> Base:
    """Linear modules of these (d_in, d_out), with zeros for weights."""
    return Base(
        {name: _linear(d_in, d_out) for name, (d_in, d_out) in shapes.items()},
        groups=tuple((name,) for name in shapes),
    )


def _linear(d_in: int, d_out: int) -> BaseModule:
    return BaseModule(
        kind=ModuleKind.LINEAR,
        d_in=d_in,
        d_out=d_out,
        shapes={"weight": (d_out, d_in)},
        read=lambda key: torch.zeros(d_out, d_in),
        own=lambda parameters: lambda x: x @ parameters["weight"].t(),
    )
