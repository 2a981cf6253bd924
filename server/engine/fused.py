"""Parts of a transformers model in fewer and faster operations than their classes write them in.

Each is called as the module that it stands for is, and lets adapters and attention see the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weft.kernels.pointwise import Rotate, Rowwise
from weft.server.engine.linear import Joint
from weft.server.engine.step import AttentionOptions, current_step


class Mlp:
    """last(act(first(x)))."""

    def __init__(self, first: Joint, act: Rowwise, last: Joint) -> None:
        self._first, self._act, self._last = first, act, last

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., d] -> [..., d]."""
        return self._last(self._act(self._first(x)))


class Direct:
    """A module without the way that modules are called: its function, then its hooks."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._function = module, module.forward
        self._hooks = tuple(module._forward_hooks.values())  # noqa: SLF001 - no public name

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._function(x)
        for hook in self._hooks:
            hook(self._module, (x,), y)
        return y


@dataclass(frozen=True, slots=True)
class Heads:
    """Of one attention layer: how many, and their sizes. norms: of the queries' and the keys', by head or on all."""

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    options: AttentionOptions
    norms: tuple[Direct, ...] = ()
    norms_by_head: bool = True

    @property
    def queries(self) -> int:
        """Columns of the projection that are queries'."""
        return self.heads * self.head_dim

    @property
    def keys_end(self) -> int:
        """Where its columns of the keys end and the values' begin."""
        return self.queries + self.kv_heads * self.head_dim

    @property
    def width(self) -> int:
        """All of its columns."""
        return self.keys_end + self.kv_heads * self.value_dim


class Attention:
    """One projection to queries, keys and values; norms; rotary embedding; attention; one projection back."""

    def __init__(self, projection: Joint, output: Joint, heads: Heads, rotary: Rotate | None) -> None:
        self._projection, self._output, self._heads, self._rotary = projection, output, heads, rotary

    def __call__(
        self,
        hidden_states: torch.Tensor,
        *others: object,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **rest: object,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states: [1, T, d] -> the same; position_embeddings: cosines and sines, each [1, T, n]."""
        step = current_step()
        assert step is not None, "a served model runs in a step"
        own = self._heads
        made = self._projection(hidden_states)
        heads, kv_heads = own.heads, own.kv_heads
        query = key = made
        first_key = own.queries
        if own.norms:
            query = self._norm(own.norms[0], made[..., : own.queries])
            key = self._norm(own.norms[1], made[..., own.queries : own.keys_end])
            first_key = 0
        if self._rotary is not None and position_embeddings is not None:
            cos, sin = position_embeddings[0].contiguous(), position_embeddings[1].contiguous()
            if own.norms:
                self._rotary(query, heads, cos, sin)
                self._rotary(key, kv_heads, cos, sin)
            else:
                self._rotary(made, heads + kv_heads, cos, sin)
        attended = step.attend(
            own.layer,
            _by_head(query, 0, heads, own.head_dim),
            _by_head(key, first_key, kv_heads, own.head_dim),
            _by_head(made, own.keys_end, kv_heads, own.value_dim),
            own.options,
        )
        return self._output(attended.reshape(1, made.shape[1], -1)), None

    def _norm(self, norm: Direct, x: torch.Tensor) -> torch.Tensor:
        shape = x.shape
        by_head = x.unflatten(-1, (-1, self._heads.head_dim)) if self._heads.norms_by_head else x  # type: ignore[no-untyped-call]
        normed: torch.Tensor = norm(by_head)
        return normed.reshape(shape).contiguous()


def _by_head(x: torch.Tensor, first: int, heads: int, dim: int) -> torch.Tensor:
    """The heads that begin at a column of x, [1, T, n] and dense, as [heads, T, dim]."""
    _, rows, width = x.shape
    return x.as_strided((heads, rows, dim), (dim, width, 1), x.storage_offset() + first)


@dataclass(frozen=True, slots=True)
class Around:
    """Norms before a layer's attention and its MLP, and after them, two or none; and what scales both."""

    before: tuple[Direct, ...]
    after: tuple[Direct, ...]
    scale: float


class Layer:
    """A decoder layer: what attention gives is added to what comes in, then what the MLP gives."""

    def __init__(self, attention: Attention, mlp: Callable[..., Any], around: Around) -> None:
        self._attention, self._mlp, self._around = attention, mlp, around

    def __call__(
        self,
        hidden_states: torch.Tensor,
        *others: object,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **rest: object,
    ) -> torch.Tensor:
        """hidden_states: [1, T, d] -> the same."""
        before, after = self._around.before, self._around.after
        x = before[0](hidden_states) if before else hidden_states
        made, _ = self._attention(x, position_embeddings=position_embeddings)
        middle = self._added(hidden_states, after[0](made) if after else made)
        x = before[1](middle) if before else middle
        given = self._mlp(x)
        made = given[0] if isinstance(given, tuple) else given
        return self._added(middle, after[1](made) if after else made)

    def _added(self, x: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        if self._around.scale != 1:
            made = made * self._around.scale
        return x + made


class ParallelLayer:
    """A decoder layer whose attention and MLP both read the same norm of what comes in."""

    def __init__(self, attention: Attention, mlp: Callable[..., Any], norm: Direct) -> None:
        self._attention, self._mlp, self._norm = attention, mlp, norm

    def __call__(
        self,
        hidden_states: torch.Tensor,
        *others: object,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **rest: object,
    ) -> torch.Tensor:
        """hidden_states: [1, T, d] -> the same."""
        x = self._norm(hidden_states)
        made, _ = self._attention(x, position_embeddings=position_embeddings)
        total: torch.Tensor = hidden_states + made + self._mlp(x)
        return total
