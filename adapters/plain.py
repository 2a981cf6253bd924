"""The plain reference: what one adapter makes of one module, as PEFT's own modules compute it.

Slow, and without pages, plans or folding: what is served is compared with this.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from weft.adapters.base import BaseModule, ModuleKind
from weft.adapters.content import LoraWeights
from weft.kernels.reference import bottleneck


def plain_output(
    name: str, inputs: Sequence[torch.Tensor], output: torch.Tensor, module: BaseModule, weights: LoraWeights
) -> torch.Tensor:
    """The first output of a module with the adapter, in float32.

    inputs: rows, as the module takes them; of one that adds to the residual stream, that too. output: what the base's
    module gave for them.
    """
    if name in weights.bottlenecks:
        return bottleneck(output, inputs[-1], weights.bottlenecks[name]).float()
    if module.kind in (ModuleKind.EXPERTS, ModuleKind.OTHER):
        made = module.own(_merged_parameters(name, module, weights))(*inputs)
        return (made[0] if isinstance(made, tuple) else made).float()
    if is_added(name, module, weights):
        return output.float() + _added(name, inputs[0].float(), module, weights)
    weight, bias = _merged(name, module, weights)
    if module.kind is ModuleKind.EMBEDDING:
        return weight.t()[inputs[0]] * module.output_scale
    return functional.linear(inputs[0].float(), weight, bias)


def is_added(name: str, module: BaseModule, weights: LoraWeights) -> bool:
    """Whether all that is done to a module adds to its output, whatever that is."""
    lora = weights.modules.get(name)
    has_dora = lora is not None and lora.magnitude is not None
    is_linear = module.kind in (ModuleKind.LINEAR, ModuleKind.HEAD)
    return is_linear and not has_dora and name not in {*weights.saved, *weights.tokens, *weights.bottlenecks}


def _added(name: str, x: torch.Tensor, module: BaseModule, weights: LoraWeights) -> torch.Tensor:
    """What is added to a linear module's output: s B (A x) + s c + (b' - b)."""
    lora, bias = weights.modules.get(name), weights.biases.get(name)
    added = torch.zeros(len(x), module.d_out, device=x.device)
    if lora is not None:
        made = x @ lora.a.to(x.device).float().t() @ lora.b.to(x.device).float().t()
        added += lora.scale * (made if lora.bias is None else made + lora.bias.to(x.device).float())
    if bias is not None:
        added += bias.to(x.device).float() - module.read("bias").float()
    return added


def _merged(name: str, module: BaseModule, weights: LoraWeights) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [d_out, d_in] and bias [d_out]; an embedding's weight is its table, transposed."""
    saved, lora, update = weights.saved.get(name, {}), weights.modules.get(name), weights.tokens.get(name)
    weight = module.read("weight").float()
    device = weight.device
    is_table = module.kind is ModuleKind.EMBEDDING
    if "weight" in saved:
        is_as_read = tuple(saved["weight"].shape) == tuple(weight.shape) == module.shapes["weight"]
        weight = (saved["weight"] if is_as_read else saved["weight"].t()).to(device).float()
    bias = saved.get("bias", weights.biases.get(name))
    if bias is None and "bias" in module.shapes:
        bias = module.read("bias")
    bias = None if bias is None else bias.to(device).float()
    weight = weight.t() if is_table else weight
    if update is not None:  # PEFT wraps the base's module with them, and what else there is wraps that
        weight = weight.clone()
        rows = weight.t() if is_table else weight
        rows[list(update.ids)] = update.rows.to(device).float()
        bias = None
    if lora is not None:
        weight = weight + lora.scale * (lora.b.to(device).float() @ lora.a.to(device).float())
        if lora.magnitude is not None:
            norm = torch.linalg.vector_norm(weight, dim=1)
            weight = weight * (lora.magnitude.to(device).float() / norm)[:, None]
        if lora.bias is not None:
            added = lora.scale * lora.bias.to(device).float()
            bias = added if bias is None else bias + added
    return weight, bias


def _merged_parameters(name: str, module: BaseModule, weights: LoraWeights) -> dict[str, torch.Tensor]:
    """The parameters that differ from the base's, in the base's dtype."""
    merged = dict(weights.saved.get(name, {}))
    if name in weights.biases:
        merged["bias"] = weights.biases[name]
    for key in module.shapes:
        term = weights.parameters.get(f"{name}.{key}")
        if term is None:
            continue
        own = module.read(key)
        delta = term.scale * (term.b.to(own.device).float() @ term.a.to(own.device).float())
        delta = delta.transpose(1, 2) if module.is_transposed else delta
        merged[key] = own.float() + delta.reshape(own.shape)
    return {key: tensor.to(module.read(key)) for key, tensor in merged.items()}
