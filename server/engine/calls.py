"""What a model does with its modules, seen while it runs one short prompt."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

NUM_TOKENS = 7
"""Of the prompt; no usual number of heads or experts."""


@dataclass(slots=True)
class Calls:
    """What was seen of one module. order: at which place among the calls of all."""

    clock: Iterator[int]
    count: int = 0
    order: int = 0
    inputs: tuple[Any, ...] = ()
    output: Any = field(default=None)

    def note(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.count += 1
        self.order = next(self.clock)
        self.inputs, self.output = inputs, output

    @property
    def is_by_row(self) -> bool:
        """Whether the module saw every row of the prompt once, and gave one for each."""
        outputs = self.output if isinstance(self.output, tuple) else (self.output,)
        return self.count == 1 and bool(self.inputs) and all(map(_has_a_row_a_token, (*self.inputs, *outputs)))


@contextmanager
def watch(model: nn.Module) -> Iterator[dict[str, Calls]]:
    """What every module that has parameters of its own, not its children's, is called with."""
    clock = itertools.count()
    calls = {path: Calls(clock) for path, module in model.named_modules() if module._parameters}  # noqa: SLF001 - no public name
    handles = [model.get_submodule(path).register_forward_hook(seen.note) for path, seen in calls.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _has_a_row_a_token(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (
        value.shape[:2] == (1, NUM_TOKENS) or (value.dim() > 0 and value.shape[0] == NUM_TOKENS)
    )
