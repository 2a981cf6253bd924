"""What `pointwise.py` does in the C library, by PyTorch's compiler: for a GPU, each in one kernel.

Rows are a dimension of no known size, so that one kernel serves any number of them; all else is known to the compiler.
Nothing is compiled before `compile` is called: until then the same functions run as they are written.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from weft.kernels.pointwise import ActivationKind, NormKind, RotaryStyle

Function = Callable[..., Any]

_ACTIVATIONS: dict[ActivationKind, Callable[[torch.Tensor], torch.Tensor]] = {
    ActivationKind.SILU: functional.silu,
    ActivationKind.GELU: functional.gelu,
    ActivationKind.GELU_TANH: partial(functional.gelu, approximate="tanh"),
}


class CompiledPointwise:
    """Makes norms, rotary embeddings and activations that are compiled together, later."""

    dtypes: frozenset[torch.dtype] = frozenset({torch.float32, torch.bfloat16, torch.float16})

    def __init__(self) -> None:
        self._functions: dict[Function, Function] = {}

    def check(self, device: torch.device) -> None:
        """Raises what PyTorch raises where it can't compile for a device: no compiler, as a rule."""
        _compiled(operator.neg)(_any_rows(torch.ones(2, 2, device=device)))

    def compile(self) -> None:
        """From now on, run what was made compiled: each function when it is first called."""
        self._functions = {function: _compiled(function) for function in (_norm, _rotate, _activate)}

    def call(self, function: Function, *args: object) -> Any:
        return self._functions.get(function, function)(*args)

    def norm(self, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, kind: NormKind) -> Norm:
        return Norm(self, weight, bias, eps, kind)

    def rotary(self, head_dim: int, rotary_dim: int, style: RotaryStyle) -> Rotary:
        return Rotary(self, head_dim, rotary_dim, style)

    def activation(self, kind: ActivationKind, *, gated: bool, gate_first: bool = True) -> Activation:
        return Activation(self, kind, gated=gated, gate_first=gate_first)


class Norm:
    """As `pointwise.Norm`."""

    def __init__(
        self, made_by: CompiledPointwise, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, kind: NormKind
    ) -> None:
        self._call = made_by.call
        self._weight, self._bias = weight.detach(), None if bias is None else bias.detach()
        self._how = eps, int(kind)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., size] of the weight's dtype -> the same shape. Raises ValueError for another x."""
        if x.dtype != self._weight.dtype or x.shape[-1] != len(self._weight):
            raise ValueError(f"a norm of {len(self._weight)} numbers is not for {tuple(x.shape)} in {x.dtype}")
        y: torch.Tensor = self._call(_norm, _any_rows(x), self._weight, self._bias, *self._how)
        return y.view(x.shape)


class Rotary:
    """As `pointwise.Rotary`."""

    def __init__(self, made_by: CompiledPointwise, head_dim: int, rotary_dim: int, style: RotaryStyle) -> None:
        self._call = made_by.call
        self._how = head_dim, rotary_dim, int(style)
        self._table_dim = rotary_dim // 2 if style & RotaryStyle.SHARED else rotary_dim

    def __call__(self, x: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """In place. x: [..., n], dense; cos, sin: [..., d]. Raises ValueError for tables that are too narrow."""
        if cos.shape != sin.shape or cos.shape[-1] < self._table_dim:
            raise ValueError(f"tables {tuple(cos.shape)}, {tuple(sin.shape)} are too narrow")
        self._call(_rotate, *map(_any_rows, (x, cos, sin)), heads, *self._how)


class Activation:
    """As `pointwise.Activation`."""

    def __init__(self, made_by: CompiledPointwise, kind: ActivationKind, *, gated: bool, gate_first: bool) -> None:
        self._call = made_by.call
        self._how = int(kind), gated, gate_first

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., 2 * size] -> [..., size]; not gated, [..., size] -> [..., size]."""
        y: torch.Tensor = self._call(_activate, _any_rows(x), *self._how)
        return y.view(*x.shape[:-1], y.shape[-1])


def _compiled(function: Function) -> Function:
    """Products and sums are rounded where they are without: or a number would depend on whether this is on."""
    compiled: Function = torch.compile(
        function, dynamic=False, fullgraph=True, options={"emulate_precision_casts": True}
    )
    return compiled


def _any_rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., n] as [rows, n], of which the compiler is not to know how many, nor that it is not one."""
    rows = x.reshape(-1, x.shape[-1])
    torch._dynamo.decorators.mark_unbacked(rows, 0)  # noqa: SLF001 - mark_dynamic, the public one, compiles anew for one
    return rows


def _norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, kind: int) -> torch.Tensor:
    v = x.float()
    if kind & NormKind.CENTERED:
        v = v - v.mean(-1, keepdim=True)
    v = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + eps)
    if kind & NormKind.ROUNDED_FIRST:
        v = v.to(x.dtype).float()
    v = v * (weight.float() + 1 if kind & NormKind.PLUS_ONE else weight.float())
    return (v if bias is None else v + bias.float()).to(x.dtype)


def _rotate(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    head_dim: int,
    rotary_dim: int,
    style: int,
) -> None:
    half = rotary_dim // 2
    if style & RotaryStyle.INTERLEAVED:
        first, second = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    else:
        first, second = slice(0, half), slice(half, rotary_dim)
    by_head = x[:, : heads * head_dim].unflatten(-1, (heads, head_dim))  # type: ignore[no-untyped-call]
    of_first, of_second = (slice(0, half),) * 2 if style & RotaryStyle.SHARED else (first, second)
    low, high = by_head[..., first], by_head[..., second]
    turned_low = low * cos[:, None, of_first] - high * sin[:, None, of_first]
    turned_high = high * cos[:, None, of_second] + low * sin[:, None, of_second]
    by_head[..., first] = turned_low
    by_head[..., second] = turned_high


def _activate(x: torch.Tensor, kind: int, gated: bool, gate_first: bool) -> torch.Tensor:
    act = _ACTIVATIONS[ActivationKind(kind)]
    if not gated:
        return act(x)
    gate, up = x.chunk(2, dim=-1) if gate_first else reversed(x.chunk(2, dim=-1))
    return act(gate) * up
