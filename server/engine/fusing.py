"""Which modules of a model can run functions that are faster than their classes' own.

One is recognised by its make-up, whatever its class is called, and proven by numbers of all magnitudes: it goes on as
it is where no candidate gives the same. Modules keep their names, parameters and hooks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from weft.kernels.pointwise import ActivationKind, NormKind, Pointwise, RotaryStyle, Rotate
from weft.server.engine.attention import WholePrompt
from weft.server.engine.fused import Around, Attention, Direct, Heads, Layer, Mlp, ParallelLayer
from weft.server.engine.linear import FrozenLinear, Joint, read
from weft.server.engine.proving import (
    TOLERANCE,
    Attended,
    Call,
    Outcome,
    Unlike,
    error_between,
    try_out,
    with_function,
    with_its_own,
)
from weft.server.engine.step import running

Function = Callable[..., Any]

_NUM_TOKENS = 7
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
_NORM_KINDS = [NormKind(bits) for bits in (4, 0, 2, 1, 3, 5, 6, 7)]
_STYLES = [RotaryStyle(bits) for bits in range(4)]
_ACTIVATIONS: dict[ActivationKind, Callable[[torch.Tensor], torch.Tensor]] = {
    ActivationKind.SILU: functional.silu,
    ActivationKind.GELU: functional.gelu,
    ActivationKind.GELU_TANH: partial(functional.gelu, approximate="tanh"),
}


class Fusion:
    """The modules that run faster functions than their classes' own.

    fused: the function of each, by the module's name.
    """

    def __init__(self, model: nn.Module, pointwise: Pointwise, max_position: int, device: torch.device) -> None:
        """Find and prove them. model: with its products frozen, and its hooks in place."""
        self._model = model
        self._pointwise = pointwise
        self._chosen: dict[type[nn.Module], int | None] = {}
        self.fused: dict[str, Function] = {}
        self._calls = _watch(model, max_position, pointwise.dtypes, device)
        for name, call in reversed(self._calls.items()):  # a part comes before the part that it is in
            module = model.get_submodule(name)
            function = self._find(module, call) if self._chosen.get(type(module), 0) is not None else None
            if function is not None:
                with_function(module, function)
                self.fused[name] = function

    def undo(self) -> None:
        """Have every module run its class's own function again."""
        for name in self.fused:
            with_its_own(self._model.get_submodule(name))
        self.fused.clear()

    def prove_again(self) -> str:
        """The first module whose function is its own no more, now that what it is made of has changed; "" for none."""
        for name, function in self.fused.items():
            module, call = self._model.get_submodule(name), self._calls[name]
            with_its_own(module)
            expected = try_out(module, call)
            error = _error(module, function, call, expected)
            with_function(module, function)
            if not error <= _limit(expected):
                return name
        return ""

    def _find(self, module: nn.Module, call: Call) -> Function | None:
        """The candidate that is nearest to the module's own function, if it is near enough.

        The first is tried that was chosen for the class before; a class for which none did is not tried again.
        """
        try:
            expected = try_out(module, call)
        except (Unlike, *_FAILURES):
            return None
        candidates = list(enumerate(_candidates(module, call, expected, self._pointwise)))
        last = self._chosen.setdefault(type(module), None)
        candidates.sort(key=lambda candidate: candidate[0] != last)
        limit = _limit(expected)
        errors: dict[int, float] = {}
        for index, candidate in candidates:
            errors[index] = _error(module, candidate, call, expected)
            if errors[index] <= limit / 10:
                break
        best = min(errors, key=lambda index: errors[index], default=None)
        if best is None or not errors[best] <= limit:
            return None
        self._chosen[type(module)] = best
        return dict(candidates)[best]


def _watch(
    model: nn.Module, max_position: int, dtypes: frozenset[torch.dtype], device: torch.device
) -> dict[str, Call]:
    """How the model calls the modules that may be replaced, of those that it calls once."""
    calls: dict[str, list[Call]] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(name, []).append(Call(args, kwargs, max_position))

    handles = [
        module.register_forward_pre_hook(partial(note, name), with_kwargs=True)
        for name, module in model.named_modules()
        if _is_norm(module, dtypes)
        or len(_joints(module)) == 2
        or any(len(_joints(child)) == 2 for child in module.children())
    ]
    positions = torch.arange(min(_NUM_TOKENS, max_position), device=device)[None]
    try:
        with running(WholePrompt()):
            model(input_ids=positions, position_ids=positions, use_cache=False, return_dict=True)
    finally:
        for handle in handles:
            handle.remove()
    names = (name for name, _ in model.named_modules())
    return {name: calls[name][0] for name in names if len(calls.get(name, ())) == 1}


def _error(module: nn.Module, candidate: Function, call: Call, expected: Outcome) -> float:
    with_function(module, candidate)
    try:
        return error_between(try_out(module, call), expected)
    except _FAILURES:
        return float("inf")
    finally:
        with_its_own(module)


def _limit(expected: Outcome) -> float:
    output = expected.output[0] if isinstance(expected.output, tuple) else expected.output
    return TOLERANCE.get(output.dtype, 0.0) if isinstance(output, torch.Tensor) else 0.0


def _is_norm(module: nn.Module, dtypes: frozenset[torch.dtype]) -> bool:
    """Whether a module has a weight, maybe a bias, for each number of a row; PyTorch's own norms are one operation."""
    parameters = dict(module.named_parameters())
    return (
        "weight" in parameters
        and parameters.keys() <= {"weight", "bias"}
        and all(parameter.dim() == 1 and parameter.dtype in dtypes for parameter in parameters.values())
        and not type(module).__module__.startswith("torch.")
        and not any(module.children())
    )


