"""What of a model is trained: PEFT's own configurations, by method, modules and layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from weft.errors import InvalidConfig
from weft.making.config import ALL_LINEAR, IMPORTANCE, LoopConfig, MethodConfig, Task

_LAYER = re.compile(r"\.(\d+)\.")
_NAMES = re.compile(r"[\w.,]+")


def adapted(
    model: PreTrainedModel, method: MethodConfig, task: Task, sample: Iterable[Mapping[str, torch.Tensor]]
) -> PeftModel:
    """The model with an adapter to train, in float32 whatever the base is in; the base is frozen.

    sample: batches to measure importance on. Raises InvalidConfig for modules or layers that the model has not.
    """
    options: dict[str, Any] = {"target_modules": DUMMY_TARGET_MODULES}
    if method.name == "head":
        options["modules_to_save"] = [_head_name(model)] if task == "generate" else None
    else:
        options = _targets(model, method, sample) | {
            "use_rslora": method.name == "rslora",
            "use_dora": method.name == "dora",
            "lora_dropout": method.dropout,
        }
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        task_type="CAUSAL_LM" if task == "generate" else "SEQ_CLS",
        **options,
    )
    try:
        made = get_peft_model(model, config)
    except ValueError as error:
        raise InvalidConfig(f"--modules {method.modules} can't be trained: {' '.join(str(error).split())}") from None
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    assert isinstance(made, PeftModel)
    return made


def optimizer_of(model: PeftModel, method: MethodConfig, loop: LoopConfig) -> torch.optim.Optimizer | None:
    """LoRA+'s, with a higher rate for B than for A; None for the Trainer's own."""
    if method.name != "lora+":
        return None
    optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=loop.learning_rate,
        loraplus_lr_ratio=method.loraplus_ratio,
        loraplus_weight_decay=loop.weight_decay,
    )
    return optimizer


def _output_head(model: PreTrainedModel) -> nn.Module | None:
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


def _head_name(model: PreTrainedModel) -> str:
    head = _output_head(model)
    names = [str(name) for name, module in model.named_modules() if module is head]
    if names:
        return names[0]
    raise InvalidConfig("--method head: the model has no output head of its own")


def _targets(
    model: PreTrainedModel, method: MethodConfig, sample: Iterable[Mapping[str, torch.Tensor]]
) -> dict[str, Any]:
    """`target_modules`, and `layers_to_transform` where PEFT can go by it."""
    linear = _linear_modules(model)
    layers = {int(match[1]) for name in linear if (match := _LAYER.search(name))}
    if beyond := sorted(set(method.layers) - layers):
        raise InvalidConfig(f"--layers names {beyond[0]}; the model has the layers 0 to {max(layers, default=0)}")
    chosen = {name: module for name, module in linear.items() if _is_in(name, method.layers)}
    if method.modules.startswith(IMPORTANCE):
        return {"target_modules": _most_important(model, chosen, int(method.modules.removeprefix(IMPORTANCE)), sample)}
    if method.modules == ALL_LINEAR and not method.layers:
        return {"target_modules": ALL_LINEAR}
    if method.modules == ALL_LINEAR or _NAMES.fullmatch(method.modules):
        kinds = sorted({name.rpartition(".")[2] for name in linear})
        names = kinds if method.modules == ALL_LINEAR else method.modules.split(",")
        _check_names(model, names, kinds)
        return {"target_modules": names, "layers_to_transform": list(method.layers) or None}
    if method.layers:
        raise InvalidConfig("--layers goes with names of modules: put the layers into the expression of --modules")
    _check_expression(method.modules)
    return {"target_modules": method.modules}


def _check_expression(expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise InvalidConfig(f"--modules is {expression!r}, which is no regular expression ({error})") from None


def _check_names(model: PreTrainedModel, wanted: Iterable[str], kinds: Iterable[str]) -> None:
    names = [name for name, _ in model.named_modules()]
    for name in wanted:
        if not any(found == name or found.endswith(f".{name}") for found in names):
            words = f"which the model has not; its linear modules are {', '.join(kinds)}"
            raise InvalidConfig(f"--modules names {name!r}, {words}")


def _linear_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear module but the heads, as PEFT's `all-linear` has them."""
    heads = {_output_head(model), getattr(model, "score", None), getattr(model, "classifier", None)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module not in heads
    }


def _is_in(name: str, layers: tuple[int, ...]) -> bool:
    match = _LAYER.search(name)
    return not layers or (match is not None and int(match[1]) in layers)


def _most_important(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], count: int, sample: Iterable[Mapping[str, torch.Tensor]]
) -> list[str]:
    """The modules with the largest Frobenius norms of the loss' gradient by their weights, on a sample."""
    weights = {name: module.get_parameter("weight") for name, module in modules.items()}
    if count > len(weights):
        raise InvalidConfig(
            f"--modules {IMPORTANCE}{count} asks for more than the {len(weights)} modules that there are"
        )
    with _gradients_of(model, weights.values()):
        for batch in sample:
            model(**batch).loss.backward()
        norms = {name: 0.0 if weight.grad is None else float(weight.grad.norm()) for name, weight in weights.items()}
    return sorted(sorted(norms, key=norms.__getitem__, reverse=True)[:count])


@contextmanager
def _gradients_of(model: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Only these have gradients inside the block, and none after it."""
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        model.requires_grad_(True)
        model.zero_grad(set_to_none=True)
