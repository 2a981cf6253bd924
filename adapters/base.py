"""The frozen base, as adapters see it: which modules there are, of what kind and shape, and their parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

import torch

from weft.kernels.patches import Output

Parameters = Mapping[str, torch.Tensor]
Function = Callable[..., Output]


class ModuleKind(Enum):
    """What an adapter may do to a module depends on it.

    LINEAR: x W^T + b on the whole row, once a step. HEAD: the same on the rows that a token is sampled from, or on one
    vector a prompt. EMBEDDING:
    rows of a table. EXPERTS: a stack of expert weights behind a router. OTHER: anything else that treats each row by
    itself, a norm or a router.
    """

    LINEAR = "linear"
    HEAD = "lm_head"
    EMBEDDING = "embedding"
    EXPERTS = "experts"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class BaseModule:
    """One module.

    d_in, d_out: features; of an EMBEDDING the number of rows and their width; 0 where that says nothing.
    shapes: of its own parameters, by name; those of EXPERTS are [experts, d_in, d_out] when is_transposed, else
    [experts, d_out, d_in], their gate and up halves one after the other when is_concatenated. output_scale: the factor
    that an EMBEDDING puts on its rows.
    read: a parameter as a plain tensor; the weight of LINEAR and HEAD as [d_out, d_in]. own: the module's function with
    other parameters in the place of some of its own. with_terms: of EXPERTS, their function with low-rank terms,
    `name.a` [experts, r, d_in] and `name.b` [experts, d_out, r], added to some.
    """

    kind: ModuleKind
    d_in: int
    d_out: int
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]
    own: Callable[[Parameters], Function]
    with_terms: Callable[[Parameters], Function] | None = None
    output_scale: float = 1.0
    is_transposed: bool = False
    is_concatenated: bool = True


@dataclass(frozen=True, slots=True)
class Classifier:
    """What an encoder's class makes labels' logits by, of one vector a prompt.

    between: the modules that see it first. output: the linear one after them, of num_features inputs. absent: those of
    all these whose parameters the checkpoint does not have.
    """

    between: tuple[str, ...]
    output: str
    num_features: int
    absent: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Base:
    """Every module that an adapter may change, by name.

    embedding, head: the names of the input embedding and the output head. is_tied: whether they share their weight.
    groups: the LINEAR modules, those together that read the same input. backbone: the name of the module that gives the
    last hidden states; "" where none does. residuals: LINEAR modules whose output is added to the residual stream as it
    is, each with the norm that reads the stream before. classifier: of an encoder.
    """

    modules: Mapping[str, BaseModule] = field(default_factory=dict)
    embedding: str = ""
    head: str = ""
    is_tied: bool = False
    groups: tuple[tuple[str, ...], ...] = ()
    residuals: Mapping[str, str] = field(default_factory=dict)
    backbone: str = ""
    classifier: Classifier | None = None

    @property
    def headless(self) -> Base:
        """Without the output head: what all of transformers' classes with this backbone have in common."""
        modules = {name: module for name, module in self.modules.items() if name != self.head}
        return replace(self, modules=modules, head="", is_tied=False)

    @property
    def backbone_alone(self) -> Base:
        """As a model of its own, whose modules' names begin within it."""
        prefix = f"{self.backbone}." if self.backbone else ""
        inner = {name: name.removeprefix(prefix) for name in self.headless.modules if name.startswith(prefix)}
        return Base(
            modules={inner[name]: self.modules[name] for name in inner},
            embedding=inner.get(self.embedding, ""),
            groups=tuple(tuple(inner[name] for name in group) for group in self.groups if inner.keys() >= {*group}),
        )

    @property
    def hidden_size(self) -> int:
        """Numbers of a last hidden state."""
        return self.modules[self.embedding].d_out if self.head not in self.modules else self.modules[self.head].d_in

    @property
    def num_features(self) -> int:
        """Numbers that a sequence classifier's own output sees."""
        return self.hidden_size if self.classifier is None else self.classifier.num_features

    def of_kind(self, kind: ModuleKind) -> dict[str, BaseModule]:
        return {name: module for name, module in self.modules.items() if module.kind is kind}
