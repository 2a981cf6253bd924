"""Attention over a paged cache in C: against the same written out in torch, and the same to the bit in any company."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from natives import builds, each_build

from weft.kernels.attention import DTYPES, PagedAttention, Run
from weft.kernels.native import Native
from weft.server.engine.gathering import attend
from weft.server.engine.step import AttentionOptions

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3}

each_dtype = pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)


@dataclass(frozen=True)
class Layer:
    """What one layer asks for."""

    kv_heads: int = 2
    per_kv_head: int = 3
    d: int = 32
    d_v: int = 32
    scale: float = 0.3
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    causal: bool = True

    @property
    def heads(self) -> int:
        return self.kv_heads * self.per_kv_head

    @property
    def sinks(self) -> torch.Tensor | None:
        return torch.linspace(-1, 2, self.heads) if self.has_sinks else None


@dataclass(eq=False)
class Tokens:
    """A sequence: the queries, keys and values of all its tokens, [heads, length, d]."""

    layer: Layer
    length: int
    dtype: torch.dtype
    seed: int = 0
    query: torch.Tensor = field(init=False)
    key: torch.Tensor = field(init=False)
    value: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        layer = self.layer
        sizes = ((layer.heads, layer.d), (layer.kv_heads, layer.d), (layer.kv_heads, layer.d_v))
        drawn = [torch.randn(heads, self.length, d, generator=generator).to(self.dtype) for heads, d in sizes]
        self.query, self.key, self.value = drawn

    def expected(self) -> torch.Tensor:
        """[length, heads, d_v], in float64."""
        at = torch.arange(self.length)
        seen = at <= at[:, None] if self.layer.causal else torch.ones(self.length, self.length, dtype=torch.bool)
        if self.layer.window is not None:
            seen &= (at > at[:, None] - self.layer.window) & (at < at[:, None] + self.layer.window)
        # soft cap or not, it is written out where there are sinks; these take nothing
        sinks = torch.full((self.layer.heads,), -1e9) if self.layer.sinks is None else self.layer.sinks
        options = AttentionOptions(self.layer.scale, None, self.layer.softcap, sinks.double())
        tensors = (tensor.double()[None] for tensor in (self.query, self.key, self.value))
        return attend(*tensors, seen[None, None], options)[0].transpose(0, 1)


class Cache:
    """Blocks in no order, full of NaN where nothing was written."""

    def __init__(self, layer: Layer, sequences: Sequence[Tokens], block_tokens: int) -> None:
        counts = [-(-tokens.length // block_tokens) for tokens in sequences]
        ids = list(range(sum(counts) + 1))
        random.Random(0).shuffle(ids)
        self.blocks = {
            tokens: [ids.pop() for _ in range(count)] for tokens, count in zip(sequences, counts, strict=True)
        }
        self.block_tokens = block_tokens
        slots, dtype = (sum(counts) + 1) * block_tokens, sequences[0].dtype
        self.keys = torch.full((slots, layer.kv_heads, layer.d), float("nan"), dtype=dtype)
        self.values = torch.full((slots, layer.kv_heads, layer.d_v), float("nan"), dtype=dtype)

    def step(self, layer: Layer, native: Native, parts: Sequence[tuple[Tokens, range]]) -> list[torch.Tensor]:
        """Attend for these positions of these sequences, in one call; what comes before them must be there."""
        runs, slots = [], []
        for tokens, at in parts:
            blocks = self.blocks[tokens]
            runs.append(Run(len(slots), len(at), at.stop, blocks))
            slots += [blocks[i // self.block_tokens] * self.block_tokens + i % self.block_tokens for i in at]
        rows = [
            torch.cat([getattr(tokens, name)[:, at.start : at.stop] for tokens, at in parts], 1)
            for name in ("query", "key", "value")
        ]
        attend_paged = PagedAttention(native, runs, torch.tensor(slots), self.block_tokens)
        out = attend_paged(
            *rows,
            self.keys,
            self.values,
            scale=layer.scale,
            window=layer.window,
            softcap=layer.softcap,
            sinks=layer.sinks,
            causal=layer.causal,
        )
        return list(out.split([len(at) for _, at in parts]))


def whole(layer: Layer, native: Native, tokens: Tokens, block_tokens: int = 16) -> torch.Tensor:
    """All of one sequence at once."""
    return Cache(layer, [tokens], block_tokens).step(layer, native, [(tokens, range(tokens.length))])[0]


LAYERS = {
    "grouped": Layer(),
    "one head each": Layer(kv_heads=3, per_kv_head=1, d=64, d_v=64),
    "one for many": Layer(kv_heads=1, per_kv_head=9, d=80, d_v=80),
    "one for more than an item has rows": Layer(kv_heads=1, per_kv_head=100),
    "odd sizes": Layer(d=13, d_v=7),
    "wide values": Layer(d=8, d_v=72),
    "short window": Layer(window=5),
    "window over tiles": Layer(window=70),
    "window of one": Layer(window=1),
    "soft cap": Layer(softcap=2.0, scale=1.0),
    "sinks": Layer(has_sinks=True),
    "all of it": Layer(window=40, softcap=3.0, has_sinks=True, d=24, d_v=40),
}
BOTH_SIDES = {
    "both sides": Layer(causal=False),
    "short window on both sides": Layer(causal=False, window=5, kv_heads=3, per_kv_head=1, d=13, d_v=7),
    "window over tiles on both sides": Layer(causal=False, window=70, per_kv_head=1),
    "window of one on both sides": Layer(causal=False, window=1),
    "all of it on both sides": Layer(causal=False, window=40, softcap=3.0, has_sinks=True, d=24, d_v=40),
}


def each_of(layers: Mapping[str, Layer]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("layer", layers.values(), ids=layers.keys())


@each_build
@each_dtype
@each_of({**LAYERS, **BOTH_SIDES})
@pytest.mark.parametrize("block_tokens", [1, 16, 64, 100])
def test_it_is_attention(layer: Layer, dtype: torch.dtype, block_tokens: int, native: Native) -> None:
    sequences = [Tokens(layer, length, dtype, seed) for seed, length in enumerate((1, 15, 64, 65, 200))]
    cache = Cache(layer, sequences, block_tokens)
    made = cache.step(layer, native, [(tokens, range(tokens.length)) for tokens in sequences])
    for tokens, rows in zip(sequences, made, strict=True):
        expected = tokens.expected()
        assert rows.dtype == dtype
        assert (rows.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]


@each_build
@each_dtype
@each_of(LAYERS)
def test_a_row_is_the_same_to_the_bit_in_any_chunks_and_company(
    layer: Layer, dtype: torch.dtype, native: Native
) -> None:
    sequences = [Tokens(layer, length, dtype, seed) for seed, length in enumerate((150, 70, 131))]
    one_thread = next(build for build in builds() if build.level == native.level and build.threads == 1)
    alone = [whole(layer, one_thread, tokens) for tokens in sequences]
    rng = random.Random(1)
    cache = Cache(layer, sequences, 16)
    done = dict.fromkeys(sequences, 0)
    made: dict[Tokens, list[torch.Tensor]] = {tokens: [] for tokens in sequences}
    while left := [tokens for tokens in sequences if done[tokens] < tokens.length]:
        picked = rng.sample(left, rng.randint(1, len(left)))
        parts = []
        for tokens in picked:
            count = min(rng.choice([1, 1, 2, 7, 40]), tokens.length - done[tokens])
            parts.append((tokens, range(done[tokens], done[tokens] + count)))
            done[tokens] += count
        for (tokens, _), rows in zip(parts, cache.step(layer, native, parts), strict=True):
            made[tokens].append(rows)
    assert all(torch.equal(torch.cat(made[t]), rows) for t, rows in zip(sequences, alone, strict=True))


@each_build
@each_dtype
@each_of(BOTH_SIDES)
def test_a_row_that_sees_both_sides_is_the_same_to_the_bit_in_any_company(
    layer: Layer, dtype: torch.dtype, native: Native
) -> None:
    sequences = [Tokens(layer, length, dtype, seed) for seed, length in enumerate((150, 1, 70, 131))]
    one_thread = next(build for build in builds() if build.level == native.level and build.threads == 1)
    alone = [whole(layer, one_thread, tokens) for tokens in sequences]
    together = Cache(layer, sequences, 16).step(layer, native, [(t, range(t.length)) for t in sequences])
    assert all(torch.equal(mine, other) for mine, other in zip(alone, together, strict=True))


@each_build
def test_rows_do_not_see_what_is_not_finite_behind_them(native: Native) -> None:
    layer = Layer(d=16, d_v=24)
    clean = Tokens(layer, 90, torch.float32)
    expected = whole(layer, native, clean)
    for position, bad in ((40, float("nan")), (70, float("inf"))):
        tokens = Tokens(layer, 90, torch.float32)
        tokens.key[:, position] = bad
        tokens.value[:, position] = bad
        made = whole(layer, native, tokens)
        assert torch.equal(made[:position], expected[:position])
        assert made[position:].isnan().all(), "those that do see it say so"


@each_build
def test_scores_too_large_or_too_small_for_exp_are_weighed_as_torch_does(native: Native) -> None:
    layer = Layer(kv_heads=1, per_kv_head=1, d=1, d_v=1, scale=1.0)
    tokens = Tokens(layer, 4, torch.float32)
    tokens.query[:] = 1.0
    tokens.key[0, :, 0] = torch.tensor([300.0, -300.0, 300.0, 1e30])
    tokens.value[0, :, 0] = torch.tensor([1.0, 7.0, 3.0, 5.0])
    assert whole(layer, native, tokens).flatten().tolist() == [1.0, 1.0, 2.0, 5.0]


@each_build
def test_rows_may_lie_with_any_strides(native: Native) -> None:
    layer = Layer()
    tokens = Tokens(layer, 50, torch.float32)
    expected = whole(layer, native, tokens)
    for name in ("query", "key", "value"):
        tensor = getattr(tokens, name)
        setattr(tokens, name, tensor.permute(2, 1, 0).contiguous().permute(2, 1, 0))
    assert torch.equal(whole(layer, native, tokens), expected)


@each_build
def test_keys_and_values_are_in_the_cache_afterwards(native: Native) -> None:
    layer = Layer(d=16, d_v=24)
    tokens = Tokens(layer, 20, torch.float32)
    cache = Cache(layer, [tokens], 16)
    cache.step(layer, native, [(tokens, range(20))])
    slots = torch.cat([torch.arange(block * 16, block * 16 + 16) for block in cache.blocks[tokens]])
    assert torch.equal(cache.keys[slots[:20]], tokens.key.transpose(0, 1))
    assert torch.equal(cache.values[slots[:20]], tokens.value.transpose(0, 1))
    assert cache.keys[slots[20:]].isnan().all()


@each_build
@pytest.mark.parametrize("odd", ["query", "key", "value"])
def test_rows_of_another_dtype_than_the_caches_are_refused(native: Native, odd: str) -> None:
    tokens = Tokens(Layer(), 20, torch.bfloat16)
    setattr(tokens, odd, getattr(tokens, odd).float())
    with pytest.raises(ValueError, match="is not for a cache"):
        Cache(tokens.layer, [tokens], 16).step(tokens.layer, native, [(tokens, range(20))])
