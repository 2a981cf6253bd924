"""Which backend a group of sites gets, from what was measured."""

from __future__ import annotations

import torch

from weft.kernels.lora import BACKENDS, Backend, Choosing, Measurement, available, find_backend, has_triton
from weft.kernels.plan import PagedAdapter, Plan, build_plan
from weft.kernels.site import SiteGroup

CPU = torch.device("cpu")


def fake(name: str, log: list[str], dtype: torch.dtype | None = None) -> Backend:
    def add_lora(y: torch.Tensor, x: torch.Tensor, group: SiteGroup, plan: Plan) -> torch.Tensor:
        log.append(name)
        return y

    return Backend(name, add_lora, lambda group, rows: dtype in (None, rows))


def measurement(d_in: int, d_out: int, *, rows: int = 1, dtype: str = "float32", **ms: float) -> Measurement:
    return Measurement("cpu", dtype, rows, 1, 8, d_in, d_out, ms)


def chosen(choosing: Choosing, d_in: int, d_out: int, dtype: torch.dtype = torch.float32) -> str:
    return choosing.choose(SiteGroup(0, d_in, [d_out], 2, dtype, CPU), dtype).name


def test_the_fastest_on_the_most_similar_shape_is_chosen() -> None:
    measured = [measurement(64, 64, one=1.0, two=2.0), measurement(1024, 1024, one=2.0, two=1.0)]
    choosing = Choosing([fake("one", []), fake("two", [])], measured)
    assert chosen(choosing, 64, 64) == "one"
    assert chosen(choosing, 2048, 512) == "two"


def test_it_does_not_depend_on_the_step() -> None:
    """All steps that were measured on the shape count, as ratios."""
    measured = [measurement(64, 64, one=1.0, two=3.0), measurement(64, 64, rows=512, one=200.0, two=100.0)]
    assert chosen(Choosing([fake("two", []), fake("one", [])], measured), 64, 64) == "one"


def test_what_was_not_measured_is_left_to_the_first() -> None:
    choosing = Choosing([fake("one", []), fake("two", [])], [measurement(64, 64, dtype="int8", one=2.0, two=1.0)])
    assert chosen(choosing, 64, 64) == "one"
    assert chosen(Choosing([fake("one", []), fake("two", [])], [measurement(64, 64, one=2.0)]), 64, 64) == "one"


def test_what_does_not_take_the_dtype_is_passed_over() -> None:
    measured = [measurement(64, 64, one=2.0, two=1.0)]
    log: list[str] = []
    choosing = Choosing([fake("one", log), fake("two", log, torch.float32)], measured)
    group = SiteGroup(0, 64, [64], 2, torch.float32, CPU)
    plan = build_plan([(1, [(PagedAdapter(((1, 2),), 1.0, frozenset({0})), 1.0)])], CPU)
    assert plan is not None
    for dtype in (torch.float16, torch.float32, torch.float16):
        choosing(torch.zeros(1, 64, dtype=dtype), torch.zeros(1, 64, dtype=dtype), group, plan)
    assert log == ["one", "two", "one"]


def test_every_name_is_a_backend_even_without_the_library() -> None:
    found = [backend.name for backend in available(None)]
    assert found == ["reference", "torch", *(["triton"] if has_triton() else [])]
    group = SiteGroup(0, 8, [8], 2, torch.float16, CPU)
    group.sites[0].write(((1, 2),), torch.ones(8, 8), torch.ones(8, 8))
    plan = build_plan([(1, [(PagedAdapter(((1, 2),), 1.0, frozenset({0})), 1.0)])], CPU)
    assert plan is not None
    for name in BACKENDS:
        y = find_backend(name, None)(torch.zeros(1, 8).half(), torch.ones(1, 8).half(), group, plan)
        assert torch.equal(y, torch.full((1, 8), 64.0).half())
