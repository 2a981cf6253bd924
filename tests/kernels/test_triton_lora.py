"""The Triton backend against the reference: on a GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from weft.kernels import reference
from weft.kernels.plan import PAGE_ROWS, PagedAdapter, Span, Weighted, build_plan
from weft.kernels.site import SiteGroup

pytest.importorskip("triton")
from weft.kernels import triton_lora
from weft.kernels.work_list import Room, make_work_list

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
PAGES = 64
RANKS = (1, 4, 8, 12, 16, 33, 64, 128)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Groups:
    """The same pages on the host, for the reference, and on the device. Untouched sites hold NaN."""

    def __init__(
        self, dtype: torch.dtype, ranks: Sequence[int], d_in: int = 24, d_outs: tuple[int, ...] = (16,)
    ) -> None:
        self.host = SiteGroup(30, d_in, d_outs, PAGES, dtype, CPU)
        self.device = SiteGroup(30, d_in, d_outs, PAGES, dtype, DEVICE)
        self.adapters: list[PagedAdapter] = []
        generator = torch.Generator().manual_seed(1)
        page = 1
        for rank in ranks:
            runs = tuple((page + 2 * i, page + 2 * i + 1) for i in range(-(-rank // PAGE_ROWS)))
            page = (runs[-1][1] + 1) % (PAGES - 34) + 1 if rank < 128 else page
            sites = self.host.sites[: -1 if len(d_outs) > 1 and len(self.adapters) % 2 else None]
            for site in self.host.sites:
                a, b = (torch.randn(rank, d, generator=generator) for d in (d_in, site.b.shape[2]))
                site.write(runs, a, b if site in sites else b * float("nan"))
            self.adapters.append(PagedAdapter(runs, 16 / rank, frozenset(site.index for site in sites)))
        self.device.a.copy_(self.host.a)
        self.device.b.copy_(self.host.b)
        for mine, theirs in ((self.device.a_scale, self.host.a_scale), (self.device.b_scale, self.host.b_scale)):
            if mine is not None and theirs is not None:
                mine.copy_(theirs)

    def check(self, spans: Sequence[Span], dtype: torch.dtype | None = None) -> torch.Tensor | None:
        """Raises AssertionError unless the backend does as the reference; dtype: of the rows, else the pages'."""
        plan = build_plan(spans, CPU)
        if plan is None:
            return None
        generator = torch.Generator().manual_seed(2)
        dtype, num_tokens = dtype or self.host.a.dtype, plan.num_tokens
        # Rows lie apart, as they do where they are a part of something wider.
        widths = (self.host.d_in, self.host.d_out)
        x, y = (torch.randn(128, d + 8, generator=generator).to(dtype)[:num_tokens, :d] for d in widths)
        expected = reference.add_lora(y.double(), x, self.host, plan)
        made = triton_lora.add_lora(y.clone().to(DEVICE), x.to(DEVICE), self.device, plan).cpu()
        assert made.dtype == dtype
        assert (made.double() - expected).norm() / (expected - y.double()).norm() < TOLERANCE[dtype]
        base = torch.cat([torch.full((count,), not adapters) for count, adapters in spans])
        assert torch.equal(made[base], y[base]), "base rows must be bit-identical"
        return made


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["same", "distinct", "uniform", "skewed", "some base", "composed", "one token"])
def test_distributions(dtype: torch.dtype, kind: str) -> None:
    groups = Groups(dtype, (4, 12, 16, 33), d_in=72, d_outs=(40, 16))
    rng = random.Random(4)
    adapters = groups.adapters
    picks: dict[str, list[list[PagedAdapter]]] = {
        "same": [[adapters[3]]] * 4,
        "distinct": [[adapter] for adapter in adapters],
        "uniform": [[rng.choice(adapters)] for _ in range(4)],
        "skewed": [[adapters[min(int(rng.expovariate(1)), 3)]] for _ in range(4)],
        "some base": [[], [adapters[0]], [], [adapters[1]], []],
        "composed": [rng.sample(adapters, 3), rng.sample(adapters, 2)],
        "one token": [[adapters[0]]],
    }
    rows = 1 if kind == "one token" else 9
    groups.check([(rng.randint(1, rows), [(each, rng.uniform(-2, 2)) for each in mix]) for mix in picks[kind]])


