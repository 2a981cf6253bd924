"""Content -> what the kernels add: rank rows for pages, and patches for all that no rank row can say.

A linear module with everything that PEFT may have trained computes, for x and the base's y = W x + b,

    y' = g * (W x) + b' + s * g * B (A x) + s * c        g = m / ||W + s B A||  (DoRA, by output; else 1)
       = y + (g - 1) * y + shift + s * (g * B) (A x)     shift = (b' - b) - (g - 1) * b + s * c

so g goes into the rows of B, and (g - 1, shift) is an `Affine` patch. Formulas: Hu et al. 2021 (LoRA), Liu et al. 2024
(DoRA, eq. 5); the rest as in peft's `tuners/lora`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from weft.adapters.base import Base, BaseModule, ModuleKind
from weft.adapters.content import LoraModule, LoraWeights, TokenUpdate
from weft.kernels.bottleneck import make_bottleneck
from weft.kernels.native import Native
from weft.kernels.patches import Affine, EmbeddingLowRank, LowRank, Own, Patch, TokenColumns, TokenRows

Rows = tuple[torch.Tensor, torch.Tensor]
"""Rank rows of one module: A [rank, d_in], B [rank, d_out]."""


@dataclass(frozen=True, slots=True)
class Folded:
    """rows: by linear module; multiplied by `scale` they are the whole low-rank term. patches: by module, in order."""

    rows: Mapping[str, Rows]
    scale: float
    patches: Mapping[str, tuple[Patch, ...]]


def fold(weights: LoraWeights, base: Base, dtype: torch.dtype, native: Native | None = None) -> Folded:
    """Everything in the base's dtype, on the CPU; affine patches in float32. native: the C library, if it computes."""
    rows: dict[str, Rows] = {}
    patches: dict[str, list[Patch]] = {}
    for name, saved in weights.saved.items():
        parameters = {key: tensor.to(dtype) for key, tensor in saved.items()}
        patches.setdefault(name, []).append(Own(base.modules[name].own, parameters))
    for name, update in weights.tokens.items():
        module = base.modules[name]
        if module.kind is ModuleKind.HEAD and "bias" in module.shapes:  # PEFT's layer of trained tokens leaves it out
            bias = module.read("bias").cpu().float()
            patches.setdefault(name, []).append(Affine(torch.zeros_like(bias), -bias))
        patches.setdefault(name, []).append(_token_patch(module, update, dtype))
    for name in sorted(weights.modules.keys() | weights.biases.keys()):
        module, lora = base.modules[name], weights.modules.get(name)
        if lora is None and module.kind is ModuleKind.OTHER:
            patches.setdefault(name, []).append(Own(module.own, {"bias": weights.biases[name].to(dtype)}))
            continue
        gain = _gain(module, lora) if lora is not None and lora.magnitude is not None else None
        affine = _affine(module, lora, weights.biases.get(name), gain)
        if affine is not None:
            patches.setdefault(name, []).append(affine)
        if lora is None:
            continue
        a, b = lora.a.to(dtype), _b_rows(lora, gain, weights.default_scale, dtype)
        if module.kind is ModuleKind.LINEAR:
            rows[name] = (a, b)
        elif module.kind is ModuleKind.HEAD:
            patches.setdefault(name, []).append(LowRank(a, b, weights.default_scale))
        else:
            scale = weights.default_scale * module.output_scale
            patches.setdefault(name, []).append(EmbeddingLowRank(a.t().contiguous(), b, scale))
    _fold_parameters(weights, base, dtype, patches)
    for name, bottleneck in weights.bottlenecks.items():
        patches.setdefault(name, []).append(make_bottleneck(bottleneck, dtype, native))
    return Folded(rows, weights.default_scale, {name: tuple(those) for name, those in patches.items()})


def _gain(module: BaseModule, lora: LoraModule) -> torch.Tensor:
    """g - 1, float32 [d_out]. PEFT's norms run over the inputs of each output, for an embedding over its rows."""
    weight = module.read("weight").float()
    a, b = (half.to(weight.device).float() for half in (lora.a, lora.b))
    if module.kind is ModuleKind.EMBEDDING:
        weight = weight.t()
    norm = torch.linalg.vector_norm(torch.addmm(weight, b, a, alpha=lora.scale), dim=1).cpu()
    assert lora.magnitude is not None, "only DoRA has a gain"
    gain: torch.Tensor = lora.magnitude.float() / norm - 1
    return gain


def _affine(
    module: BaseModule, lora: LoraModule | None, trained_bias: torch.Tensor | None, gain: torch.Tensor | None
) -> Affine | None:
    added = lora.bias if lora is not None else None
    if gain is None and trained_bias is None and added is None:
        return None
    gain = torch.zeros(module.d_out) if gain is None else gain
    bias = module.read("bias").cpu().float() if "bias" in module.shapes else torch.zeros(module.d_out)
    shift = -gain * bias
    if trained_bias is not None:
        shift += trained_bias.float() - bias
    if lora is not None and added is not None:
        shift += lora.scale * added.float()
    return Affine(gain, shift)


def _b_rows(lora: LoraModule, gain: torch.Tensor | None, default_scale: float, dtype: torch.dtype) -> torch.Tensor:
    """B as rank rows. Where the module's scale differs from the adapter's, B holds the ratio."""
    ratio = lora.scale / default_scale
    b = lora.b.t()
    if ratio != 1.0 or gain is not None:
        b = b.double() * ratio * (1.0 if gain is None else 1 + gain.double())
    return b.to(dtype).contiguous()


def _token_patch(module: BaseModule, update: TokenUpdate, dtype: torch.dtype) -> Patch:
    order = sorted(range(len(update.ids)), key=update.ids.__getitem__)
    ids = torch.tensor([update.ids[i] for i in order])
    rows = update.rows[order]
    if module.kind is ModuleKind.EMBEDDING:
        return TokenRows(ids, (rows.to(dtype) * module.output_scale).to(dtype))
    return TokenColumns(ids, rows.to(dtype))


def _fold_parameters(weights: LoraWeights, base: Base, dtype: torch.dtype, patches: dict[str, list[Patch]]) -> None:
    """One patch a module for all its bare parameters: low-rank terms for experts, the sum for a plain matrix."""
    by_module: dict[str, dict[str, torch.Tensor]] = {}
    for full, term in weights.parameters.items():
        name, _, key = full.rpartition(".")
        parameters = by_module.setdefault(name, {})
        if base.modules[name].kind is ModuleKind.EXPERTS:
            parameters[f"{key}.a"] = (term.a.double() * term.scale).to(dtype)
            parameters[f"{key}.b"] = term.b.to(dtype).contiguous()
        else:
            own = base.modules[name].read(key).cpu()
            parameters[key] = (own.double() + term.scale * (term.b[0].double() @ term.a[0].double())).to(dtype)
    for name, parameters in by_module.items():
        module = base.modules[name]
        patches.setdefault(name, []).append(Own(module.with_terms or module.own, parameters))
