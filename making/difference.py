"""What a full fine-tune changed of its base, found by reading both once, a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from weft.errors import InvalidModel
from weft.making.model_files import Checkpoint, Skeleton

Track = Callable[[Sequence[str], str], Iterable[str]]
"""Gives the names one by one, and shows how far that has come; the second says what is done with them."""

_FLOATS = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class Difference:
    """Names of what changed.

    linear: modules whose weight did. biases: of linear modules. whole: other modules, such as norms, embeddings and the
    head. unplaceable: tensors that no adapter of these files can hold: experts, and names that transformers changes.
    """

    linear: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    unplaceable: list[str] = field(default_factory=list)

    @property
    def others(self) -> list[str]:
        return [*self.whole, *self.biases, *self.unplaceable]


def find_difference(base: Checkpoint, tuned: Checkpoint, skeleton: Skeleton, track: Track) -> Difference:
    """skeleton: the base's. Raises InvalidModel where the two are not of the same shape, or hold what is no number."""
    problems = list(_mismatches(base, tuned))
    if problems:
        raise InvalidModel(f"{tuned.name} is no fine-tune of {base.name}: {'; '.join(problems)}")
    difference, not_finite = Difference(), []
    for name in track(sorted(base.shapes), "comparing"):
        before, after = base.read(name), tuned.read(name)
        if _are_same(before, after):
            continue
        if not (before.isfinite().all() and after.isfinite().all()):
            not_finite.append(name)
        _place(name, skeleton, difference)
    if not_finite:
        raise InvalidModel(f"{tuned.name} or {base.name} holds NaN or infinite values in {', '.join(not_finite)}")
    if not difference.linear and not difference.others:
        raise InvalidModel(f"{tuned.name} and {base.name} are the same: there is nothing to extract")
    return difference


def delta(base: Checkpoint, tuned: Checkpoint, skeleton: Skeleton, module: str) -> torch.Tensor:
    """W_tuned - W_base of a linear module, float32 [d_out, d_in]; float64 where either is."""
    before, after = base.read(f"{module}.weight"), tuned.read(f"{module}.weight")
    dtype = torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32
    difference = after.to(dtype, copy=True).sub_(before.to(dtype))
    return difference.t() if module in skeleton.transposed else difference


def _mismatches(base: Checkpoint, tuned: Checkpoint) -> Iterator[str]:
    """A line for each kind, with all its names."""
    both = base.shapes.keys() & tuned.shapes.keys()
    resized = sorted(name for name in both if base.shapes[name] != tuned.shapes[name])
    shapes = [f"{name} {list(tuned.shapes[name])} for {list(base.shapes[name])}" for name in resized]
    odd = {f"{n} ({each.dtypes[n]})" for each in (base, tuned) for n in each.shapes if each.dtypes[n] not in _FLOATS}
    settings = [
        f"{key} {tuned.settings.get(key)!r} for {base.settings.get(key)!r}"
        for key in sorted(base.settings.keys() | tuned.settings.keys())
        if base.settings.get(key) != tuned.settings.get(key)
    ]
    for what, names in (
        ("it lacks", sorted(base.shapes.keys() - tuned.shapes.keys())),
        ("it has besides", sorted(tuned.shapes.keys() - base.shapes.keys())),
        ("its shapes differ (another vocabulary or size):", shapes),
        ("quantised tensors can't be compared:", sorted(odd)),
        ("its config.json differs in", settings if not shapes else []),
    ):
        if names:
            yield f"{what} {', '.join(names)}"


def _are_same(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Also where one is the other rounded to its type: saving a model in bfloat16 is not a change."""
    return torch.equal(after, before.to(after.dtype)) or torch.equal(before, after.to(before.dtype))


def _place(name: str, skeleton: Skeleton, difference: Difference) -> None:
    module, _, key = name.rpartition(".")
    own = [shape for each, shape in skeleton.parameters.items() if each.rpartition(".")[0] == module]
    if module in skeleton.linear and key == "weight":
        difference.linear.append(module)
    elif module in skeleton.linear and key == "bias":
        difference.biases.append(name)
    elif name not in skeleton.parameters or any(len(shape) > 2 for shape in own):
        difference.unplaceable.append(name)
    elif module not in difference.whole:
        difference.whole.append(module)
