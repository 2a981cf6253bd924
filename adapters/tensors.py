"""The tensors of a PEFT file, by what they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from weft.adapters.base import Base
from weft.adapters.peft_config import PeftConfig
from weft.errors import Problem

PREFIX = "base_model.model."
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The types that weights may have."""

_LORA = re.compile(
    r"(?P<module>.+?)(?P<wraps>(?:\.base_layer)*)\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(?:(?<=vector)\.weight)?"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
_BASE_LAYER = re.compile(r"(?P<module>.+)\.base_layer\.(?P<parameter>weight|bias)")

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class SortedTensors:
    """lora: by module and the number of wrappers around it, then by part. base_weights: copies of the base's own."""

    lora: dict[tuple[str, int], dict[str, torch.Tensor]] = field(default_factory=dict)
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    saved: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    base_weights: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def sort_tensors(tensors: Tensors, config: PeftConfig, base: Base) -> SortedTensors:
    """Say of each tensor what it is; one that the config does not explain is a problem."""
    found = SortedTensors()
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            found.problems.append(Problem(key, f"has a name that does not begin with {PREFIX}, as PEFT's do"))
        elif not _sort(key.removeprefix(PREFIX), tensor, config, base, found):
            found.problems.append(Problem(key, "is nothing that adapter_config.json explains, so it can't be served"))
    return found


def to_current_name(name: str) -> str:
    """A module's name as transformers 5 has it."""
    return name.replace(".block_sparse_moe.", ".mlp.")


def is_saved(module: str, config: PeftConfig, base: Base) -> bool:
    """Whether PEFT would train the whole module; a tied head goes with its embedding where the config asks for it."""
    follows = module == base.head and base.is_tied and config.ties_saved
    return config.saves(module) or (follows and config.saves(base.embedding))


def _sort(name: str, tensor: torch.Tensor, config: PeftConfig, base: Base, found: SortedTensors) -> bool:
    if match := _LORA.fullmatch(name):
        part = match["part"].removesuffix(".weight")
        module = match["module"]
        if module not in base.modules and to_current_name(module) in base.modules:
            module = to_current_name(module)
        found.lora.setdefault((module, match["wraps"].count(".")), {})[part] = tensor
        return True
    if match := _TOKENS.fullmatch(name):
        found.tokens[match["module"]] = tensor
        return True
    module, _, parameter = name.rpartition(".")
    if match := _BASE_LAYER.fullmatch(name):
        module, parameter = match["module"], match["parameter"]
    elif is_saved(module, config, base):
        found.saved.setdefault(module, {})[parameter] = tensor
        return True
    if parameter == "bias" and config.bias != "none":
        found.biases[module] = tensor
        return True
    if parameter in ("weight", "bias") and module in (base.embedding, base.head) and module in base.modules:
        found.base_weights[module, parameter] = tensor
        return True
    return False
