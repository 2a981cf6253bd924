"""The seam between transformers' modules and the step that is running through them.

While a model runs, its attention layers and every module that an adapter may change find the running step in a context
variable, and let it do their work.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What a layer asks of its attention: scale of the scores, window in tokens, tanh soft cap, sink logits [heads].

    causal: whether a token sees none that comes after it; else the window is as wide on that side.
    """

    scaling: float | None
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None
    causal: bool = True


Shared = MutableMapping[Hashable, tuple[torch.Tensor, ...]]

RESIDUAL = "residual"
"""The key in `Step.shared` of the residual stream, as the last norm saw it that reads it before a sub-layer."""


Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, AttentionOptions], torch.Tensor]
"""Attention of one layer, by its number: query [heads, T, d], key [kv_heads, T, d], value [kv_heads, T, d_v] ->
[T, heads, d_v]."""


class Step(Protocol):
    """What is running: it attends for one layer at a time, and does what adapters do to a module at a time.

    shared: what modules that read the same x have made of it so far, by their joint product: (x, y); and the residual
    stream, as (x,).
    """

    shared: Shared

    @property
    def attend(self) -> Attend: ...

    def adapt(self, modules: tuple[str, ...], inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """Change, in place, what the base's module of this name made of its inputs.

        One row a token: inputs and outputs are [1, T, ...] or [T, ...], T the rows that the module sees. Several are
        linear modules that read the same input: their one output has the columns of all. The residual stream comes last
        among the inputs of a module whose output is added to it.
        """
        ...


_step: ContextVar[Step | None] = ContextVar("weft_step", default=None)


def current_step() -> Step | None:
    """The step whose forward pass this is; None outside of one."""
    return _step.get()


@contextmanager
def running(step: Step) -> Iterator[None]:
    """Make `step` the one that attention and adapters work for, for the length of one forward pass."""
    if _step.get() is not None:
        raise RuntimeError("a step is running already")
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)
