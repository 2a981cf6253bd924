"""Whether an adapter does anything at all."""

from __future__ import annotations

import torch

from weft.adapters.base import Base, BaseModule
from weft.adapters.fold import Folded
from weft.kernels.bottleneck import Bottleneck, NativeBottleneck
from weft.kernels.patches import Affine, EmbeddingLowRank, LowRank, Own, Patch, TokenColumns, TokenRows

_ROUNDING = 1e-6
"""Gains of DoRA magnitudes that were never trained are this small, and not quite zero."""


def has_effect(folded: Folded, base: Base) -> bool:
    """Whether anything in it changes what the base gives for some input."""
    if any(a.any() and b.any() for a, b in folded.rows.values()):
        return True
    return any(_changes(patch, base.modules[name]) for name, patches in folded.patches.items() for patch in patches)


def _changes(patch: Patch, module: BaseModule) -> bool:
    match patch:
        case LowRank(a=a, b=b) | EmbeddingLowRank(a=a, b=b):
            return bool(a.any() and b.any())
        case Affine(gain=gain, shift=shift):
            return bool(max(gain.abs().max(), shift.abs().max()) > _ROUNDING)
        case TokenRows(ids=ids, rows=rows) | TokenColumns(ids=ids, rows=rows):
            scale = module.output_scale if isinstance(patch, TokenRows) else 1.0
            return not torch.equal(rows, (module.read("weight")[ids].cpu() * scale).to(rows.dtype))
        case Own(parameters=parameters):
            return any(_differs(name, tensor, module, patch) for name, tensor in parameters.items())
        case Bottleneck() | NativeBottleneck():
            return any(tensor.any() for tensor in patch.ends)
    return True


def _differs(name: str, tensor: torch.Tensor, module: BaseModule, patch: Own) -> bool:
    key, _, half = name.partition(".")
    if half:  # a low-rank term, of which both halves must be there
        return bool(tensor.any() and patch.parameters[f"{key}.{'b' if half == 'a' else 'a'}"].any())
    own = module.read(key).cpu().to(tensor.dtype)
    return not torch.equal(tensor, own if own.shape == tensor.shape else own.t())
