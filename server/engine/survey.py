"""What a model is made of, found out by watching it run one short prompt."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from weft.adapters.base import Base, BaseModule, Classifier, Function, ModuleKind, Parameters
from weft.errors import InvalidModel, one_line
from weft.server.engine.attention import WholePrompt
from weft.server.engine.calls import NUM_TOKENS, Calls, watch
from weft.server.engine.encoders import Encoder, is_encoder, take_apart
from weft.server.engine.experts import LowRankExperts, are_experts
from weft.server.engine.kv_cache import KvShape
from weft.server.engine.linear import is_linear, linear_with, read
from weft.server.engine.proving import with_its_own
from weft.server.engine.step import AttentionOptions, running

_EXPERTS_TOLERANCE = 1e-2
_NORMS_BACK = 4
"""How many norms may lie between the one that reads the residual stream and what is added to it."""
_SERVED_LAYERS = frozenset({"full_attention", "sliding_attention"})

NO_INTERFACE = "does not use transformers' attention interface, so Weft can't page its cache"


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found.

    kv_shapes: by layer. windows: attention windows, in tokens. linear_groups: linear modules that are called, those
    together that read the same input. encoder: the model's parts, where it is one.
    """

    kv_shapes: Mapping[int, KvShape]
    windows: frozenset[int]
    linear_groups: tuple[tuple[str, ...], ...]
    base: Base
    encoder: Encoder | None = None


@torch.inference_mode()
def survey(model: PreTrainedModel, device: torch.device) -> Survey:
    """Find out what the model's layers keep, and which modules an adapter may change.

    Raises InvalidModel where the model does not go through the attention interface, or keeps other state.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    odd = sorted(set(getattr(config, "layer_types", None) or []) - _SERVED_LAYERS)
    if odd:
        raise InvalidModel(f"{name} has layers of the kind {', '.join(odd)}; only attention layers can be served")
    step = _Watching(causal=not is_encoder(model.config))
    counted = torch.arange(NUM_TOKENS, device=device)[None]
    with watch(model) as calls, refusing(name), running(step):
        made = model(input_ids=counted, position_ids=counted, use_cache=False, return_dict=True)
    if not step.kv_shapes:
        raise InvalidModel(f"{name} {NO_INTERFACE}")
    encoder = None
    if not step.causal:
        with refusing(name), running(WholePrompt()):
            encoder, after = take_apart(model, counted, made.logits[0])
        calls |= after
        del calls[encoder.classifier.output]
    if "sliding_attention" in (getattr(config, "layer_types", None) or []) and not step.windows:
        raise InvalidModel(f"{name} has sliding-window layers, but does not pass the window to its attention")
    base = _describe(model, calls, encoder.classifier if encoder is not None else None)
    linear = [path for path, seen in calls.items() if seen.count and is_linear(model.get_submodule(path))]
    return Survey(
        kv_shapes=step.kv_shapes,
        windows=frozenset(step.windows),
        linear_groups=(*base.groups, *((name,) for name in linear if name not in base.of_kind(ModuleKind.LINEAR))),
        base=base,
        encoder=encoder,
    )


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """A model whose forward pass fails on a plain prompt is refused, in one line."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError) as error:
        raise InvalidModel(f"{name} can't be served: its forward pass fails ({one_line(error)})") from error


class _Watching(WholePrompt):
    """Notes each layer's shapes and options."""

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.kv_shapes: dict[int, KvShape] = {}
        self.windows: set[int] = set()

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        if layer in self.kv_shapes:
            raise InvalidModel("a layer attends twice: the model shares or crosses its attention")
        if options.causal != self.causal:
            sides = "what comes after a token" if self.causal else "only what comes before a token"
            raise InvalidModel(f"a layer sees {sides}, which is not served in a model of its kind")
        self.kv_shapes[layer] = KvShape(key.shape[0], key.shape[2], value.shape[2])
        if options.window is not None:
            self.windows.add(options.window)
        return super().attend(layer, query, key, value, options)


def _describe(model: PreTrainedModel, calls: Mapping[str, Calls], classifier: Classifier | None) -> Base:
    between = classifier.between if classifier is not None else ()
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    embedding = model.get_input_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    modules = {}
    for name, seen in calls.items():
        module = model.get_submodule(name)
        kind = _kind(module, seen, is_head=module is head or name in between)
        if kind is not None:
            modules[name] = _base_module(model, name, kind)
    return Base(
        modules=modules,
        embedding=names.get(id(embedding), ""),
        head=names.get(id(head), "") if head is not None else "",
        is_tied=head is not None and getattr(head, "weight", None) is embedding.weight,
        groups=_groups([name for name, module in modules.items() if module.kind is ModuleKind.LINEAR], calls),
        residuals=_residuals(modules, calls) if classifier is None else {},
        backbone=names[id(model.base_model)],
        classifier=classifier,
    )


