"""CheckAdapter and PlanCapacity over real gRPC: dry runs that load nothing, and the sums made of them."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from house import ADAPTER_PAGES, ENDLESS, House, generate, refusal, stream
from safetensors.torch import load_file, save_file

from weft.v1 import adapter_pb2 as pb2

pytestmark = pytest.mark.usefixtures("leaves_nothing_behind")

HIDDEN, FLOAT = 64, 4


def check(house: House, folder: str) -> pb2.AdapterReport:
    request = pb2.CheckAdapterRequest(source=house.source(folder))
    return house.adapters.CheckAdapter(request).report  # type: ignore[no-any-return]


def plan(house: House, *folders: str, **fields: Any) -> pb2.PlanCapacityResponse:
    request = pb2.PlanCapacityRequest(sources=[house.source(folder) for folder in folders], **fields)
    return house.adapters.PlanCapacity(request)  # type: ignore[no-any-return]


@pytest.fixture
def zeroed(house: House) -> str:
    """An adapter whose B is zero."""
    folder = house.root / "adapters" / "zeroed"
    shutil.copytree(house.root / "adapters" / "one", folder, dirs_exist_ok=True)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}, path)
    return folder.name


def test_a_report_says_module_by_module_what_would_be_applied_and_nothing_is_loaded(house: House) -> None:
    before = (house.store.list(), house.store.capacity())
    report = check(house, "three")
    assert (house.store.list(), house.store.capacity()) == before
    assert not report.problems
    layers = [f"model.layers.{i}" for i in range(3)]
    names = [
        f"{layer}.{name}" for layer in layers for name in ("mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj")
    ]
    assert [module.name for module in report.modules] == names
    query = report.modules[1]
    assert query == pb2.ModuleReport(
        name="model.layers.0.self_attn.q_proj",
        kind="linear: LoRA",
        applied=True,
        rank=8,
        scale=2.0,
        dtype="float32",
        num_pages=1,
        num_bytes=8 * (HIDDEN + HIDDEN) * FLOAT,
    )
    created = house.create("mine", "three")
    assert report.source == created.source
    assert (report.digest, report.num_pages) == (created.digest, created.num_pages)
    assert report.device_bytes == created.device_bytes
    assert report.parity_error == created.parity_error


@pytest.mark.parametrize(
    ("folder", "subject", "words"),
    [
        ("empty", "adapter_config.json", ""),
        ("stranger", "model.layers.0.self_attn.q_proj.lora_A", "shape"),
        ("nowhere", "nowhere", "is not a folder"),
        ("huge", "size", f"--adapter-pages {ADAPTER_PAGES + 1} or more"),
        ("zeroed", "adapter_model.safetensors", "changes nothing"),
    ],
)
def test_what_can_not_be_served_is_a_report_with_every_problem(
    house: House, zeroed: str, folder: str, subject: str, words: str
) -> None:
    report = check(house, folder)
    assert (report.digest, report.num_pages, report.device_bytes) == ("", 0, 0)
    assert any(subject in problem.subject and words in problem.description for problem in report.problems)
    refused = refusal(lambda: house.create("mine", folder))
    assert report.problems[0].description in refused.message


def test_every_problem_and_every_module_that_it_keeps_from_being_served_is_told(house: House) -> None:
    report = check(house, "stranger")
    wrong_shapes = [problem.subject for problem in report.problems if "shape" in problem.description]
    without_tensors = [problem.subject for problem in report.problems if "no tensors" in problem.description]
    queries_and_keys = [[f"model.layers.{i}.self_attn.{name}" for name in ("k_proj", "q_proj")] for i in range(3)]
    assert wrong_shapes == [f"{name}.lora_{half}" for name in queries_and_keys[0] for half in "AB"]
    assert sorted(without_tensors) == [*queries_and_keys[1], *queries_and_keys[2]]
    names = [name for layer in queries_and_keys for name in layer]
    assert {module.name: module.applied for module in report.modules} == dict.fromkeys(names, False)


@pytest.mark.parametrize(
    "source", ["", "/no/scheme", "file:/etc", "s3://bucket", "file:", "file:\n", "file:" + "a" * 9999]
)
def test_a_source_that_may_not_be_read_is_an_error(house: House, source: str) -> None:
    calls = {
        "source": lambda: house.adapters.CheckAdapter(pb2.CheckAdapterRequest(source=source)),
        "sources[1]": lambda: house.adapters.PlanCapacity(
            pb2.PlanCapacityRequest(sources=[house.source("one"), source])
        ),
    }
    for path, call in calls.items():
        refused = refusal(call)
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert list(refused.violations) == [path]


def test_checks_beside_requests_change_no_answer(house: House) -> None:
    request = generate(text="hello", adapter_id="one", stopping={"max_tokens": 8, "ignore_eos": True})
    expected = house.inference.Generate(request).tokens
    with ThreadPoolExecutor(8) as pool:
        checks = [pool.submit(check, house, ("two", "three", "stranger")[i % 3]) for i in range(24)]
        answers = [pool.submit(house.inference.Generate, request) for _ in range(24)]
        digests = {done.result().digest for done in checks}
        assert all(done.result().tokens == expected for done in answers)
    assert digests == {house.digest("two"), check(house, "three").digest, ""}


def test_a_plan_adds_up_sources_and_shapes(house: House) -> None:
    answer = plan(
        house, "three", "one", shapes=[{"rank": 12, "count": 3}, {"rank": 8}, {"rank": 64}], ranks=[1, 8, 9, 64]
    )
    needed = 1 + 1 + 3 * 2 + 1 + 8
    assert (answer.pages_needed, answer.pages_total) == (needed, ADAPTER_PAGES)
    assert not answer.fits
    assert [room.count for room in answer.rooms] == [0, 0, 0, 0]
    answer = plan(house, "three", "one", shapes=[{"rank": 12, "count": 3}, {"rank": 8}], ranks=[1, 8, 9, 64])
    assert answer.fits
    room = ADAPTER_PAGES - 9
    assert [(each.rank, each.count) for each in answer.rooms] == [(1, room), (8, room), (9, room // 2), (64, 0)]
    assert [source.digest for source in answer.sources] == [check(house, "three").digest, house.digest("one")]


def test_a_plan_counts_what_is_pinned_and_the_same_content_once(house: House) -> None:
    house.create("mine", "three", pinned=True)
    alone = plan(house, ranks=[8])
    assert (alone.pages_pinned, alone.pages_needed, alone.rooms[0].count) == (1, 0, ADAPTER_PAGES - 1)
    assert alone.pages_free == ADAPTER_PAGES - house.store.num_pages[0]
    again = plan(house, "three", "three", ranks=[8])
    assert (again.pages_needed, again.rooms[0].count) == (1, ADAPTER_PAGES - 1)
    other = plan(house, "one", shapes=[{"rank": 8, "count": ADAPTER_PAGES - 1}])
    assert (other.pages_needed, other.fits) == (ADAPTER_PAGES, False)
    house.update("mine", "pinned")
    assert plan(house, "one", shapes=[{"rank": 8, "count": ADAPTER_PAGES - 1}]).fits


def test_a_plan_that_fits_can_be_loaded_and_pinned(house: House) -> None:
    assert plan(house, "one", "two", "three").fits
    for folder in ("one", "two", "three"):
        assert house.create(f"mine/{folder}", folder, pinned=True).state == pb2.ADAPTER_STATE_DEVICE


def test_a_source_that_can_not_be_served_does_not_fit(house: House) -> None:
    answer = plan(house, "three", "stranger", "huge")
    assert (answer.fits, answer.pages_needed) == (False, 1)
    fine, stranger, huge = answer.sources
    assert not fine.problems
    assert stranger.problems == check(house, "stranger").problems
    assert "--adapter-pages" in huge.problems[0].description


def test_a_plan_says_what_host_memory_and_kv_cache_there_is(house: House) -> None:
    idle = plan(house, "three", shapes=[{"rank": 4, "count": 2}])
    assert idle.host_bytes_total == 1 << 30
    assert 0 < idle.host_bytes_used < idle.host_bytes_total
    page_bytes = house.store.capacity().page_bytes
    assert idle.host_bytes_needed == idle.sources[0].host_bytes + page_bytes
    assert idle.sources[0].host_bytes == house.create("mine", "three").host_bytes
    assert idle.kv_tokens_free == idle.kv_tokens_total > 0
    call = house.inference.StreamGenerate(stream(text="x", stopping={"max_tokens": ENDLESS, "ignore_eos": True}))
    for _ in range(3):
        next(call)
    busy = plan(house)
    assert 0 < busy.kv_tokens_free < busy.kv_tokens_total == idle.kv_tokens_total
    call.cancel()


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"sources": [""]}, "sources[0]"),
        ({"sources": ["file:/x"] * 65}, "sources"),
        ({"shapes": [{"rank": 8}] * 65}, "shapes"),
        ({"shapes": [{"rank": 8}] * 100_000}, "shapes"),
        ({"shapes": [{}]}, "shapes[0].rank"),
        ({"shapes": [{"rank": 8}, {"rank": -1}]}, "shapes[1].rank"),
        ({"shapes": [{"rank": 65537}]}, "shapes[0].rank"),
        ({"shapes": [{"rank": 8, "count": 0}]}, "shapes[0].count"),
        ({"shapes": [{"rank": 8, "count": 100_001}]}, "shapes[0].count"),
        ({"ranks": [8, 0]}, "ranks[1]"),
        ({"ranks": [8] * 65}, "ranks"),
    ],
)
def test_a_bad_plan_is_named(house: House, fields: dict[str, Any], path: str) -> None:
    refused = refusal(lambda: house.adapters.PlanCapacity(pb2.PlanCapacityRequest(**fields)))
    assert list(refused.violations) == [path]


def test_the_largest_plan_is_answered(house: House) -> None:
    answer = plan(house, shapes=[{"rank": 65536, "count": 100_000}] * 64, ranks=range(1, 65))
    assert answer.pages_needed == 64 * 100_000 * 8192
    assert not answer.fits
