"""Adapters from when experts were modules of their own: their rows, put together for the stacks that experts are now.

transformers 5 holds a layer's experts as stacked weights, the first projection's gate and up halves in one. Rows that
were trained for expert e's gate, up and down projections mean the same there: the ranks of gate and up side by side,
each writing its own half.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from weft.adapters.base import Base, ModuleKind
from weft.adapters.content import LoraParameter, is_finite
from weft.adapters.peft_config import PeftConfig
from weft.adapters.tensors import DTYPES, SortedTensors, to_current_name
from weft.errors import Problem

_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<expert>\d+)\.(?P<projection>gate_proj|up_proj|down_proj|w[123])")
_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_NAMES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")

Parts = Mapping[str, torch.Tensor]


def fuse_experts(
    tensors: SortedTensors, config: PeftConfig, base: Base, problems: list[Problem]
) -> dict[str, LoraParameter]:
    """Take the rows of single experts out of the tensors, and give them as terms of the stacks; note each problem."""
    stacks: dict[str, dict[tuple[str, int], Parts]] = {}
    for name, wraps in list(tensors.lora):
        match = _EXPERT.fullmatch(name)
        module = base.modules.get(to_current_name(match["stack"])) if match else None
        if match is None or module is None or module.kind is not ModuleKind.EXPERTS or wraps:
            continue
        parts = tensors.lora.pop((name, wraps))
        if not config.targets(name):
            problems.append(Problem(name, "has tensors, but adapter_config.json does not target it"))
            continue
        projection = _PROJECTIONS.get(match["projection"], match["projection"])
        experts = stacks.setdefault(to_current_name(match["stack"]), {})
        if (projection, int(match["expert"])) in experts:
            problems.append(Problem(name, "has rows for an expert that another name has rows for too"))
        experts[projection, int(match["expert"])] = parts
    absent = base.of_kind(ModuleKind.EXPERTS).keys() - stacks.keys() if stacks else set()
    targeted = [name for name in sorted(absent) if any(config.targets(f"{name}.0.{each}") for each in _NAMES)]
    problems += [Problem(name, "has no rows for its experts, which adapter_config.json targets") for name in targeted]
    fused: dict[str, LoraParameter] = {}
    for stack, experts in stacks.items():
        try:
            fused |= _fuse(stack, experts, config, base)
        except ValueError as error:
            problems.append(Problem(stack, str(error)))
    return fused


def _fuse(
    stack: str, experts: Mapping[tuple[str, int], Parts], config: PeftConfig, base: Base
) -> dict[str, LoraParameter]:
    """Raises ValueError where the rows don't say what they would have to."""
    module = base.modules[stack]
    if config.use_rslora or config.use_dora or config.lora_bias or config.rank_pattern or config.alpha_pattern:
        raise ValueError("has rows for single experts, which are served only with one rank and scale for all")
    if module.is_transposed or not module.is_concatenated or "gate_up_proj" not in module.shapes:
        raise ValueError("has rows for single experts, but this base's are laid out in another way")
    count, width, d_in = module.shapes["gate_up_proj"]
    inner = width // 2
    shapes = {"gate_proj": (inner, d_in), "up_proj": (inner, d_in), "down_proj": (d_in, inner)}
    present = {projection for projection, _ in experts}
    if max(expert for _, expert in experts) >= count:
        raise ValueError(f"has rows for more experts than the {count} of this base")
    if ("gate_proj" in present) != ("up_proj" in present):
        raise ValueError("has rows for one of gate and up projection, which are one weight in this base")
    a, b = {}, {}
    for projection in present:
        d_out, width_in = shapes[projection]
        parts = [experts.get((projection, expert), {}) for expert in range(count)]
        wanted = {"lora_A": (config.r, width_in), "lora_B": (d_out, config.r)}
        if any({key: tuple(tensor.shape) for key, tensor in each.items()} != wanted for each in parts):
            raise ValueError(f"needs rows for {projection} of each of {count} experts, shaped {wanted}")
        if not all(tensor.dtype in DTYPES and is_finite(tensor) for each in parts for tensor in each.values()):
            raise ValueError(f"has rows for {projection} that are not finite, or not of a type that is served")
        a[projection] = torch.stack([each["lora_A"] for each in parts])
        b[projection] = torch.stack([each["lora_B"] for each in parts])
    fused = {}
    if "down_proj" in present:
        fused[f"{stack}.down_proj"] = LoraParameter(a["down_proj"], b["down_proj"], config.default_scale)
    if "gate_proj" in present:
        halves = torch.zeros(count, width, 2 * config.r, dtype=b["up_proj"].dtype)
        halves[:, :inner, : config.r] = b["gate_proj"]
        halves[:, inner:, config.r :] = b["up_proj"]
        both = torch.cat([a["gate_proj"], a["up_proj"]], dim=1)
        fused[f"{stack}.gate_up_proj"] = LoraParameter(both, halves, config.default_scale)
    return fused
