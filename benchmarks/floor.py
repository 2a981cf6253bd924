"""What bytes and operations alone would take: the least time of a step with adapters, beside the same with none.

A step takes as long as its slower of two: reading the weights it needs once, or multiplying by them. Both rates are
measured where it runs: the bytes by the best large read or copy, the operations by the best large product.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Rates:
    """Of this machine: bytes a second from memory, floating-point operations a second."""

    bytes_per_s: float
    flops_per_s: float

    def best(self, other: Rates) -> Rates:
        """The faster of each: a machine that others use, too, can do what it did in its quieter moment."""
        return Rates(max(self.bytes_per_s, other.bytes_per_s), max(self.flops_per_s, other.flops_per_s))

    def seconds(self, weights: float, products: float) -> float:
        """To read so many float32 weights once, and to do so many multiply-adds."""
        return max(weights * FLOAT_BYTES / self.bytes_per_s, 2 * products / self.flops_per_s)


@dataclass(frozen=True)
class Sizes:
    """Weights: of the layers, of the head, and of an adapter per rank."""

    layers: int
    head: int
    adapter_per_rank: int

    @classmethod
    def of(cls, modules: Sequence[tuple[int, int]], hidden: int, vocabulary: int) -> Sizes:
        """modules: (d_in, d_out) of every adapted linear module."""
        return cls(sum(a * b for a, b in modules), hidden * vocabulary, sum(a + b for a, b in modules))


def step_s(rates: Rates, sizes: Sizes, tokens: int, rows: int, ranks: Sequence[int], distinct: Sequence[int]) -> float:
    """The least time of a step. rows: that logits are made for; ranks: of each request's adapter, of which each has
    tokens / len(ranks) tokens; distinct: the ranks of the adapters, each once. Without adapters both are empty.
    """
    base_s = rates.seconds(sizes.layers + sizes.head, sizes.layers * tokens + sizes.head * rows)
    if not ranks:
        return base_s
    products = sizes.adapter_per_rank * sum(ranks) * tokens / len(ranks)
    return base_s + rates.seconds(sizes.adapter_per_rank * sum(distinct), products)


@dataclass(frozen=True)
class Ratios:
    """Speed with adapters over that with none, by the floor: of decode steps, and of prompts and answers together."""

    decode: float
    whole: float


def ratios(rates: Rates, sizes: Sizes, adapters: Sequence[int], prompt_tokens: int, new_tokens: int) -> Ratios:
    """adapters: which one each request has; its rank is RANKS' in turn, as `shapes.make_adapters` gives them."""
    from shapes import RANKS  # noqa: PLC0415 - brings peft

    ranks = [RANKS[adapter % len(RANKS)] for adapter in adapters]
    distinct = [RANKS[adapter % len(RANKS)] for adapter in set(adapters)]
    rows = len(adapters)
    none = [step_s(rates, sizes, tokens, rows, (), ()) for tokens in (rows * prompt_tokens, rows)]
    with_all = [step_s(rates, sizes, tokens, rows, ranks, distinct) for tokens in (rows * prompt_tokens, rows)]
    wholes = [prompts + decode * (new_tokens - 1) for prompts, decode in (none, with_all)]
    return Ratios(decode=none[1] / with_all[1], whole=wholes[0] / wholes[1])


def measure_rates() -> Rates:
    data, other = torch.ones(1 << 28), torch.empty(1 << 28)
    read_s = min(_times(data.sum), _times(lambda: other.copy_(data)) / 2)  # a copy reads and writes
    left, right = torch.randn(1024, 2048), torch.randn(2048, 2048)
    packed = torch.ops.mkldnn._reorder_linear_weight(right, 1024)  # noqa: SLF001
    product_s = min(
        _times(lambda: left @ right.T),
        _times(lambda: torch.ops.mkldnn._linear_pointwise(left, packed, None, "none", [], "")),  # noqa: SLF001
    )
    return Rates(data.nbytes / read_s, 2 * 1024 * 2048 * 2048 / product_s)


def _times(work: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of the fastest."""
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)
