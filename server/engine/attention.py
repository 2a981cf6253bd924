"""Paged attention behind transformers' attention interface.

A transformers model that asks for the implementation `ATTENTION` calls `_attend` once a layer; it lets the running step
do the work. On a CPU the C library reads the cache where it lies (see `kernels/attention.py`); elsewhere
blocks are gathered (see `gathering.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AttentionInterface

from weft.errors import InvalidModel
from weft.kernels.attention import DTYPES, PagedAttention, Run
from weft.kernels.lora import has_triton
from weft.kernels.native import Native
from weft.kernels.plan import Plan
from weft.server.engine.adapting import Adapting
from weft.server.engine.batch import Batch
from weft.server.engine.decode_attention import InPlaceDecodes
from weft.server.engine.gathering import Gathering, attend
from weft.server.engine.kv_cache import KvCache
from weft.server.engine.step import Attend, AttentionOptions, Shared, current_step

ATTENTION = "weft"


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature. Tensors are [1, heads, T, d]; returns ([1, T, heads, d_v], None).

    An argument that would change the result and is not honoured refuses the model.
    """
    step = current_step()
    causal = rest.get("is_causal", getattr(module, "is_causal", True)) is not False
    layer = getattr(module, "layer_idx", None)
    if layer is None and not causal:
        layer = id(module)  # an encoder's layers have only to be told apart
    if step is None or not isinstance(layer, int):
        raise InvalidModel(f"{type(module).__name__} attends outside of a numbered layer")
    if attention_mask is not None or rest.get("position_bias") is not None:
        raise InvalidModel(f"{type(module).__name__} needs a mask or a bias")
    options = AttentionOptions(scaling, sliding_window, softcap, s_aux, causal)
    return step.attend(layer, query[0], key[0], value[0], options)[None], None


AttentionInterface.register(ATTENTION, _attend)


class WholePrompt:
    """A step that is one whole prompt, without a cache and without adapters."""

    def __init__(self) -> None:
        self.shared: Shared = {}

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        return attend(query[None], key[None], value[None], None, options, causal=options.causal)[0].transpose(0, 1)

    def adapt(self, modules: tuple[str, ...], inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """The base's output stays as it is."""


class AfterBackbone(WholePrompt):
    """What comes after an encoder's backbone, on pooled vectors; plan: None where no adapter has a part in it."""

    def __init__(self, adapting: Adapting, plan: Plan | None) -> None:
        super().__init__()
        self._adapting, self._plan = adapting, plan

    def adapt(self, modules: tuple[str, ...], inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        if self._plan is not None:
            self._adapting.adapt(self._plan, modules, inputs, outputs)


class PagedStep:
    """A step over the paged cache."""

    def __init__(
        self, batch: Batch, cache: KvCache, adapting: Adapting, head: str, native: Native | None = None
    ) -> None:
        """head: the module that sees only the rows whose logits are wanted; "" where none does."""
        self._batch = batch
        self.attend = attention_of(batch, cache, native)
        self._adapting = adapting
        self._head = (head,)
        self.shared: Shared = {}
        self.hidden: torch.Tensor | None = None
        """Of the last hidden states, those that the batch wants: [m, hidden]; None before the backbone is through."""

    def adapt(self, modules: tuple[str, ...], inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        plan = self._batch.logit_plan if modules == self._head else self._batch.plan
        if plan is not None:
            self._adapting.adapt(plan, modules, inputs, outputs)

    def see(self, last_hidden: torch.Tensor) -> None:
        """last_hidden: [T, hidden]."""
        if self._batch.hidden_rows is not None:
            self.hidden = last_hidden[self._batch.hidden_rows]


def see_last_hidden(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """A backbone's forward hook: give the running step the last hidden states that it wants."""
    step = current_step()
    if isinstance(step, PagedStep):
        step.see(output.last_hidden_state[0])


def attends_in_place(native: Native | None, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a cache is read where it lies, with no copies and no masks."""
    return native is not None and device.type == "cpu" and dtype in DTYPES


def attention_of(batch: Batch, cache: KvCache, native: Native | None) -> Attend:
    """The fastest there is for the cache: it writes a layer's new keys and values, then reads what its rows see."""
    if native is not None and attends_in_place(native, cache.dtype, cache.device):
        return InPlace(batch, cache, native).attend
    if cache.device.type == "cuda" and has_triton():
        return InPlaceDecodes(batch, cache).attend
    return Gathering(batch, cache).attend


class InPlace:
    """By the C library: a row comes out the same to the bit, however its prompt is cut and whatever is beside it."""

    def __init__(self, batch: Batch, cache: KvCache, native: Native) -> None:
        self._layers = cache.layers
        self._attend = PagedAttention(native, _runs(batch), batch.slots, batch.block_tokens)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        return self._attend(
            *(query, key, value, *self._layers[layer]),
            scale=query.shape[2] ** -0.5 if options.scaling is None else options.scaling,
            window=options.window,
            softcap=options.softcap,
            sinks=options.sinks,
            causal=options.causal,
        )


def _runs(batch: Batch) -> Iterator[Run]:
    for row, context, blocks in batch.decodes:
        yield Run(row, 1, context, blocks)
    for chunk in batch.chunks:
        yield Run(chunk.start, chunk.num_tokens, chunk.context, chunk.blocks.tolist())
