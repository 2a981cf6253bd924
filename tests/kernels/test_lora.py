"""Every backend against the reference, over distributions of adapters, ranks and dtypes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from weft.kernels.lora import BACKENDS
from weft.kernels.plan import PAGE_ROWS, PagedAdapter, Plan, Weighted, build_plan
from weft.kernels.reference import add_lora as reference
from weft.kernels.site import SiteGroup, lazy_zeros

D_IN, D_OUTS, PAGES = 40, (24, 8, 33), 64
D_OUT = sum(D_OUTS)
RANKS = (1, 4, 8, 12, 16, 33, 64, 128)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
CPU = torch.device("cpu")
FAST = [name for name in BACKENDS if name != "reference"]


def make_group(dtype: torch.dtype, index: int = 0) -> SiteGroup:
    return SiteGroup(index, D_IN, D_OUTS, PAGES, dtype, CPU)


def fill(group: SiteGroup, ranks: Sequence[int], *, fragmented: bool = False) -> list[PagedAdapter]:
    """Adapters of these ranks in consecutive pages, or in every other one; every third leaves out the second site."""
    generator = torch.Generator().manual_seed(1)
    adapters, page = [], 1
    for number, rank in enumerate(ranks):
        count = -(-rank // PAGE_ROWS)
        stride = 2 if fragmented else 1
        runs = [(page + stride * i, page + stride * i + 1) for i in range(count)]
        runs = runs if fragmented else [(page, page + count)]
        page += stride * count
        sites = [site for i, site in enumerate(group.sites) if i != 1 or number % 3 != 1]
        for site in sites:
            a, b = (torch.randn(rank, d, generator=generator) for d in (D_IN, site.b.shape[2]))
            site.write(tuple(runs), a, b)
        touched = frozenset(site.index for site in sites)
        adapters.append(PagedAdapter(tuple(runs), scale=16 / rank, sites=touched))
    return adapters


def distribution(kind: str, adapters: list[PagedAdapter], rows: int) -> list[tuple[int, list[Weighted]]]:
    """Spans of a step's rows: (number of tokens, weighted adapters)."""
    rng = random.Random(4)
    pick = {
        "same": lambda i: [adapters[-1]],
        "distinct": lambda i: [adapters[i % len(adapters)]],
        "uniform": lambda i: [rng.choice(adapters)],
        "skewed": lambda i: [adapters[min(int(rng.expovariate(1)), len(adapters) - 1)]],
        "none": lambda i: [],
        "some base": lambda i: [] if i % 3 == 0 else [adapters[i % len(adapters)]],
        "composed": lambda i: rng.sample(adapters, min(3, len(adapters))),
    }[kind]
    return [(rng.randint(1, 5), [(adapter, rng.uniform(-2, 2)) for adapter in pick(i)]) for i in range(rows)]


def check(backend: str, group: SiteGroup, spans: list[tuple[int, list[Weighted]]], dtype: torch.dtype) -> None:
    num_tokens = sum(count for count, _ in spans)
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(num_tokens, d + 3, generator=generator).to(dtype)[:, :d] for d in (D_IN, D_OUT))
    plan = build_plan(spans, CPU)
    if plan is None:
        assert all(not adapters for _, adapters in spans)
        return
    expected = reference(y.double().clone(), x, group, plan)
    actual = BACKENDS[backend](y.clone(), x, group, plan)
    assert actual.dtype == dtype
    assert (actual.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]
    base = torch.cat([torch.full((count,), not adapters) for count, adapters in spans])
    assert torch.equal(actual[base], y[base]), "base rows must be bit-identical"


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["same", "distinct", "uniform", "skewed", "none", "some base", "composed"])
def test_distributions(backend: str, dtype: torch.dtype, kind: str) -> None:
    group = make_group(dtype)
    check(backend, group, distribution(kind, fill(group, RANKS), rows=17), dtype)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("fragmented", [False, True])
def test_each_rank_alone(backend: str, rank: int, fragmented: bool) -> None:
    group = make_group(torch.float32)
    (adapter,) = fill(group, [rank], fragmented=fragmented)
    check(backend, group, [(1, [(adapter, 1.0)])], torch.float32)
    check(backend, group, [(2, []), (30, [(adapter, 0.5)]), (1, []), (1, [(adapter, 0.5)])], torch.float32)


@pytest.mark.parametrize("backend", FAST)
def test_300_random_plans(backend: str) -> None:
    rng = random.Random(5)
    group = make_group(torch.float32)
    adapters = fill(group, [rng.choice(RANKS[:5]) for _ in range(20)], fragmented=True)
    for _ in range(300):
        mix = lambda: [(adapter, rng.choice([1.0, 0.5, -1.0])) for adapter in rng.sample(adapters, rng.randint(0, 3))]  # noqa: E731
        check(backend, group, [(rng.randint(1, 4), mix()) for _ in range(rng.randint(1, 8))], torch.float32)


@pytest.mark.parametrize("backend", FAST)
def test_a_site_that_the_adapter_does_not_touch_is_left_alone(backend: str) -> None:
    touched, other = make_group(torch.float32, 0), make_group(torch.float32, len(D_OUTS))
    (adapter,) = fill(touched, [8])
    other.b.fill_(float("nan"))
    y = torch.randn(3, D_OUT)
    plan = build_plan([(3, [(adapter, 1.0)])], CPU)
    assert plan is not None
    assert torch.equal(BACKENDS[backend](y.clone(), torch.randn(3, D_IN), other, plan), y)


def test_the_reference_is_the_formula() -> None:
    group = make_group(torch.float64)
    (adapter,) = fill(group, [12])
    x = torch.randn(4, D_IN, dtype=torch.float64)
    plan = build_plan([(4, [(adapter, 0.25)])], CPU)
    assert plan is not None
    parts = [(x @ site.a[1:3].flatten(0, 1).T) @ site.b[1:3].flatten(0, 1) for site in group.sites]
    expected = 16 / 12 * 0.25 * torch.cat(parts, dim=1)
    assert torch.allclose(reference(torch.zeros(4, D_OUT, dtype=torch.float64), x, group, plan), expected)


def test_a_page_written_again_keeps_nothing_of_its_former_owner() -> None:
    group = make_group(torch.float32)
    fill(group, [16])
    site = group.sites[0]
    site.write(((1, 3),), torch.ones(3, D_IN), torch.ones(3, D_OUTS[0]))
    assert site.a[1:3].flatten(0, 1)[3:].abs().sum() == 0
    site.write(((1, 3),), None, None)
    assert site.a[1:3].abs().sum() == 0
    assert site.b[1:3].abs().sum() == 0


def test_a_step_without_adapters_has_no_plan() -> None:
    assert build_plan([(3, []), (1, [])], CPU) is None


def test_rows_that_share_an_adapter_share_a_segment() -> None:
    group = make_group(torch.float32)
    one, two = fill(group, [8, 8])
    plan = build_plan([(2, [(one, 1.0)]), (3, [(two, 1.0)]), (1, [(one, 1.0)])], CPU)
    assert isinstance(plan, Plan)
    assert [s.rows if isinstance(s.rows, slice) else s.rows.tolist() for s in plan.segments] == [[0, 1, 5], slice(2, 5)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_lazy_zeros_are_zeros(dtype: torch.dtype) -> None:
    zeros = lazy_zeros(3, 5, dtype=dtype, device=CPU)
    assert zeros.dtype == dtype
    assert torch.equal(zeros, torch.zeros(3, 5, dtype=dtype))
