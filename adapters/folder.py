"""A PEFT folder on disk -> an adapter that is known to compute what PEFT computes on this base, or a refusal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from weft.adapters.base import Base
from weft.adapters.content import LoraWeights, digest_of
from weft.adapters.matching import match_up
from weft.adapters.peft_config import CONFIG_FILE, read_config
from weft.adapters.safe_files import check_safetensors
from weft.adapters.tensors import sort_tensors
from weft.errors import InvalidAdapter, Problem

WEIGHTS_FILE = "adapter_model.safetensors"
MAX_PROBLEMS = 20


def load_folder(folder: Path, source: str, base: Base) -> LoraWeights:
    """Read and validate a PEFT LoRA folder against the base.

    source names the adapter in messages. Raises InvalidAdapter with every problem found: unreadable or unsafe files,
    fields that can't be honoured, modules the base does not have or can't adapt, shapes of another base, tensors that
    are missing, left over, not finite or not floating point.
    """
    weights, problems = examine_folder(folder, source, base)
    if problems:
        shown = problems[:MAX_PROBLEMS]
        if len(problems) > MAX_PROBLEMS:
            shown.append(Problem(WEIGHTS_FILE, f"has {len(problems) - MAX_PROBLEMS} more problems"))
        raise InvalidAdapter(source, shown)
    return replace(weights, digest=digest_of(weights))


def examine_folder(folder: Path, source: str, base: Base) -> tuple[LoraWeights, list[Problem]]:
    """What of a folder fits the base, and all that does not.

    Raises InvalidAdapter where the files can't be read, or the config can't be honoured.
    """
    if not _is_folder(folder):
        raise InvalidAdapter(source, [Problem(str(folder), "is not a folder")])
    config = read_config(folder, source)
    tensors = _read_tensors(folder, source)
    try:
        return match_up(config, sort_tensors(tensors, config, base), base)
    except TimeoutError:
        words = "holds a regular expression that takes too long to match: write it without repeats inside repeats"
        raise InvalidAdapter(source, [Problem(CONFIG_FILE, words)]) from None


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that no file system takes
        return False


def _read_tensors(folder: Path, source: str) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        found = (
            f" (found {pickles[0]}, a pickle, which can run code: save it again with safetensors)" if pickles else ""
        )
        raise InvalidAdapter(source, [Problem(WEIGHTS_FILE, f"is missing{found}")])
    check_safetensors(path, source)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise InvalidAdapter(source, [Problem(WEIGHTS_FILE, f"is not a sound safetensors file ({error})")]) from None
