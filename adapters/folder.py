"""A PEFT folder on disk -> an adapter that is known to compute what PEFT computes on this base, or a refusal."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from weft.adapters.peft_config import CONFIG_FILE, PeftConfig, read_config
from weft.errors import InvalidAdapter, Problem

WEIGHTS_FILE = "adapter_model.safetensors"
MAX_PROBLEMS = 20

_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

ModuleShapes = Mapping[str, tuple[int, int]]
"""(d_in, d_out) of every module of the base that an adapter may touch, by its name in the base."""


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One adapted module: a is [rank, d_in], b is [d_out, rank], as PEFT stores them; scale multiplies b·a."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """A validated adapter in host memory."""

    modules: Mapping[str, LoraModule]
    default_scale: float
    digest: str

    def rows(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A module's rank rows, A: [rank, d_in] and B: [rank, d_out].

        Where the module's scale differs from the adapter's (alpha_pattern, rank_pattern), B holds the ratio.
        """
        module = self.modules[name]
        ratio = module.scale / self.default_scale
        return module.a, (module.b if ratio == 1.0 else module.b.double() * ratio).t()

    @property
    def rank(self) -> int:
        """The largest rank of any module: what the adapter's pages must hold."""
        return max(module.rank for module in self.modules.values())


def load_folder(folder: Path, source: str, shapes: ModuleShapes) -> LoraWeights:
    """Read and validate a PEFT LoRA folder against the base.

    source names the adapter in messages. Raises InvalidAdapter with every problem found: unreadable or unsafe files,
    fields that can't be honoured, modules the base does not have or can't adapt, shapes of another base, tensors that
    are missing, left over, not finite or not floating point.
    """
    if not _is_folder(folder):
        raise InvalidAdapter(source, [Problem(str(folder), "is not a folder")])
    config = read_config(folder, source)
    tensors = _read_tensors(folder, source)
    try:
        modules, problems = _match_up(config, tensors, shapes)
    except TimeoutError:
        words = "holds a regular expression that takes too long to match: write it without repeats inside repeats"
        raise InvalidAdapter(source, [Problem(CONFIG_FILE, words)]) from None
    if problems:
        shown = problems[:MAX_PROBLEMS]
        if len(problems) > MAX_PROBLEMS:
            shown.append(Problem(WEIGHTS_FILE, f"has {len(problems) - MAX_PROBLEMS} more problems"))
        raise InvalidAdapter(source, shown)
    return LoraWeights(modules, config.default_scale or 1.0, _digest(modules))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that no file system takes
        return False


def _match_up(
    config: PeftConfig, tensors: Mapping[str, torch.Tensor], shapes: ModuleShapes
) -> tuple[dict[str, LoraModule], list[Problem]]:
    """The modules that are right, and everything that is wrong, with the others or with the whole."""
    problems: list[Problem] = []
    pairs = _pair_up(tensors, problems)
    modules = {
        name: LoraModule(halves["A"], halves["B"], config.scale(name))
        for name, halves in sorted(pairs.items())
        if _check_module(name, halves, config, shapes, problems)
    }
    problems += [
        Problem(name, "is targeted by adapter_config.json, but the file holds no tensors for it")
        for name in shapes
        if name not in pairs and config.targets(name)
    ]
    if not modules and not problems:
        problems.append(Problem(WEIGHTS_FILE, "holds no LoRA tensors"))
    return modules, problems


def _read_tensors(folder: Path, source: str) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        found = (
            f" (found {pickles[0]}, a pickle, which can run code: save it again with safetensors)" if pickles else ""
        )
        raise InvalidAdapter(source, [Problem(WEIGHTS_FILE, f"is missing{found}")])
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise InvalidAdapter(source, [Problem(WEIGHTS_FILE, f"is not a sound safetensors file ({error})")]) from None


def _pair_up(tensors: Mapping[str, torch.Tensor], problems: list[Problem]) -> dict[str, dict[str, torch.Tensor]]:
    """Sort tensors by module and half; tensors that are no plain LoRA weight become problems."""
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match:
            pairs.setdefault(match["module"], {})[match["half"]] = tensor
        else:
            problems.append(Problem(name, "is not a LoRA weight of a linear module (…lora_A.weight, …lora_B.weight)"))
    return pairs


def _check_module(
    name: str,
    halves: Mapping[str, torch.Tensor],
    config: PeftConfig,
    shapes: ModuleShapes,
    problems: list[Problem],
) -> bool:
    """Append what is wrong with one module's tensors; True where nothing is."""
    found = [Problem(name, f"has no lora_{half}.weight") for half in "AB" if half not in halves]
    if name not in shapes:
        found.append(Problem(name, "is not a module of this base that an adapter can be served on"))
    elif not config.targets(name):
        found.append(Problem(name, "has tensors, but adapter_config.json does not target it"))
    elif not found:
        d_in, d_out = shapes[name]
        rank = config.rank(name)
        for half, expected in (("A", (rank, d_in)), ("B", (d_out, rank))):
            found += _check_tensor(f"{name}.lora_{half}.weight", halves[half], expected)
    problems += found
    return not found


def _check_tensor(name: str, tensor: torch.Tensor, expected: tuple[int, int]) -> Sequence[Problem]:
    if tuple(tensor.shape) != expected:
        return [Problem(name, f"has shape {list(tensor.shape)}; this base and its config need {list(expected)}")]
    if tensor.dtype not in _DTYPES:
        return [
            Problem(
                name, f"is {str(tensor.dtype).removeprefix('torch.')}; must be one of {', '.join(map(str, _DTYPES))}"
            )
        ]
    if not torch.isfinite(tensor).all():
        return [Problem(name, "holds NaN or infinite values")]
    return []


def _digest(modules: Mapping[str, LoraModule]) -> str:
    """SHA-256 of what the adapter computes: each module's name, scale, shapes, dtypes and weights, in order of name."""
    sha = hashlib.sha256()
    for name, module in sorted(modules.items()):
        halves = (module.a, module.b)
        header = [name, module.scale, *((str(half.dtype), list(half.shape)) for half in halves)]
        sha.update(json.dumps(header).encode())
        for half in halves:
            sha.update(half.contiguous().view(torch.uint8).numpy().tobytes())
    return f"sha256:{sha.hexdigest()}"
