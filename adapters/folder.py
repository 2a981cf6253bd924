"""A folder on disk -> an adapter that is known to compute what its library computes on this base, or a refusal."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from weft.adapters.base import Base
from weft.adapters.bottlenecks import KIND_FIELD, match_bottlenecks, parse_bottleneck
from weft.adapters.content import LoraWeights, digest_of
from weft.adapters.heads import take_head
from weft.adapters.json_files import read_object
from weft.adapters.matching import match_up
from weft.adapters.peft_config import CONFIG_FILE, PeftConfig, Task, read_config
from weft.adapters.tensors import Tensors, sort_tensors
from weft.adapters.weights_file import read_tensors
from weft.errors import InvalidAdapter, Problem, cut_short

WEIGHTS_FILE = "adapter_model.safetensors"


def load_folder(folder: Path, source: str, base: Base) -> LoraWeights:
    """Read and validate a PEFT LoRA folder against the base.

    source names the adapter in messages. Raises InvalidAdapter with every problem found: unreadable or unsafe files,
    fields that can't be honoured, modules the base does not have or can't adapt, shapes of another base, tensors that
    are missing, left over, not finite or not floating point.
    """
    weights, problems = examine_folder(folder, source, base)
    if problems:
        raise InvalidAdapter(source, cut_short(problems, WEIGHTS_FILE))
    return replace(weights, digest=digest_of(weights))


def examine_folder(folder: Path, source: str, base: Base) -> tuple[LoraWeights, list[Problem]]:
    """What of a folder fits the base, and all that does not.

    Raises InvalidAdapter where the files can't be read, or the config can't be honoured.
    """
    if not _is_folder(folder):
        raise InvalidAdapter(source, [Problem(str(folder), "is not a folder")])
    fields = read_object(folder / CONFIG_FILE, source)
    if KIND_FIELD in fields:
        bottleneck = parse_bottleneck(fields, source)
        return match_bottlenecks(bottleneck, _read_tensors(folder, source, bottleneck.largest(base)), base)
    config = read_config(folder, source)
    try:
        tensors = _read_tensors(folder, source, _largest(config, base))
        if config.task is Task.SEQ_CLS:
            return _match_classifier(folder, source, config, tensors, base)
        if config.task is Task.FEATURE_EXTRACTION:
            return _match_backbone(config, tensors, base)
        return match_up(config, sort_tensors(tensors, config, base), base)
    except TimeoutError:
        words = "holds a regular expression that takes too long to match"
        raise InvalidAdapter(source, [Problem(CONFIG_FILE, words)]) from None


def _match_classifier(
    folder: Path, source: str, config: PeftConfig, tensors: Tensors, base: Base
) -> tuple[LoraWeights, list[Problem]]:
    """As one of transformers' classes for sequence classification: the base without its head, and the adapter's own."""
    found = sort_tensors(tensors, config, base.headless)
    head, problems = take_head(found.saved, folder, source, base)
    weights, others = match_up(config, found, base.headless, head)
    return weights, [*problems, *others]


def _match_backbone(config: PeftConfig, tensors: Tensors, base: Base) -> tuple[LoraWeights, list[Problem]]:
    """As the model that is the base's backbone, in which modules have shorter names."""
    backbone = base.backbone_alone
    weights, problems = match_up(config, sort_tensors(tensors, config, backbone), backbone)
    return weights.within(base.backbone), problems


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that no file system takes
        return False


def _read_tensors(folder: Path, source: str, most: int) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.exists():
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        found = (
            f" (found {pickles[0]}, a pickle, which can run code: save it again with safetensors)" if pickles else ""
        )
        raise InvalidAdapter(source, [Problem(WEIGHTS_FILE, f"is missing{found}")])
    return read_tensors(path, source, most)


def _largest(config: PeftConfig, base: Base) -> int:
    """The elements of the largest tensor that an adapter of this config could hold for this base."""
    rank = max(config.r, *config.rank_pattern.values(), 1)
    largest = 0
    for module in base.modules.values():
        for shape in module.shapes.values():
            low_rank = max(shape, default=0) * rank * (shape[0] if len(shape) == 3 else 1)
            largest = max(largest, math.prod(shape), low_rank)
    return largest
