"""PEFT LoRA folders, read and written without the base they are for."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weft.adapters.classes import CLASSES_FILE
from weft.adapters.content import is_finite
from weft.adapters.folder import WEIGHTS_FILE
from weft.adapters.peft_config import CONFIG_FILE, PeftConfig, read_config
from weft.adapters.tensors import DTYPES, PREFIX
from weft.adapters.weights_file import read_tensors
from weft.errors import InvalidAdapter, Problem, cut_short
from weft.making.tensor_file import TensorFile

_HALF = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)")
_B_OF = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}


@dataclass(frozen=True, slots=True)
class Lora:
    """What an adapter adds to one module's weight: scale * b a. a: [rank, d_in], b: [d_out, rank], as PEFT has them."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def row_numbers(self) -> int:
        """That one rank takes."""
        return self.a.shape[1] + self.b.shape[0]


@dataclass(frozen=True, slots=True)
class PeftFolder:
    """An adapter by itself.

    source: names it in messages. settings: `adapter_config.json` as it stands. modules: what can be cut down, by name.
    rest: all other tensors, by PEFT's names. classes: a classifier's `config.json`, which names its labels.
    keeps_modules: whether a module must stay although nothing of it is left.
    """

    source: str
    settings: Mapping[str, Any]
    modules: Mapping[str, Lora]
    rest: Mapping[str, torch.Tensor]
    classes: bytes | None = None

    @property
    def keeps_modules(self) -> bool:
        return any(name.endswith("bias") for name in self.rest)

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        halves = [half for lora in self.modules.values() for half in (lora.a, lora.b)]
        return sum(tensor.nbytes for tensor in (*halves, *self.rest.values()))

    @property
    def dtype(self) -> torch.dtype:
        """The modules', where they have one in common; else float32."""
        found = {half.dtype for lora in self.modules.values() for half in (lora.a, lora.b)}
        return found.pop() if len(found) == 1 else torch.float32

    def check_plain(self, to_be: str) -> None:
        """Raises InvalidAdapter where there is more to it than A and B that always apply."""
        words = f"is there, and can't be {to_be}: only A and B can"
        tokens = "alora_invocation_tokens"
        has_own = self.settings.get("modules_to_save") or self.settings.get("task_type") == "SEQ_CLS"
        copies = () if has_own else (".weight",)  # peft adds the base's own embeddings
        problems = [Problem(name, words) for name in sorted(self.rest) if not name.endswith(copies)]
        problems += [Problem(tokens, words)] if self.settings.get(tokens) else []
        if problems:
            raise InvalidAdapter(self.source, cut_short(problems, WEIGHTS_FILE), to_be)


def read_folder(folder: Path) -> PeftFolder:
    """Raises InvalidAdapter where the files are unsound, or hold what can't be cut down without the base, by name."""
    source = str(folder)
    config = read_config(folder, source)
    settings = json.loads((folder / CONFIG_FILE).read_text())
    if not (folder / WEIGHTS_FILE).is_file():
        raise InvalidAdapter(source, [Problem(WEIGHTS_FILE, "is missing")])
    tensors = read_tensors(folder / WEIGHTS_FILE, source, sys.maxsize)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    rest = {}
    for name, tensor in tensors.items():
        match = _HALF.fullmatch(name.removeprefix(PREFIX))
        if match is None:
            rest[name] = tensor
        else:
            halves.setdefault(match["module"], {})[match["part"]] = tensor
    problems = [*_unfit(config, settings), *_unsound(halves, config)]
    if problems or not halves:
        problems = problems or [Problem(WEIGHTS_FILE, "holds no LoRA tensors")]
        raise InvalidAdapter(source, cut_short(problems, WEIGHTS_FILE), "compressed")
    modules = {name: _pair(parts, config.scale(name)) for name, parts in sorted(halves.items())}
    classes = folder / CLASSES_FILE
    return PeftFolder(source, settings, modules, rest, classes.read_bytes() if classes.is_file() else None)


def write_folder(adapter: PeftFolder, folder: Path) -> None:
    """Every module's scale as it is; each is named in full, whatever pattern chose it before."""
    ranks = {name: lora.rank for name, lora in adapter.modules.items()}
    scales = {name: lora.scale for name, lora in adapter.modules.items()}
    (rank, _), *_ = Counter(ranks.values()).most_common(1)
    (scale, _), *_ = Counter(scales.values()).most_common(1)
    alpha = scale * rank
    settings = {
        **adapter.settings,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: each for name, each in ranks.items() if each != rank},
        "alpha_pattern": {n: scales[n] * each for n, each in ranks.items() if scales[n] * each != alpha},
        "use_rslora": False,
        "target_modules": sorted(ranks),
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    if adapter.classes is not None:
        (folder / CLASSES_FILE).write_bytes(adapter.classes)
    tensors = dict(_named(adapter))
    with TensorFile(folder / WEIGHTS_FILE, tensors) as file:
        for name, tensor in tensors.items():
            file.put(name, tensor)


def _named(adapter: PeftFolder) -> Iterator[tuple[str, torch.Tensor]]:
    for name, lora in adapter.modules.items():
        a = "lora_embedding_A" if lora.is_embedding else "lora_A.weight"
        yield f"{PREFIX}{name}.{a}", lora.a
        yield f"{PREFIX}{name}.{_B_OF[a]}", lora.b
    yield from adapter.rest.items()


def _unfit(config: PeftConfig, settings: Mapping[str, Any]) -> Iterator[Problem]:
    """What is not the sum of a base and low-rank terms."""
    if config.use_dora:
        words = "is set: DoRA's magnitudes go by the norm of the base's weights with the delta, which changes with it"
        yield Problem("use_dora", words)
    if config.target_parameters:
        yield Problem("target_parameters", "is set: the terms of experts lie stacked, and can't be cut one by one")
    if config.ensure_weight_tying:
        yield Problem("ensure_weight_tying", "is set: what is tied would be cut to different ranks")
    if settings.get("peft_type") != "LORA":
        yield Problem("peft_type", "is not LORA")


def _unsound(halves: Mapping[str, Mapping[str, torch.Tensor]], config: PeftConfig) -> Iterator[Problem]:
    for name, parts in sorted(halves.items()):
        a, b = next(((x, y) for x, y in _B_OF.items() if x in parts and y in parts), ("", ""))
        if not a or len(parts) != 2:
            yield Problem(name, "has not one lora_A and one lora_B")
            continue
        if parts[a].dim() != 2 or parts[b].dim() != 2 or not len(parts[a]) == parts[b].shape[1] == config.rank(name):
            shapes = f"{list(parts[a].shape)} and {list(parts[b].shape)}"
            yield Problem(name, f"has {shapes}, which are not of the rank {config.rank(name)} that the config says")
        elif any(part.dtype not in DTYPES or not is_finite(part) for part in parts.values()):
            yield Problem(name, "holds what is no finite floating point number")


def _pair(parts: Mapping[str, torch.Tensor], scale: float) -> Lora:
    is_embedding = "lora_embedding_A" in parts
    a = "lora_embedding_A" if is_embedding else "lora_A.weight"
    return Lora(parts[a], parts[_B_OF[a]], scale, is_embedding)
