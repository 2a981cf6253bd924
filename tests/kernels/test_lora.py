"""Every backend against the reference, over distributions of adapters, ranks and dtypes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from natives import builds

from weft.kernels.lora import AddLora
from weft.kernels.lora_native import CHUNK_ROWS, NativeLora
from weft.kernels.plan import PAGE_ROWS, PagedAdapter, Plan, Plans, Weighted, build_plan
from weft.kernels.reference import add_lora as reference
from weft.kernels.segments import add_lora as segments
from weft.kernels.site import SiteGroup, lazy_zeros, to_int8

D_IN, D_OUTS, PAGES = 40, (24, 8, 33), 64
D_OUT = sum(D_OUTS)
RANKS = (1, 4, 8, 12, 16, 33, 64, 128)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
CPU = torch.device("cpu")
LEVELS = ("baseline", "v3", "v4")
KINDS = ("same", "distinct", "uniform", "skewed", "none", "some base", "composed")
NATIVE = {f"cpu {build.level} {build.threads}": NativeLora(build) for build in builds()}
FAST: dict[str, AddLora] = {"torch": segments, **NATIVE}
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
DTYPES = {"torch": TOLERANCE, **dict.fromkeys(NATIVE, NATIVE_DTYPES)}


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
        adapters.append(PagedAdapter(tuple(runs), scale=16 / rank, sites=touched, rank=rank))
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


def check(backend: AddLora, group: SiteGroup, spans: list[tuple[int, list[Weighted]]], dtype: torch.dtype) -> None:
    num_tokens = sum(count for count, _ in spans)
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(num_tokens, d + 3, generator=generator).to(dtype)[:, :d] for d in (D_IN, D_OUT))
    plan = build_plan(spans, CPU)
    if plan is None:
        assert all(not adapters for _, adapters in spans)
        return
    expected = reference(y.double().clone(), x, group, plan)
    padded = torch.nn.functional.pad(y, (2, 5))
    actual = backend(padded[:, 2 : 2 + D_OUT], x, group, plan)
    assert torch.equal(padded[:, [0, 1, *range(2 + D_OUT, 7 + D_OUT)]], torch.zeros(num_tokens, 7, dtype=dtype))
    assert actual.dtype == dtype
    assert (actual.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]
    base = torch.cat([torch.full((count,), not adapters) for count, adapters in spans])
    assert torch.equal(actual[base], y[base]), "base rows must be bit-identical"


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(name, dtype) for name, dtypes in DTYPES.items() for dtype in dtypes],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_distributions(backend: str, dtype: torch.dtype, kind: str) -> None:
    group = make_group(dtype)
    check(FAST[backend], group, distribution(kind, fill(group, RANKS), rows=17), dtype)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_distributions_on_int8_pages(backend: str, dtype: torch.dtype, kind: str) -> None:
    group = make_group(torch.int8)
    check(FAST[backend], group, distribution(kind, fill(group, RANKS), rows=17), dtype)


@pytest.mark.parametrize("base_rows", [(), (1,)], ids=str)
def test_steps_of_int8_rows_stay_within_float16(base_rows: tuple[int, ...]) -> None:
    """A x is 101,600 steps here, and 800; B is so small that its scale is no ordinary number of float16."""
    group = make_group(torch.int8)
    for site in group.sites:
        site.write(((1, 2),), torch.ones(8, D_IN), torch.full((8, site.b.shape[2]), 1e-3))
    adapter = PagedAdapter(((1, 2),), 1.0, frozenset(site.index for site in group.sites))
    plan = build_plan([(1, [] if row in base_rows else [(adapter, 1.0)]) for row in range(3)], CPU)
    x, y = torch.full((3, D_IN), 20.0, dtype=torch.float16), torch.zeros(3, D_OUT, dtype=torch.float16)
    assert plan is not None
    expected = reference(y.double(), x, group, plan)
    torch.testing.assert_close(segments(y, x, group, plan).double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("fragmented", [False, True])
def test_each_rank_alone(backend: str, rank: int, fragmented: bool) -> None:
    group = make_group(torch.float32)
    (adapter,) = fill(group, [rank], fragmented=fragmented)
    add_lora = FAST[backend]
    check(add_lora, group, [(1, [(adapter, 1.0)])], torch.float32)
    check(add_lora, group, [(2, []), (30, [(adapter, 0.5)]), (1, []), (1, [(adapter, 0.5)])], torch.float32)


@pytest.mark.parametrize("backend", FAST)
def test_300_random_plans(backend: str) -> None:
    rng = random.Random(5)
    group = make_group(torch.float32)
    add_lora = FAST[backend]
    adapters = fill(group, [rng.choice(RANKS[:5]) for _ in range(20)], fragmented=True)
    for _ in range(300):
        mix = lambda: [(adapter, rng.choice([1.0, 0.5, -1.0])) for adapter in rng.sample(adapters, rng.randint(0, 3))]  # noqa: E731
        check(add_lora, group, [(rng.randint(1, 4), mix()) for _ in range(rng.randint(1, 8))], torch.float32)


@pytest.mark.parametrize("backend", FAST)
def test_a_site_that_the_adapter_does_not_touch_is_left_alone(backend: str) -> None:
    touched, other = make_group(torch.float32, 0), make_group(torch.float32, len(D_OUTS))
    (adapter,) = fill(touched, [8])
    other.b.fill_(float("nan"))
    y = torch.randn(3, D_OUT)
    plan = build_plan([(3, [(adapter, 1.0)])], CPU)
    assert plan is not None
    assert torch.equal(FAST[backend](y.clone(), torch.randn(3, D_IN), other, plan), y)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", [*NATIVE_DTYPES, torch.int8], ids=str)
def test_a_row_comes_out_the_same_whatever_the_others_and_the_threads_are(backend: str, dtype: torch.dtype) -> None:
    """Bit by bit: alone, among others of its adapter, and of other adapters; wide enough for several blocks."""
    add_lora, alone = NATIVE[backend], NATIVE[backend.rpartition(" ")[0] + " 1"]
    group = SiteGroup(0, 600, (1300, 33), PAGES, dtype, CPU)
    one, two, three = (
        PagedAdapter(adapter.runs, adapter.scale, frozenset({0, 1}), rank=adapter.rank)
        for adapter in fill_any(group, (12, 16, 5))
    )
    mixes: list[list[Weighted]] = [
        [(one, 1.0)],
        [(two, 0.5), (one, -1.0)],
        [(three, 2.0)],
        [],
        [(one, -1.0), (two, 0.5)],
    ]
    rng = random.Random(6)
    rows = [rng.choice(mixes) for _ in range(2 * CHUNK_ROWS + 90)]
    kind = torch.float32 if dtype == torch.int8 else dtype
    x, y = (torch.randn(len(rows), d).to(kind) for d in (group.d_in, group.d_out))
    plan = build_plan([(1, mix) for mix in rows], CPU)
    assert plan is not None
    together = add_lora(y.clone(), x, group, plan)
    for t in {rows.index(mix) for mix in mixes} | {7, 50, len(rows) - 1}:
        own = build_plan([(1, rows[t])], CPU)
        expected = y[t : t + 1] if own is None else alone(y[t : t + 1].clone(), x[t : t + 1], group, own)
        assert torch.equal(together[t : t + 1], expected)


def fill_any(group: SiteGroup, ranks: Sequence[int]) -> list[PagedAdapter]:
    """Adapters of these ranks, with rows at all of the group's sites."""
    adapters, page = [], 1
    for rank in ranks:
        runs = ((page, page + -(-rank // PAGE_ROWS)),)
        for site in group.sites:
            site.write(runs, torch.randn(rank, group.d_in), torch.randn(rank, site.b.shape[2]))
        adapters.append(PagedAdapter(runs, 16 / rank, frozenset(site.index for site in group.sites), rank=rank))
        page = runs[0][1]
    return adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bits_are_the_nearest_steps_of_each_row(dtype: torch.dtype) -> None:
    rows = torch.cat([torch.randn(5, 70) * 10.0 ** torch.arange(-4, 1)[:, None], torch.zeros(1, 70)]).to(dtype)
    steps, scale = to_int8(rows)
    assert steps.dtype == torch.int8
    assert steps[:5].abs().amax(dim=1).tolist() == [127] * 5
    off = (steps * scale[:, None] - rows.float()).abs()
    assert (off <= scale[:, None] * 0.5001).all()
    assert torch.equal(off[5], torch.zeros(70))


@pytest.mark.parametrize("backend", NATIVE)
def test_rank_rows_that_are_not_the_adapters_own_are_not_read(backend: str) -> None:
    """The second half of a page that is half empty."""
    group = make_group(torch.float32)
    (adapter,) = fill(group, [12])
    plan = build_plan([(1, [(adapter, 1.0)]), (5, [(adapter, -1.0)])], CPU)
    assert plan is not None
    x, y, add_lora = torch.randn(6, D_IN), torch.randn(6, D_OUT), FAST[backend]
    before = add_lora(y.clone(), x, group, plan)
    group.a[:, 2, 4:] = float("nan")
    assert torch.equal(add_lora(y.clone(), x, group, plan), before)


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


def test_a_step_laid_out_like_the_last_has_its_plan() -> None:
    one, two = (PagedAdapter(((page, page + 1),), 1.0, frozenset([0])) for page in (1, 2))
    plans = Plans()
    spans = lambda adapter: iter([(1, [(adapter, 1.0)]), (2, [])])  # noqa: E731
    first = plans(spans(one), CPU)
    assert plans(spans(one), CPU) is first
    other = plans(spans(two), CPU)
    assert other is not None
    assert other is not first
    assert other.mixes == [(range(1), ((two, 1.0),))]
    assert plans([(3, [])], CPU) is None


def test_rows_that_share_an_adapter_share_a_segment() -> None:
    group = make_group(torch.float32)
    one, two = fill(group, [8, 8])
    plan = build_plan([(2, [(one, 1.0)]), (3, [(two, 1.0)]), (1, [(one, 1.0)])], CPU)
    assert isinstance(plan, Plan)
    assert [s.rows if isinstance(s.rows, slice) else s.rows.tolist() for s in plan.segments] == [[0, 1, 5], slice(2, 5)]


def test_a_row_takes_its_adapters_in_the_order_of_its_own_mix() -> None:
    one, two, three = (PagedAdapter(((page, page + 1),), 1.0, frozenset([0])) for page in (1, 2, 3))
    rows = [[two], [one, two, three], [three, two], [one]]
    plan = build_plan([(1, [(adapter, 1.0) for adapter in adapters]) for adapters in rows], CPU)
    assert plan is not None
    for row, adapters in enumerate(rows):
        mine = [s.first for s in plan.segments if row in torch.arange(len(rows))[s.rows]]
        assert mine == [adapter.runs[0][0] for adapter in adapters]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_lazy_zeros_are_zeros(dtype: torch.dtype) -> None:
    zeros = lazy_zeros(3, 5, dtype=dtype, device=CPU)
    assert zeros.dtype == dtype
    assert torch.equal(zeros, torch.zeros(3, 5, dtype=dtype))
