"""The output head that a sequence classifier's file holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from weft.adapters.base import Base
from weft.adapters.classes import read_classes
from weft.adapters.content import OwnHead, is_finite
from weft.adapters.tensors import DTYPES
from weft.errors import InvalidAdapter, Problem

HEADS = ("score", "classifier")
"""What transformers' classes call it; PEFT looks for both."""

MAX_LABELS = 1 << 16

Saved = dict[str, dict[str, torch.Tensor]]


def take_head(saved: Saved, folder: Path, source: str, base: Base) -> tuple[OwnHead | None, list[Problem]]:
    """Take the head out of the modules that a file holds whole; what is wrong with it or its labels."""
    names = HEADS if base.classifier is None else (base.classifier.output,)
    found = [name for name in names if name in saved]
    if len(found) != 1:
        held = "both" if found else "neither" if len(names) > 1 else "nothing"
        words = f"is SEQ_CLS, and the file holds {held} of {' and '.join(names)}: one is the classifier's head"
        return None, [Problem("task_type", words)]
    name = found[0]
    tensors = saved.pop(name)
    problems = [*_problems(name, tensors, base.num_features), *_lacking(saved, base)]
    if problems:
        return None, problems
    try:
        classes = read_classes(folder, source, len(tensors["weight"]))
    except InvalidAdapter as error:
        return None, [*error.problems]
    return OwnHead(name, tensors["weight"], tensors.get("bias"), classes), []


def _lacking(saved: Saved, base: Base) -> list[Problem]:
    """What the checkpoint does not have either."""
    if base.classifier is None:
        return []
    words = "has no weights in this base's checkpoint, and the file holds none: put it into modules_to_save to train it"
    absent = base.classifier.absent - {base.classifier.output} - saved.keys()
    return [Problem(name, words) for name in sorted(absent)]


def _problems(name: str, tensors: Mapping[str, torch.Tensor], hidden_size: int) -> list[Problem]:
    weight = tensors.get("weight")
    if weight is None or weight.dim() != 2:
        words = "must be one linear module, of a weight [labels, hidden] and perhaps a bias [labels]"
        return [Problem(name, words)]
    num_labels = len(weight)
    shapes = {"weight": (num_labels, hidden_size), "bias": (num_labels,)}
    problems = []
    if not 1 <= num_labels <= MAX_LABELS:
        problems.append(Problem(f"{name}.weight", f"has {num_labels} labels; must have 1 to {MAX_LABELS}"))
    for key, tensor in tensors.items():
        shape = shapes.get(key)
        if shape is None:
            problems.append(Problem(f"{name}.{key}", "is nothing that a linear module has"))
        elif tuple(tensor.shape) != shape:
            words = f"has shape {list(tensor.shape)}; this base needs {list(shape)}"
            problems.append(Problem(f"{name}.{key}", words))
        elif tensor.dtype not in DTYPES:
            problems.append(Problem(f"{name}.{key}", f"is {tensor.dtype}, which is no type of weights"))
        elif not is_finite(tensor) or not is_finite(tensor.float()):
            problems.append(Problem(f"{name}.{key}", "holds NaN or infinite values"))
    return problems
