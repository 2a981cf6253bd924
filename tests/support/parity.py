"""One class of model, served, beside its plain self."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness import Harness
from transformers import PreTrainedModel

from weft.server.engine.request import Request, Stopping

NEW_TOKENS = 48


@dataclass
class Case:
    """One class: its plain model, its engine, and its adapters (None: the base)."""

    model: PreTrainedModel
    harness: Harness
    adapters: dict[str | None, Path | None]

    def request(self, prompt: list[int], adapter: str | None, name: str = "r", **stopping: object) -> Request:
        limits = {"max_tokens": NEW_TOKENS, "ignore_eos": True, **stopping}
        return Request(name, tuple(prompt), ((adapter, 1.0),) if adapter else (), stopping=Stopping(**limits))
