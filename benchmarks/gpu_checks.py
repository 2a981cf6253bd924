"""Every GPU kernel against its specification, on the device it will run on: `benchmarks/gpu.py` begins with this."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch

from weft.kernels import reference, triton_lora
from weft.kernels.plan import PAGE_ROWS, PagedAdapter, Span, build_plan
from weft.kernels.site import SiteGroup
from weft.kernels.triton_attention import attend_paged
from weft.server.engine.gathering import attend
from weft.server.engine.step import AttentionOptions

KINDS = ("same", "distinct", "uniform", "skewed", "some base", "composed", "one token")
RANKS = (1, 4, 8, 12, 16, 33, 64, 128)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SHAPES = ((512, (96, 32, 32)), (600, (48, 33)), (1056, (40,)))
_CPU = torch.device("cpu")

Check = dict[str, object]


def check_all(device: torch.device, *, thorough: bool) -> list[Check]:
    """One entry a case: what, its relative error, whether it repeats bit for bit, whether all is right."""
    return [*_check_lora(device, thorough=thorough), *_check_attention(device, thorough=thorough)]


def _check_lora(device: torch.device, *, thorough: bool) -> Iterator[Check]:
    ranks = RANKS if thorough else (4, 12, 33)
    for dtype, tolerance in TOLERANCE.items():
        for d_in, d_outs in SHAPES if thorough else ((40, (16, 24)),):
            on_host = SiteGroup(0, d_in, d_outs, 1 + 2 * sum(-(-rank // PAGE_ROWS) for rank in ranks), dtype, _CPU)
            adapters = _fill(on_host, ranks)
            group = SiteGroup(0, d_in, d_outs, on_host.a.shape[1], dtype, device)
            group.a.copy_(on_host.a)
            group.b.copy_(on_host.b)
            for kind in KINDS if thorough else KINDS[-2:]:
                spans = _spans(kind, adapters, 24 if thorough else 3)
                yield _compare(f"LoRA {_name(dtype)} {d_in}x{sum(d_outs)} {kind}", spans, on_host, group, tolerance)


def _compare(name: str, spans: Sequence[Span], on_host: SiteGroup, group: SiteGroup, tolerance: float) -> Check:
    num_tokens = sum(count for count, _ in spans)
    generator = torch.Generator().manual_seed(2)
    dtype, device = group.a.dtype, group.a.device
    x, y = (torch.randn(num_tokens, d, generator=generator).to(dtype) for d in (group.d_in, group.d_out))
    plan = build_plan(spans, _CPU)
    assert plan is not None
    expected = reference.add_lora(y.double(), x, on_host, plan)
    made, again = (triton_lora.add_lora(y.clone().to(device), x.to(device), group, plan).cpu() for _ in range(2))
    error = float((made.double() - expected).norm() / (expected - y.double()).norm())
    base = torch.cat([torch.full((count,), not adapters) for count, adapters in spans])
    is_same = torch.equal(made, again)
    right = error < tolerance and is_same and torch.equal(made[base], y[base])
    return {"what": name, "error": error, "repeats": is_same, "right": right}


def _fill(group: SiteGroup, ranks: Sequence[int]) -> list[PagedAdapter]:
    """Adapters of these ranks, each in every other page; the last leaves the group's last site alone."""
    generator = torch.Generator().manual_seed(1)
    adapters, page = [], 1
    sites = [site.index for site in group.sites]
    for rank in ranks:
        count = -(-rank // PAGE_ROWS)
        runs = tuple((page + 2 * i, page + 2 * i + 1) for i in range(count))
        page += 2 * count
        mine = sites[:-1] if rank == ranks[-1] and len(sites) > 1 else sites
        for site in group.sites:
            a, b = (torch.randn(rank, d, generator=generator) for d in (site.a.shape[2], site.b.shape[2]))
            site.write(runs, a, b if site.index in mine else b * float("nan"))
        adapters.append(PagedAdapter(runs, 16 / rank, frozenset(mine)))
    return adapters


def _spans(kind: str, adapters: list[PagedAdapter], rows: int) -> list[Span]:
    rng = random.Random(4)
    if kind == "one token":
        return [(1, [(adapters[-1], 1.0)])]
    pick = {
        "same": lambda i: [adapters[-1]],
        "distinct": lambda i: [adapters[i % len(adapters)]],
        "uniform": lambda i: [rng.choice(adapters)],
        "skewed": lambda i: [adapters[min(int(rng.expovariate(1)), len(adapters) - 1)]],
        "some base": lambda i: [] if i % 3 == 0 else [adapters[i % len(adapters)]],
        "composed": lambda i: rng.sample(adapters, min(3, len(adapters))),
    }[kind]
    return [(rng.randint(1, 3), [(adapter, rng.uniform(-2, 2)) for adapter in pick(i)]) for i in range(rows)]


def _check_attention(device: torch.device, *, thorough: bool) -> Iterator[Check]:
    sinks = torch.linspace(-1, 2, 8)
    options: list[dict[str, object]] = [{}, {"window": 37}, {"softcap": 5.0}, {"sinks": sinks.to(device)}]
    dims = (64, 80, 128, 256) if thorough else (16,)
    contexts = [1, 0, 17, 300, 2000] if thorough else [1, 0, 40]
    for dtype, tolerance in TOLERANCE.items():
        for dim in dims:
            for option in options if thorough else options[:1]:
                made, again, error = _attend(contexts, dim, dtype, device, option)
                is_same = torch.equal(made, again)
                what = f"attention {_name(dtype)} {dim} {' '.join(option)}".strip()
                right = error < tolerance and is_same and not bool(made[1].any())
                yield {"what": what, "error": error, "repeats": is_same, "right": right}


def _attend(
    contexts: list[int], dim: int, dtype: torch.dtype, device: torch.device, options: dict[str, object]
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The kernel's answer twice, and its largest relative error against PyTorch's over each row's own context."""
    generator = torch.Generator().manual_seed(3)
    heads, kv_heads, block_tokens, width = 8, 2, 16, -(-max(contexts) // 16)
    blocks = len(contexts) * width
    query = torch.randn(len(contexts), heads, dim, generator=generator).to(device, dtype).transpose(0, 1)
    keys, values = (
        torch.randn(blocks * block_tokens, kv_heads, dim, generator=generator).to(device, dtype) for _ in range(2)
    )
    tables = torch.randperm(blocks, generator=generator).view(width, -1)
    lengths = torch.tensor(contexts, dtype=torch.int32, device=device)
    made, again = (
        attend_paged(query, keys, values, tables.int().to(device), lengths, block_tokens, scaling=dim**-0.5, **options)  # type: ignore[arg-type]
        for _ in range(2)
    )
    plain = AttentionOptions(dim**-0.5, None, options.get("softcap"), options.get("sinks"))  # type: ignore[arg-type]
    errors = []
    for row, context in enumerate(contexts):
        if not context:
            continue
        slots = (tables[:, row][:, None] * block_tokens + torch.arange(block_tokens)).flatten()[:context]
        seen = slots[-int(options.get("window", context)) :].to(device)  # type: ignore[call-overload]
        key, value = (cache[seen].float().transpose(0, 1)[None] for cache in (keys, values))
        expected = attend(query[:, row].float()[None, :, None], key, value, None, plain)[0, :, 0]
        errors.append(float((made[row].float() - expected).norm() / expected.norm()))
    return made, again, max(errors)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
