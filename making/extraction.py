"""A full fine-tune as an adapter of its base: of every linear module that changed, the difference at a low rank."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig

from weft.adapters.folder import WEIGHTS_FILE
from weft.adapters.peft_config import CONFIG_FILE
from weft.adapters.tensors import PREFIX
from weft.errors import InvalidConfig, InvalidModel
from weft.making.difference import Track, delta, find_difference
from weft.making.low_rank import Wanted, approximate
from weft.making.model_files import Checkpoint, Skeleton, read_skeleton
from weft.making.tensor_file import TensorFile

REPORT_FILE = "extraction.json"


@dataclass(frozen=True, slots=True)
class Extracted:
    """One linear module. error: ||D - B A|| / ||D|| of what was saved; energy: the share that it keeps, 1 - error^2."""

    name: str
    shape: tuple[int, int]
    rank: int
    energy: float
    error: float
    norm: float


@dataclass(frozen=True, slots=True)
class Extraction:
    """modules: in the order of their names. kept, dropped: what else had changed. error: over all modules together."""

    base: str
    tuned: str
    modules: tuple[Extracted, ...]
    kept: tuple[str, ...]
    dropped: tuple[str, ...]

    @property
    def error(self) -> float:
        whole = sum(module.norm**2 for module in self.modules)
        return math.sqrt(sum((module.error * module.norm) ** 2 for module in self.modules) / whole)

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "error": self.error}


class Extractor:
    """Knows both models, and what of the base the other one changed; holds no more than a few matrices at a time."""

    def __init__(self, base: str, tuned: str, track: Track) -> None:
        """base, tuned: folders or hub ids. Raises InvalidModel where they do not go together."""
        self._track = track
        self._skeleton = read_skeleton(base)
        self._base = Checkpoint(base, self._skeleton)
        self._tuned = Checkpoint(tuned, read_skeleton(tuned))
        self.difference = find_difference(self._base, self._tuned, self._skeleton, track)

    def check(self, wanted: Wanted, others: str) -> None:
        """Raises InvalidModel or InvalidConfig where this can't be extracted so, before the long work."""
        found = self.difference
        if found.others and others == "refuse":
            raise InvalidModel(
                f"not only linear weights changed, but also {', '.join(found.others)}: --others keep puts what can be "
                "kept whole into the adapter, --others drop leaves the base's"
            )
        if found.unplaceable and others == "keep":
            raise InvalidModel(f"an adapter can't hold {', '.join(found.unplaceable)}: --others drop leaves the base's")
        if not found.linear:
            raise InvalidModel("no linear module's weight changed: there is nothing that a low rank could hold")
        small = {name: min(self._shape(name)) for name in found.linear if min(self._shape(name)) < (wanted.rank or 0)}
        if small:
            shapes = ", ".join(f"{name} {list(self._shape(name))}" for name in small)
            words = f"give {min(small.values())} or less, or --energy"
            raise InvalidConfig(f"--rank is {wanted.rank}, above the full rank of {shapes}: {words}")

    def write(self, wanted: Wanted, *, keep: bool, dtype: torch.dtype, folder: Path) -> Extraction:
        """A PEFT folder and its report. keep: whether what else changed goes into it whole."""
        found = self.difference
        whole = found.whole if keep else []
        own_biases = bool(found.biases) and keep
        names = [f"{PREFIX}{name}.{part}" for name in found.linear for part in ("lora_A.weight", "lora_B.weight")]
        names += [name for name, _ in self._kept(whole, own_biases=own_biases)]
        with TensorFile(folder / WEIGHTS_FILE, names) as file:
            modules = tuple(self._factor(name, wanted, dtype, file) for name in self._track(found.linear, "factoring"))
            for name, parameter in self._kept(whole, own_biases=own_biases):
                file.put(name, self._tuned.read(parameter), dtype)
        ranks = {module.name: module.rank for module in modules}
        config = _config(ranks, whole, self._skeleton, own_biases=own_biases)
        config.base_model_name_or_path = self._base.name
        settings = config.to_dict()  # type: ignore[no-untyped-call]
        (folder / CONFIG_FILE).write_text(json.dumps(settings, default=sorted, indent=2, sort_keys=True) + "\n")
        kept = (*whole, *found.biases) if keep else ()
        extraction = Extraction(self._base.name, self._tuned.name, modules, kept, () if keep else tuple(found.others))
        (folder / REPORT_FILE).write_text(json.dumps(extraction.to_json(), indent=2) + "\n")
        return extraction

    def _factor(self, name: str, wanted: Wanted, dtype: torch.dtype, file: TensorFile) -> Extracted:
        matrix = delta(self._base, self._tuned, self._skeleton, name)
        factors = approximate(matrix, wanted).to(dtype)
        file.put(f"{PREFIX}{name}.lora_A.weight", factors.a)
        file.put(f"{PREFIX}{name}.lora_B.weight", factors.b)
        error = factors.relative_error(matrix)
        norm = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
        return Extracted(name, (matrix.shape[0], matrix.shape[1]), factors.rank, 1 - error**2, error, norm)

    def _kept(self, whole: list[str], *, own_biases: bool) -> Iterator[tuple[str, str]]:
        """The adapter's names for what it holds whole, and the model's. Of biases PEFT's `bias` takes all or none."""
        adapted = {f"{name}.bias": f"{name}.base_layer.bias" for name in self.difference.linear}
        for parameter in sorted(self._skeleton.parameters):
            module, _, key = parameter.rpartition(".")
            if parameter in self._tuned.shapes and (module in whole or (own_biases and key == "bias")):
                yield PREFIX + adapted.get(parameter, parameter), parameter

    def _shape(self, module: str) -> tuple[int, ...]:
        return self._skeleton.parameters[f"{module}.weight"]


def _config(ranks: Mapping[str, int], whole: list[str], skeleton: Skeleton, *, own_biases: bool) -> LoraConfig:
    """Every module's scale is 1: its alpha is its rank."""
    (rank, _), *_ = Counter(ranks.values()).most_common(1)
    pattern = {name: each for name, each in ranks.items() if each != rank}
    return LoraConfig(
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=_targets(ranks, skeleton),
        modules_to_save=whole or None,
        bias="all" if own_biases else "none",
        fan_in_fan_out=not skeleton.transposed.isdisjoint(ranks),
    )


def _targets(ranks: Mapping[str, int], skeleton: Skeleton) -> list[str]:
    """By the last part of their names where that picks the same modules."""
    tails = {name.rpartition(".")[2] for name in ranks}
    picked = {name for name in skeleton.modules if name.rpartition(".")[2] in tails}
    return sorted(tails) if picked == ranks.keys() else sorted(ranks)
