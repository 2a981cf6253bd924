"""What an adapter is made of, once it is known to fit the base; and its identity."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from weft.adapters.classes import Classes
from weft.kernels.bottleneck import BottleneckWeights

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class LoraModule:
    """Low-rank rows of one module: a is [rank, d_in], b is [d_out, rank], as PEFT stores them; scale multiplies b·a.

    Of an embedding, d_in is the number of its rows. bias: [d_out], what lora_B adds beside. magnitude: [d_out], DoRA's.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        named = {"a": self.a, "b": self.b, "bias": self.bias, "magnitude": self.magnitude}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True, slots=True)
class LoraParameter:
    """A low-rank term of a bare parameter: a is [n, rank, d_in], b [n, d_out, rank]; n experts, or 1 for a matrix."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[1]


@dataclass(frozen=True, slots=True)
class TokenUpdate:
    """New rows for some tokens; rows is [len(ids), width]."""

    ids: tuple[int, ...]
    rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class OwnHead:
    """A sequence classifier's. name: of the module. weight: [labels, hidden], bias: [labels], as in the file."""

    name: str
    weight: torch.Tensor
    bias: torch.Tensor | None
    classes: Classes

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        named = {"weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that an adapter does to a module or a parameter. rank, scale: 0 where there is no low-rank term."""

    name: str
    what: str
    rank: int
    scale: float
    tensors: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """A validated adapter in host memory. All but `modules` is keyed by module, or `module.parameter`.

    modules: LoRA of linear modules, the head, the embedding. parameters: LoRA of bare parameters. biases: trained in
    the place of the base's. saved: fully trained modules, by the names of their parameters. tokens: trained token rows.
    invocation: of an activated LoRA, the tokens that start it. bottlenecks: networks behind sub-layers. head: of a
    sequence classifier.
    """

    modules: Mapping[str, LoraModule]
    default_scale: float
    parameters: Mapping[str, LoraParameter] = field(default_factory=dict)
    biases: Mapping[str, torch.Tensor] = field(default_factory=dict)
    saved: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    tokens: Mapping[str, TokenUpdate] = field(default_factory=dict)
    invocation: tuple[int, ...] = ()
    bottlenecks: Mapping[str, BottleneckWeights] = field(default_factory=dict)
    head: OwnHead | None = None
    digest: str = ""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks, ascending."""
        low_rank = {term.rank for terms in (self.modules, self.parameters) for term in terms.values()}
        return tuple(sorted(low_rank | {bottleneck.rank for bottleneck in self.bottlenecks.values()}))

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.tensors())

    @property
    def touched(self) -> tuple[str, ...]:
        """The names of the modules that it changes."""
        names = {*self.modules, *self.biases, *self.saved, *self.tokens, *self.bottlenecks}
        return tuple(sorted(names | {name.rpartition(".")[0] for name in self.parameters}))

    def within(self, module: str) -> LoraWeights:
        """The same of a model that has the modules inside this one; "" for the model itself."""

        def named(parts: Mapping[str, _T]) -> dict[str, _T]:
            return {f"{module}.{name}" if module else name: part for name, part in parts.items()}

        return replace(
            self,
            modules=named(self.modules),
            parameters=named(self.parameters),
            biases=named(self.biases),
            saved=named(self.saved),
            tokens=named(self.tokens),
        )

    def parts(self) -> Iterator[Part]:
        """Everything that it does, one by one."""
        for name, module in self.modules.items():
            what = "LoRA" if module.magnitude is None else "DoRA"
            yield Part(name, what, module.rank, module.scale, tuple(module.tensors.values()))
        for name, term in self.parameters.items():
            yield Part(name, "LoRA of a parameter", term.rank, term.scale, (term.a, term.b))
        for name, bias in self.biases.items():
            yield Part(name, "own bias", 0, 0.0, (bias,))
        for name, saved in self.saved.items():
            yield Part(name, "own weights", 0, 0.0, tuple(saved.values()))
        for name, update in self.tokens.items():
            yield Part(name, f"{len(update.ids)} token rows", 0, 0.0, (update.rows,))
        for name, each in self.bottlenecks.items():
            yield Part(name, f"bottleneck of {each.rank}", 0, 0.0, tuple(each.tensors.values()))
        if self.head is not None:
            yield Part(self.head.name, str(self.head.classes), 0, 0.0, tuple(self.head.tensors.values()))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor, by a name that says what it is, in order."""
        for name, module in sorted(self.modules.items()):
            for part, tensor in module.tensors.items():
                yield f"{name}.{part}", tensor
        for name, parameter in sorted(self.parameters.items()):
            yield f"{name}:a", parameter.a
            yield f"{name}:b", parameter.b
        yield from ((f"{name}:bias", bias) for name, bias in sorted(self.biases.items()))
        for name, saved in sorted(self.saved.items()):
            yield from ((f"{name}:saved:{key}", tensor) for key, tensor in sorted(saved.items()))
        yield from ((f"{name}:tokens", update.rows) for name, update in sorted(self.tokens.items()))
        for name, each in sorted(self.bottlenecks.items()):
            kind = f"{name}:bottleneck:{each.non_linearity}:{each.reads}"
            yield from ((f"{kind}:{part}", tensor) for part, tensor in each.tensors.items())
        if self.head is not None:
            yield from ((f"{self.head.name}:head:{key}", tensor) for key, tensor in self.head.tensors.items())


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether it holds neither NaN nor infinities; reads it once and takes no memory, unlike torch.isfinite."""
    return tensor.numel() == 0 or all(math.isfinite(end) for end in torch.stack(tensor.aminmax()).tolist())


def digest_of(weights: LoraWeights) -> str:
    """`sha256:<hex>` over what the adapter computes: scales, tokens, each tensor's name, dtype, shape and content.

    And over what a head's logits stand for.
    """
    scales = {name: module.scale for name, module in weights.modules.items()}
    scales |= {name: parameter.scale for name, parameter in weights.parameters.items()}
    ids = {name: update.ids for name, update in weights.tokens.items()}
    said: list[object] = [scales, ids, weights.invocation]
    if weights.head is not None:
        said += [weights.head.classes.labels, weights.head.classes.problem_type.value]
    sha = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, tensor in weights.tensors():
        sha.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        sha.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return f"sha256:{sha.hexdigest()}"
