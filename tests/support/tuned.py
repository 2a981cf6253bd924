"""Full fine-tunes of tiny models, drawn rather than trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

SHARD = "60KB"
"""So that a tiny model has several."""


def tune(model: PreTrainedModel, changes: Callable[[str], bool], size: float = 0.02) -> PreTrainedModel:
    """A copy with noise on the parameters whose names are chosen; the model is not touched."""
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if changes(name):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return tuned


def save(model: PreTrainedModel, folder: Path) -> Path:
    """As several shards."""
    model.save_pretrained(folder, max_shard_size=SHARD)
    return folder


def is_projection(name: str) -> bool:
    """Whether this is the weight of a linear module of a Llama's layers."""
    return "_proj" in name
