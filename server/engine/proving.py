"""Whether another function of a module is its own: the same numbers, and the same for adapters and attention to see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import nn

from weft.server.engine.attention import WholePrompt
from weft.server.engine.step import AttentionOptions, running

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest error allowed in any row, as ‖ours - theirs‖ / ‖theirs‖."""

_MAGNITUDES = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
_ADAPTED = 0.75


class Unlike(Exception):
    """A module is called with something that no trial can stand in for."""


@dataclass(frozen=True, slots=True)
class Call:
    """How the model calls one of its modules. max_position: ends the numbers that stand in for whole ones."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    max_position: int

    def drawn(self) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Arguments like these, with numbers of all magnitudes, the same each time. Raises Unlike."""
        generator = torch.Generator().manual_seed(0)

        def draw(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return _draw(value, self.max_position, generator)
            if isinstance(value, tuple):
                return tuple(map(draw, value))
            if value is None or isinstance(value, (bool, int, float, str)):
                return value
            raise Unlike(f"an argument is a {type(value).__name__}")

        return draw(self.args), {key: draw(value) for key, value in self.kwargs.items()}


@dataclass(frozen=True, slots=True)
class Attended:
    """What a layer asked of its attention."""

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: AttentionOptions


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a module gave, and what it let adapters and attention see, in order, by modules' names."""

    output: Any
    adapted: Mapping[tuple[str, ...], list[tuple[list[torch.Tensor], list[torch.Tensor]]]]
    attended: Sequence[Attended]


class _Trial(WholePrompt):
    """Notes all that it is asked for, and changes what adapters may change."""

    def __init__(self) -> None:
        super().__init__()
        self.adapted: dict[tuple[str, ...], list[tuple[list[torch.Tensor], list[torch.Tensor]]]] = {}
        self.attended: list[Attended] = []

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        self.attended.append(Attended(layer, query.clone(), key.clone(), value.clone(), options))
        return value.repeat_interleave(len(query) // len(value), 0).transpose(0, 1)

    def adapt(self, modules: tuple[str, ...], inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        seen = [tensor.clone() for tensor in inputs], [tensor.clone() for tensor in outputs]
        self.adapted.setdefault(modules, []).append(seen)
        for output in filter(torch.is_floating_point, outputs):
            output.mul_(_ADAPTED)


def try_out(module: nn.Module, call: Call) -> Outcome:
    """Call the module as the model does, with other numbers. Raises Unlike."""
    args, kwargs = call.drawn()
    step = _Trial()
    with running(step):
        output = module(*args, **kwargs)
    return Outcome(output, step.adapted, step.attended)


def with_function(module: nn.Module, function: Callable[..., Any]) -> None:
    """Have the module, with its name, parameters and hooks as they are, run another function than its class's."""
    module.__dict__["forward"] = function


def with_its_own(module: nn.Module) -> None:
    """Have the module run its class's function again."""
    module.__dict__.pop("forward", None)


def error_between(ours: Any, theirs: Any) -> float:
    """The largest relative error of any row of any tensor; infinite where anything else differs."""
    if isinstance(theirs, torch.Tensor):
        return _row_error(ours, theirs) if isinstance(ours, torch.Tensor) else float("inf")
    if ours is theirs:
        return 0.0
    if type(ours) is not type(theirs):
        return float("inf")
    if isinstance(theirs, dict):
        ours, theirs = [list(ours), *ours.values()], [list(theirs), *theirs.values()]
        ours[0], theirs[0] = sorted(ours[0]), sorted(theirs[0])
    elif is_dataclass(theirs):
        ours, theirs = ([getattr(each, part.name) for part in fields(each)] for each in (ours, theirs))
    if not isinstance(theirs, (tuple, list)):
        return 0.0 if ours == theirs else float("inf")
    if len(ours) != len(theirs):
        return float("inf")
    return max((error_between(mine, other) for mine, other in zip(ours, theirs, strict=True)), default=0.0)


def _row_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    away = (ours.double() - theirs.double()).norm(dim=-1)
    error = away / theirs.double().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return float(error.max().nan_to_num(nan=float("inf")))


def _draw(like: torch.Tensor, max_position: int, generator: torch.Generator) -> torch.Tensor:
    if not like.is_floating_point():
        drawn = torch.randint(max_position, like.shape, generator=generator)
        drawn[..., :1] = max_position - 1
        return drawn.to(like)
    rows = like.shape[-2] if like.dim() > 1 else 1
    magnitudes = torch.tensor(_MAGNITUDES).repeat(1 + rows // len(_MAGNITUDES))[:rows, None]
    return (torch.randn(like.shape, generator=generator) * magnitudes).to(like)