def _joints(module: nn.Module) -> list[Joint]:
    """The products that a module is made of."""
    return list(dict.fromkeys(child.joint for child in module.children() if isinstance(child, FrozenLinear)))


def _candidates(module: nn.Module, call: Call, seen: Outcome, pointwise: Pointwise) -> Iterator[Function]:
    """Functions that may be the module's own, by what it holds and what was seen of it."""
    if _is_norm(module, pointwise.dtypes):
        yield from _norms(module, pointwise)
    elif len(_joints(module)) != 2:
        yield from _layers(module, pointwise.dtypes)
    elif len(seen.attended) == 1:
        yield from _attentions(module, call, seen.attended[0], pointwise)
    elif not seen.attended:
        yield from _mlps(module, pointwise)


def _norms(module: Any, pointwise: Pointwise) -> Iterator[Function]:
    sizes = [value for name, value in vars(module).items() if "eps" in name and isinstance(value, float)]
    for eps, kind in itertools.product(sizes, _NORM_KINDS):
        yield pointwise.norm(module.weight, getattr(module, "bias", None), eps, kind)


def _mlps(module: nn.Module, pointwise: Pointwise) -> Iterator[Function]:
    kinds = [kind for kind in map(_activation_of, module.children()) if kind is not None]
    for (first, last), kind in itertools.product(itertools.permutations(_joints(module)), kinds):
        if first.d_out == 2 * last.d_in:
            for gate_first in (True, False):
                yield Mlp(first, pointwise.activation(kind, gated=True, gate_first=gate_first), last)
        elif first.d_out == last.d_in:
            yield Mlp(first, pointwise.activation(kind, gated=False), last)


def _activation_of(module: nn.Module) -> ActivationKind | None:
    """Which activation a module is."""
    if any(True for _ in module.parameters()) or isinstance(module, (FrozenLinear, nn.Dropout)):
        return None
    x = torch.linspace(-8, 8, 1001)
    try:
        y = module(x)
    except _FAILURES:
        return None
    return next((kind for kind, function in _ACTIVATIONS.items() if error_between(y, function(x)) <= 1e-6), None)


def _attentions(module: nn.Module, call: Call, seen: Attended, pointwise: Pointwise) -> Iterator[Function]:
    (heads, _, head_dim), (kv_heads, _, value_dim) = seen.query.shape, seen.value.shape
    own = Heads(seen.layer, heads, kv_heads, head_dim, value_dim, seen.options)
    for projection, output in itertools.permutations(_joints(module)):
        if (projection.d_out, output.d_in) == (own.width, heads * value_dim):
            for normed, rotary in itertools.product(
                _with_norms(module, own, pointwise.dtypes), _rotaries(call, head_dim, seen.query.dtype, pointwise)
            ):
                yield Attention(projection, output, normed, rotary)


def _norms_in(module: nn.Module, dtypes: frozenset[torch.dtype]) -> tuple[nn.Module, ...]:
    return tuple(child for child in module.children() if isinstance(child, nn.LayerNorm) or _is_norm(child, dtypes))


def _with_norms(module: nn.Module, own: Heads, dtypes: frozenset[torch.dtype]) -> Iterator[Heads]:
    norms = _norms_in(module, dtypes)
    if len(norms) == 2:
        sizes = [read(norm, "weight").numel() for norm in norms]
        if sizes == [own.head_dim, own.head_dim]:
            yield replace(own, norms=tuple(map(Direct, norms)), norms_by_head=True)
        if sizes == [own.queries, own.keys_end - own.queries]:
            yield replace(own, norms=tuple(map(Direct, norms)), norms_by_head=False)
    yield own


def _rotaries(call: Call, head_dim: int, dtype: torch.dtype, pointwise: Pointwise) -> Iterator[Rotate | None]:
    tables = call.kwargs.get("position_embeddings")
    if isinstance(tables, tuple) and {table.dtype for table in tables} == {dtype}:
        width = tables[0].shape[-1]
        for style, rotary_dim in itertools.product(_STYLES, (width, 2 * width)):
            if rotary_dim <= head_dim and rotary_dim % 2 == 0:
                yield pointwise.rotary(head_dim, rotary_dim, style)
    yield None


def _layers(module: nn.Module, dtypes: frozenset[torch.dtype]) -> Iterator[Function]:
    """Of a module that holds fused attention, norms, and one part more."""
    norms = [Direct(norm) for norm in _norms_in(module, dtypes)]
    others = [child for child in module.children() if _computes(child) and child not in _norms_in(module, dtypes)]
    attentions = [child.forward for child in others if isinstance(child.forward, Attention)]
    mlps = [child for child in others if not isinstance(child.forward, Attention)]
    if len(attentions) != 1 or len(mlps) != 1:
        return
    mlp = mlps[0].forward if isinstance(mlps[0].forward, Mlp) else mlps[0]
    if len(norms) == 1:
        yield ParallelLayer(attentions[0], mlp, norms[0])
    places: list[tuple[tuple[Direct, ...], tuple[Direct, ...]]] = []
    if len(norms) == 2:
        places = [(tuple(norms), ()), ((), tuple(norms))]
    if len(norms) == 4:
        places = [(tuple(norms[::2]), tuple(norms[1::2]))]
    scales = [1.0, *(value for value in vars(module).values() if isinstance(value, float))]
    for (before, after), scale in itertools.product(places, scales):
        yield Layer(attentions[0], mlp, Around(before, after, scale))


def _computes(module: nn.Module) -> bool:
    return any(isinstance(part, FrozenLinear) or part._parameters for part in module.modules())  # noqa: SLF001 - its own alone