def _groups(linear: Sequence[str], calls: Mapping[str, Calls]) -> tuple[tuple[str, ...], ...]:
    """Modules of one parent that were given the very same tensor."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name in linear:
        groups.setdefault((name.rpartition(".")[0], id(calls[name].inputs[0])), []).append(name)
    return tuple(map(tuple, groups.values()))


def _residuals(modules: Mapping[str, BaseModule], calls: Mapping[str, Calls]) -> dict[str, str]:
    """Linear modules whose output and what one norm reads add up, to the bit, to what a later norm reads.

    Of the norms that are found so, it must be the last one before the module: a step keeps what that one reads.
    """
    found: dict[str, str] = {}
    norms: list[str] = []
    linear: list[str] = []
    for name in sorted(modules, key=lambda name: calls[name].order):
        if modules[name].kind is ModuleKind.LINEAR:
            linear.append(name)
        elif modules[name].kind is ModuleKind.OTHER:
            stream = calls[name].inputs[0]
            for last, norm in itertools.product(linear, norms[-_NORMS_BACK:]):
                before, added = calls[norm].inputs[0], calls[last].output
                if before.shape == added.shape == stream.shape and torch.equal(before + added, stream):
                    found[last] = norm
            norms.append(name)
            linear.clear()
    reading = [norm for norm in norms if norm in found.values()]
    return {
        last: norm
        for last, norm in found.items()
        if norm == [each for each in reading if calls[each].order < calls[last].order][-1]
    }


def _kind(module: nn.Module, seen: Calls, *, is_head: bool) -> ModuleKind | None:
    """None for a module that an adapter can't be served on."""
    if not seen.is_by_row:
        return None
    if is_linear(module):
        return ModuleKind.HEAD if is_head else ModuleKind.LINEAR
    if isinstance(module, nn.Embedding):
        return ModuleKind.EMBEDDING
    if any(list(child.parameters()) for child in module.children()) or isinstance(module, nn.Linear):
        return None
    if any(parameter.dim() > 2 for parameter in module.parameters(recurse=False)):
        return ModuleKind.EXPERTS if are_experts(module) and _runs_as_experts(module, seen) else None
    return ModuleKind.OTHER


def _runs_as_experts(module: nn.Module, seen: Calls) -> bool:
    """Whether our own function of the experts, which adapters' terms go through, gives what the module gave."""
    try:
        made = LowRankExperts(module, {})(*seen.inputs)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        return False
    expected: torch.Tensor = seen.output
    return bool((made - expected).float().norm() <= _EXPERTS_TOLERANCE * expected.float().norm())


def _base_module(model: nn.Module, name: str, kind: ModuleKind) -> BaseModule:
    module = model.get_submodule(name)
    shapes = {key: tuple(parameter.shape) for key, parameter in module.named_parameters(recurse=False)}
    d_in, d_out = 0, 0
    if kind in (ModuleKind.LINEAR, ModuleKind.HEAD):
        rows, columns = shapes["weight"]
        d_in, d_out = (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
    elif kind is ModuleKind.EMBEDDING:
        d_in, d_out = shapes["weight"]
    is_linear_kind = kind in (ModuleKind.LINEAR, ModuleKind.HEAD)
    return BaseModule(
        kind=kind,
        d_in=d_in,
        d_out=d_out,
        shapes=shapes,
        read=lambda key: read(model.get_submodule(name), key),
        own=partial(linear_with, is_conv1d=isinstance(module, Conv1D)) if is_linear_kind else _own(module),
        with_terms=partial(LowRankExperts, module) if kind is ModuleKind.EXPERTS else None,
        output_scale=float(getattr(module, "embed_scale", 1.0)) if kind is ModuleKind.EMBEDDING else 1.0,
        is_transposed=bool(getattr(module, "is_transposed", False)),
        is_concatenated=bool(getattr(module, "is_concatenated", True)),
    )


def _own(module: nn.Module) -> Callable[[Parameters], Function]:
    """The module with other parameters; what they don't replace is shared with the original."""

    def own(parameters: Parameters) -> Function:
        twin = copy.copy(module)
        twin._parameters = {**module._parameters, **parameters}  # type: ignore[dict-item] # noqa: SLF001 - tensors will do
        twin._forward_hooks = OrderedDict()  # noqa: SLF001 - the twin is not to be adapted again
        with_its_own(twin)
        return twin

    return own
