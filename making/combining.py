"""Several adapters made one, by peft's `add_weighted_adapter`, on a model of their shapes without weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, LoraModel
from torch import nn

from weft.errors import InvalidAdapter, InvalidConfig, Problem, one_line
from weft.making.peft_folder import Lora, PeftFolder

_COMBINED = "combined"


@dataclass(frozen=True, slots=True)
class Combination:
    """How adapters are made one: peft's `combination_type`, with its arguments. seed: of what DARE drops."""

    way: str
    weights: Sequence[float]
    density: float | None = None
    rank: int | None = None
    seed: int = 0


def combine(adapters: Sequence[PeftFolder], how: Combination) -> PeftFolder:
    """One adapter with the settings of the first. Raises InvalidAdapter, InvalidConfig where peft can't."""
    for adapter in adapters:
        adapter.check_plain("combined")
    modules: dict[str, Lora] = {}
    for adapter in adapters:
        for name, lora in adapter.modules.items():
            first = modules.setdefault(name, lora)
            if (first.a.shape[1], first.b.shape[0]) != (lora.a.shape[1], lora.b.shape[0]):
                raise InvalidAdapter(adapter.source, [Problem(name, "has another shape than in the first")], "combined")
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(how.seed)
        combined = _combined(adapters, modules, how)
    source = f"{how.way} of {', '.join(adapter.source for adapter in adapters)}"
    return PeftFolder(source, adapters[0].settings, combined, {})


def _combined(adapters: Sequence[PeftFolder], modules: Mapping[str, Lora], how: Combination) -> dict[str, Lora]:
    names = [str(index) for index in range(len(adapters))]
    model = LoraModel(_skeleton(modules), {"0": _config(adapters[0])}, "0")
    for name, adapter in zip(names, adapters, strict=True):
        if name != "0":
            model.peft_config[name] = _config(adapter)
            model.inject_adapter(model.model, name)
        for module, lora in adapter.modules.items():
            for half, tensor in zip(_halves(model, module, name, lora), (lora.a, lora.b), strict=True):
                half.data = tensor.float()
    try:
        model.add_weighted_adapter(
            names,
            list(how.weights),
            _COMBINED,
            combination_type=cast("Any", how.way),
            density=how.density,
            svd_rank=how.rank,
        )
    except (ValueError, RuntimeError) as error:
        raise InvalidConfig(f"--combine {how.way}: peft can't combine these: {one_line(error)}") from error
    found = {}
    for module, lora in modules.items():
        a, b = _halves(model, module, _COMBINED, lora)
        found[module] = Lora(a.data, b.data, 1.0, lora.is_embedding)
    return found


def _config(adapter: PeftFolder) -> LoraConfig:
    """With each module's scale, whatever formula gave it."""
    return LoraConfig(
        r=max(lora.rank for lora in adapter.modules.values()),
        target_modules=list(adapter.modules),
        rank_pattern={name: lora.rank for name, lora in adapter.modules.items()},
        alpha_pattern={name: lora.scale * lora.rank for name, lora in adapter.modules.items()},
    )


def _halves(model: LoraModel, module: str, adapter: str, lora: Lora) -> tuple[nn.Parameter, nn.Parameter]:
    layer = model.model.get_submodule(module)
    if lora.is_embedding:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def _skeleton(modules: Mapping[str, Lora]) -> nn.Module:
    """Modules of these names and shapes, whose weights are one zero, seen many times."""
    root = nn.Module()
    for name, lora in modules.items():
        parent = root
        *path, last = name.split(".")
        for part in path:
            if part not in parent._modules:  # noqa: SLF001 - names may be numbers
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        d_in, d_out = lora.a.shape[1], lora.b.shape[0]
        shape = (d_in, d_out) if lora.is_embedding else (d_out, d_in)
        with torch.device("meta"):
            leaf: nn.Module = nn.Embedding(*shape) if lora.is_embedding else nn.Linear(d_in, d_out, bias=False)
        leaf.weight = nn.Parameter(torch.zeros(1).expand(shape), requires_grad=False)
        parent.add_module(last, leaf)
    return root