@pytest.mark.parametrize("rank", RANKS)
def test_each_rank_alone(rank: int) -> None:
    groups = Groups(torch.float32, [rank])
    (adapter,) = groups.adapters
    groups.check([(1, [(adapter, 1.0)])])
    groups.check([(2, []), (20, [(adapter, 0.5)]), (1, []), (1, [(adapter, 0.25)])])


@pytest.mark.parametrize(("d_in", "d_outs"), [(600, (48, 33)), (1056, (7,)), (16, (130, 2))])
def test_shapes_that_no_block_divides(d_in: int, d_outs: tuple[int, ...]) -> None:
    groups = Groups(torch.bfloat16, [12, 4], d_in, d_outs)
    groups.check([(1, [(adapter, 1.0)]) for adapter in groups.adapters])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_of_8_bits(dtype: torch.dtype) -> None:
    groups = Groups(torch.int8, (4, 12, 33), d_in=72, d_outs=(40, 16))
    one, two, three = groups.adapters
    groups.check([(1, [(one, 1.0)]), (2, [(two, -1.5)]), (1, []), (1, [(three, 1.0), (two, 0.5)])], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_300_random_plans(dtype: torch.dtype) -> None:
    rng = random.Random(5)
    groups = Groups(dtype, [rng.choice(RANKS[:5]) for _ in range(12)])
    for _ in range(300):

        def mix() -> list[Weighted]:
            chosen = rng.sample(groups.adapters, rng.choice([0, 1, 1, 1, 2]))
            return [(adapter, rng.choice([1.0, 0.5, -1.0])) for adapter in chosen]

        groups.check([(rng.randint(1, 4), mix()) for _ in range(rng.randint(1, 2))])


def test_a_row_does_not_depend_on_rows_with_other_adapters() -> None:
    """Bit for bit: alone, beside others, and again; and nearly so where rows share its adapters."""
    groups = Groups(torch.float32, [33, 8, 12], d_in=600)
    first, second, third = groups.adapters
    mine: Span = (1, [(first, 1.5), (second, -1.0)])
    alone = groups.check([mine])
    again = groups.check([mine])
    together = groups.check([mine, (3, [(third, 1.0)]), (2, []), (1, [(first, 1.0)])])
    shared = groups.check([(2, mine[1]), (3, [(third, 1.0)])])
    assert alone is not None
    assert again is not None
    assert together is not None
    assert shared is not None
    assert torch.equal(alone, again)
    assert torch.equal(alone[0], together[0])
    assert (alone[0] - shared[0]).norm() < 1e-5 * alone[0].norm()


def test_one_work_list_in_its_place_serves_any_plan() -> None:
    """As a captured step has it: the grid and every argument stay, and what they point at changes."""
    groups = Groups(torch.float32, [4, 12])
    work = triton_lora.DeviceWork(Room(entries=8, tiles=4, sites=64), DEVICE)
    x, y = torch.randn(3, 24), torch.randn(3, 16)
    for spans in ([(3, [(groups.adapters[0], 1.0)])], [(1, [(groups.adapters[1], 2.0)]), (2, [])]):
        plan = build_plan(spans, CPU)
        assert plan is not None
        work.load(make_work_list(plan))
        made = triton_lora.add_lora(y.clone().to(DEVICE), x.to(DEVICE), groups.device, work.plan(3)).cpu()
        assert torch.allclose(made, reference.add_lora(y.clone(), x, groups.host, plan), atol=1e-4)
