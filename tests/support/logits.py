"""Logits of one prompt, by Weft with adapters of any folder, to be held against others."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from harness import Harness

from weft.adapters.records import NewAdapter
from weft.adapters.sources import Sources
from weft.server.engine.request import Request

PROMPT = (1, 70, 80, 90, 100)


class Served:
    """A base that adapters come to as they are made."""

    def __init__(self, base: Path, root: Path) -> None:
        """root: of the adapters' folders."""
        self._harness = Harness(base, sources=Sources([root]))
        self._numbers = itertools.count()

    def logits(self, *adapters: tuple[Path, float]) -> torch.Tensor:
        """With the weighted sum of adapters."""
        named = [(f"a{next(self._numbers)}", folder, weight) for folder, weight in adapters]
        for name, folder, _ in named:
            self._harness.store.create(NewAdapter(name, f"file:{folder}"))
        return self._harness.logits([Request("r", PROMPT, tuple((name, weight) for name, _, weight in named))], 64)[0]


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To what float32 has left after a few layers."""
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
