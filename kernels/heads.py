"""An output head: what makes a classifier's logits of one vector of a prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """x W^T + b; weight: float32 [labels, hidden], bias: float32 [labels] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> Head:
        """One of weights of any float dtype."""
        return cls(weight.float(), None if bias is None else bias.float())

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: float32 [n, hidden] -> [n, labels]. On a CPU row by row: several at once may be summed otherwise."""
        parts = torch.split(x, 1) if x.device.type == "cpu" else [x]
        return torch.cat([functional.linear(part, self.weight, self.bias) for part in parts])

    def to(self, device: torch.device) -> Head:
        """The same on a device."""
        return Head(self.weight.to(device), None if self.bias is None else self.bias.to(device))
