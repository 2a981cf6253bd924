"""Folders of bottleneck adapters, as `weft adapters convert` writes them: read fail-closed, like PEFT's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from weft.adapters.base import Base
from weft.adapters.content import LoraWeights, is_finite
from weft.adapters.json_files import shown
from weft.adapters.peft_config import CONFIG_FILE
from weft.adapters.tensors import DTYPES
from weft.errors import InvalidAdapter, Problem
from weft.kernels.bottleneck import NON_LINEARITIES, BottleneckWeights, Reads

KIND_FIELD = "weft_type"
"""Of adapter_config.json: which kind of Weft's own a folder is; PEFT's have no such field."""

KIND = "bottleneck"
PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")
"""Of a module, behind its name."""

_WIDEST = 4
"""Times the width of the stream that a network may be wide."""


@dataclass(frozen=True, slots=True)
class BottleneckConfig:
    """adapter_config.json. target_modules: ends of names, at a dot. exclude_modules: whole names."""

    non_linearity: str
    reads: Reads
    target_modules: tuple[str, ...]
    exclude_modules: tuple[str, ...]

    def fields(self) -> dict[str, Any]:
        """As the file has them."""
        return {KIND_FIELD: KIND, **asdict(self)}

    def targets(self, module: str) -> bool:
        return module not in self.exclude_modules and f".{module}".endswith(
            tuple(f".{end}" for end in self.target_modules)
        )

    def largest(self, base: Base) -> int:
        """The elements of the largest tensor that an adapter of this base can hold."""
        return max((_WIDEST * base.modules[name].d_out ** 2 for name in base.residuals), default=0)


def parse_bottleneck(raw: Mapping[str, Any], source: str) -> BottleneckConfig:
    """Raises InvalidAdapter with every problem."""
    problems: list[Problem] = []

    def check(name: str, *, is_right: bool, words: str) -> None:
        if not is_right:
            problems.append(Problem(name, f"is {shown(raw.get(name))}; must be {words}"))

    check(KIND_FIELD, is_right=raw[KIND_FIELD] == KIND, words=repr(KIND))
    check("non_linearity", is_right=_is_in(raw, "non_linearity", NON_LINEARITIES), words=_one_of(NON_LINEARITIES))
    check("reads", is_right=_is_in(raw, "reads", list(Reads)), words=_one_of(Reads))
    for name in ("target_modules", "exclude_modules"):
        check(name, is_right=_are_names(raw.get(name)), words="a list of module names")
    known = {KIND_FIELD, "non_linearity", "reads", "target_modules", "exclude_modules"}
    problems += [Problem(shown(name), "is not a field of a bottleneck adapter") for name in sorted(raw.keys() - known)]
    if problems:
        raise InvalidAdapter(source, problems)
    return BottleneckConfig(
        raw["non_linearity"], Reads(raw["reads"]), tuple(raw["target_modules"]), tuple(raw["exclude_modules"])
    )


def match_bottlenecks(
    config: BottleneckConfig, tensors: Mapping[str, torch.Tensor], base: Base
) -> tuple[LoraWeights, list[Problem]]:
    """The networks that are right, and everything that is wrong with the others or with the whole."""
    ends = {module for module in {*base.modules, *config.exclude_modules} if _targets_at_all(config, module)}
    problems = [
        Problem(module, "does not end a sub-layer of this base whose output goes to the residual stream as it is")
        for module in sorted(ends - base.residuals.keys())
    ]
    wanted = {name for name in base.residuals if config.targets(name)}
    expected = {f"{name}.{part}" for name in wanted for part in PARTS}
    problems += [Problem(name, "is targeted and not in the file") for name in sorted(expected - tensors.keys())]
    problems += [Problem(name, "is nothing that is targeted") for name in sorted(tensors.keys() - expected)]
    found: dict[str, BottleneckWeights] = {}
    for name in sorted(name for name in wanted if all(f"{name}.{part}" in tensors for part in PARTS)):
        down, down_bias, up, up_bias = parts = [tensors[f"{name}.{part}"] for part in PARTS]
        wrong = _wrong(name, parts, base.modules[name].d_out)
        problems += wrong
        if not wrong:
            found[name] = BottleneckWeights(down, down_bias, up, up_bias, config.non_linearity, config.reads)
    if not problems and not found:
        problems.append(Problem(CONFIG_FILE, "targets no module of this base"))
    return LoraWeights(modules={}, default_scale=1.0, bottlenecks=found), problems


def _targets_at_all(config: BottleneckConfig, module: str) -> bool:
    return module in config.exclude_modules or config.targets(module)


def _wrong(name: str, tensors: Sequence[torch.Tensor], d: int) -> list[Problem]:
    """Of the tensors of `PARTS`."""
    problems = []
    rank = max(1, tensors[0].shape[0] if tensors[0].dim() else 0)
    for part, tensor, shape in zip(PARTS, tensors, [(rank, d), (rank,), (d, rank), (d,)], strict=True):
        if tuple(tensor.shape) != shape:
            words = f"has shape {list(tensor.shape)}; this base and the other parts need {list(shape)}"
            problems.append(Problem(f"{name}.{part}", words))
        elif tensor.dtype not in DTYPES:
            problems.append(Problem(f"{name}.{part}", f"is {str(tensor.dtype).removeprefix('torch.')}, no float type"))
        elif not is_finite(tensor):
            problems.append(Problem(f"{name}.{part}", "holds NaN or infinite values"))
    return problems


def _is_in(raw: Mapping[str, Any], name: str, allowed: Iterable[str]) -> bool:
    return isinstance(raw.get(name), str) and raw[name] in allowed


def _one_of(allowed: Iterable[str]) -> str:
    return f"one of {', '.join(allowed)}"


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)
