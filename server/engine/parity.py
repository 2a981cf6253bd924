"""Is this adapter served right? One short prompt, each module's output against the plain reference."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from weft.adapters.content import LoraWeights, OwnHead
from weft.adapters.pages import HostAdapter, PageConfig, PagePool
from weft.adapters.plain import is_added, plain_output
from weft.errors import InvalidAdapter, Problem
from weft.kernels.heads import Head
from weft.kernels.lora import find_backend
from weft.kernels.plan import Plan, build_plan
from weft.server.engine.adapting import Adapting, rows_of
from weft.server.engine.attention import WholePrompt
from weft.server.engine.model import PagedModel
from weft.server.engine.step import Shared, running

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest error allowed, as ‖ours - plain‖ / ‖plain‖ over what is added to a module's output, or all of it."""

INT8_TOLERANCE = 5e-2
"""The same where rank rows are int8. Weights drawn at random come out 0.7 to 1.5 % away; more than three times that has
rows whose largest number is far from the others, which 8 bits can't hold, or is a mistake."""

_NUM_TOKENS = 6


@dataclass(frozen=True, slots=True)
class AdapterProbe:
    """Runs the base once with the adapter in pages of its own, beside whatever is being served.

    May be called from any thread.
    """

    model: PagedModel
    lora_backend: str
    row_dtype: torch.dtype | None = None

    @torch.inference_mode()
    def __call__(self, weights: LoraWeights, host: HostAdapter, source: str) -> float:
        """The largest relative error of any module. Raises InvalidAdapter where it is above `TOLERANCE`."""
        model = self.model
        pool = PagePool(model.base, PageConfig(host.num_pages + 1, model.dtype, model.device, self.row_dtype))
        prompt = self._prompt(weights)
        paged = pool.write(pool.allocate(host), host)
        plan = build_plan([(len(prompt), [(paged, 1.0)])], model.device)
        assert plan is not None, "a prompt has rows"
        step = _Comparing(model, weights, Adapting(pool.groups, find_backend(self.lora_backend, model.native)), plan)
        if weights.head is not None and paged.head is not None:
            step.errors[weights.head.name] = _head_error(weights.head, paged.head)
        ids = torch.tensor([prompt], device=model.device)
        with running(step):
            model.run_whole(ids)
        rounded = host.rows.keys() if self.row_dtype == torch.int8 else ()
        limits = {name: max(TOLERANCE[model.dtype], INT8_TOLERANCE * (name in rounded)) for name in step.errors}
        worst = max(step.errors, key=lambda name: step.errors[name] / limits[name], default=None)
        if worst is not None and not step.errors[worst] <= limits[worst]:
            words = (
                f"comes out {step.errors[worst]:.2g} away from PEFT's formula (relative; at most {limits[worst]:g} is "
                "allowed)"
            )
            if worst in rounded:
                words += "; 8 bits may be too few for it: start the server with --adapter-dtype auto"
            raise InvalidAdapter(source, [Problem(worst, words)])
        return max(step.errors.values(), default=0.0)

    def _prompt(self, weights: LoraWeights) -> list[int]:
        """Tokens at random, and some of those that the adapter has trained."""
        rng = random.Random(0)
        trained = [token for update in weights.tokens.values() for token in update.ids[:2]]
        return [*trained, *(rng.randrange(self.model.vocab_size) for _ in range(_NUM_TOKENS))][:_NUM_TOKENS]


def _head_error(own: OwnHead, served: Head) -> float:
    """On one vector, whose numbers are about as large as those after a norm."""
    device = served.weight.device
    x = torch.randn(1, own.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(device)
    plain = x.double() @ own.weight.to(device).double().t()
    plain += 0 if own.bias is None else own.bias.to(device).double()
    error = (served(x) - plain).norm() / plain.norm().clamp(min=torch.finfo(torch.float32).tiny)
    return float(error.nan_to_num(nan=float("inf")))


@dataclass(slots=True)
class _Comparing(WholePrompt):
    """Adapts as a served step does, and notes how far each module's output is from the plain reference."""

    model: PagedModel
    weights: LoraWeights
    adapting: Adapting
    plan: Plan
    errors: dict[str, float] = field(default_factory=dict)
    shared: Shared = field(default_factory=dict)

    def adapt(self, modules: tuple[str, ...], inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        touched = [name for name in modules if name in self.weights.touched]
        if not touched:
            return
        num_tokens = self.plan.num_tokens
        rows = [rows_of(tensor, num_tokens) for tensor in inputs]
        seen = tuple(tensor.clone() for tensor in outputs)
        parts = self._parts(modules, rows_of(seen[0], num_tokens))
        plain = {}
        for name in touched:
            base = self.model.base.modules[name]
            if is_added(name, base, self.weights):  # on nothing, so that no rounding of the base's output hides it
                parts[name].zero_()
            plain[name] = plain_output(name, rows, parts[name].clone(), base, self.weights)
        self.adapting.adapt(self.plan, modules, inputs, seen)
        self.adapting.adapt(self.plan, modules, inputs, outputs)
        for name in touched:
            error = (parts[name].float() - plain[name]).norm()
            error = error / plain[name].norm().clamp(min=torch.finfo(torch.float32).tiny)
            self.errors[name] = float(error.nan_to_num(nan=float("inf")))

    def _parts(self, modules: tuple[str, ...], y: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each module's columns of what all gave."""
        if len(modules) == 1:
            return {modules[0]: y}
        sites = self.adapting.groups[modules].sites
        return {name: y[:, site.columns] for name, site in zip(modules, sites, strict=True)}
