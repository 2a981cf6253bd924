"""What an adapter does to a module beyond the rank rows in its pages.

A patch takes the rows of one step that use its adapter: what went into the module, and what the base made of it. It is
applied before the rank rows are added, and never sees a row of another adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Protocol

import torch

Rows = Sequence[torch.Tensor]
"""What went into a module, one tensor an argument, the first dimension of each being the step's rows."""


Output = torch.Tensor | tuple[torch.Tensor, ...]
"""What a module gives: one tensor, or several where it is a router."""


class Patch(Protocol):
    """One change of one module's output.

    is_sum: whether it adds a term that is linear in the adapter's weight, as a weighted mix needs.
    """

    @property
    def is_sum(self) -> bool: ...

    def apply(self, y: torch.Tensor, inputs: Rows, weight: float) -> Output:
        """The module's output for these rows, given the base's, y [n, d_out], and the adapter's weight in the mix."""

    def to(self, device: torch.device) -> Patch:
        """The same on a device; itself where it is there already."""


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """y + gain * y + shift; gain, shift: float32 [d_out]. What DoRA's magnitudes and trained biases come to."""

    gain: torch.Tensor
    shift: torch.Tensor
    is_sum: bool = False

    def apply(self, y: torch.Tensor, inputs: Rows, weight: float) -> torch.Tensor:
        return (y + (self.gain * y + self.shift)).to(y.dtype)

    def to(self, device: torch.device) -> Affine:
        return Affine(self.gain.to(device), self.shift.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """y + weight * scale * (x A^T) B for a module without pages; a: [r, d_in], b: [r, d_out]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    is_sum: bool = True

    def apply(self, y: torch.Tensor, inputs: Rows, weight: float) -> torch.Tensor:
        return torch.addmm(y, inputs[0] @ self.a.t(), self.b, alpha=self.scale * weight)

    def to(self, device: torch.device) -> LowRank:
        return replace(self, a=self.a.to(device), b=self.b.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingLowRank:
    """y + weight * scale * A[ids] B; a: [num_embeddings, r], b: [r, d_out]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    is_sum: bool = True

    def apply(self, y: torch.Tensor, inputs: Rows, weight: float) -> torch.Tensor:
        return torch.addmm(y, self.a[inputs[0]], self.b, alpha=self.scale * weight)

    def to(self, device: torch.device) -> EmbeddingLowRank:
        return replace(self, a=self.a.to(device), b=self.b.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """Other embeddings for some tokens; ids: int64 [n] ascending, rows: [n, d_out]."""

    ids: torch.Tensor
    rows: torch.Tensor
    is_sum: bool = False

    def apply(self, y: torch.Tensor, inputs: Rows, weight: float) -> torch.Tensor:
        at = torch.searchsorted(self.ids, inputs[0]).clamp_(max=len(self.ids) - 1)
        return torch.where((self.ids[at] == inputs[0])[:, None], self.rows[at], y)

    def to(self, device: torch.device) -> TokenRows:
        return TokenRows(self.ids.to(device), self.rows.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class TokenColumns:
    """Other logits for some tokens: y[:, ids] = x rows^T; ids: int64 [n], rows: [n, d_in]."""

    ids: torch.Tensor
    rows: torch.Tensor
    is_sum: bool = False

    def apply(self, y: torch.Tensor, inputs: Rows, weight: float) -> torch.Tensor:
        return y.index_copy(1, self.ids, inputs[0] @ self.rows.t())

    def to(self, device: torch.device) -> TokenColumns:
        return TokenColumns(self.ids.to(device), self.rows.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class Own:
    """The module itself with other parameters. make: gives the function of its inputs, from the parameters by name."""

    make: Callable[[Mapping[str, torch.Tensor]], Callable[..., Output]]
    parameters: Mapping[str, torch.Tensor]
    is_sum: bool = False
    _run: Callable[..., Output] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_run", self.make(self.parameters))

    def apply(self, y: torch.Tensor, inputs: Rows, weight: float) -> Output:
        return self._run(*inputs)

    def to(self, device: torch.device) -> Own:
        return replace(self, parameters={name: tensor.to(device) for name, tensor in self.parameters.items()})


def tensors_of(patch: Patch) -> list[torch.Tensor]:
    """What a patch holds in memory."""
    held: list[object] = []
    for part in fields(patch):  # type: ignore[arg-type]
        value = getattr(patch, part.name)
        value = getattr(value, "tensors", value)
        held += value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else [value]
    return [item for item in held if isinstance(item, torch.Tensor)]
