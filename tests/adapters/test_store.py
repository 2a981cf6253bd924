"""The registry: names, versions, pins, and what happens between them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bases import linear_base
from safetensors.torch import load_file, save_file
from shelf import SlowSources
from tiny import make_adapter, make_model

import weft.adapters.store as store_module
from weft.adapters.pages import PageConfig, PagePool
from weft.adapters.records import AdapterChange, AdapterInfo, AdapterState, NewAdapter
from weft.adapters.sources import Sources
from weft.adapters.store import AdapterStore
from weft.errors import (
    AdapterExists,
    AdapterNotFound,
    InvalidAdapter,
    InvalidRequest,
    PermissionDenied,
    Unavailable,
)

SHAPES = {
    f"model.layers.{i}.self_attn.{name}": (64, d) for i in range(3) for name, d in (("q_proj", 64), ("v_proj", 32))
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    model = make_model("llama", root / "base")
    for seed, rank in enumerate((4, 8, 16)):
        make_adapter(model, root / "adapters" / f"r{rank}", seed=seed, r=rank, target_modules=["q_proj", "v_proj"])
    (root / "adapters" / "broken").mkdir()
    (root / "outside").mkdir()
    return root / "adapters"


@pytest.fixture
def store(folders: Path) -> AdapterStore:
    pool = PagePool(linear_base(SHAPES), PageConfig(5, torch.float32, torch.device("cpu")))
    return AdapterStore(pool, Sources([folders]), now=lambda: 1000.0)


class Others:
    """Another thread that takes the store's lock."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        self.num_times = 0

    def get_in(self) -> None:
        thread = threading.Thread(target=self._store.capacity, daemon=True)
        thread.start()
        thread.join(timeout=10)
        assert not thread.is_alive(), "the lock was held"
        self.num_times += 1

    def want(self, info: AdapterInfo) -> bool:
        self.get_in()
        return True


def new(folders: Path, name: str, folder: str | None = None) -> NewAdapter:
    return NewAdapter(name, f"file:{folders / (folder or name)}")


def test_a_created_adapter_can_be_seen_and_used(store: AdapterStore, folders: Path) -> None:
    info = store.create(new(folders, "r16"))
    assert (info.state, info.ranks, info.num_in_flight) == (AdapterState.DEVICE, (16,), 0)
    assert info.modules == tuple(sorted(SHAPES))
    ref = store.acquire("r16")
    assert store.get("r16").num_in_flight == 1
    assert store.get("r16").last_used_s == 1000.0
    store.release(ref)
    assert store.num_pages == (2, 4)
    store.check()


def test_a_deleted_adapter_stays_until_its_last_request_ends(store: AdapterStore, folders: Path) -> None:
    store.create(new(folders, "r16"))
    ref = store.acquire("r16")
    store.delete("r16")
    with pytest.raises(AdapterNotFound):
        store.acquire("r16")
    assert store.num_pages[0] == 2
    store.check()
    store.release(ref)
    assert store.num_pages[0] == 0
    store.check()


def test_the_name_can_be_taken_again_while_the_old_version_is_in_use(store: AdapterStore, folders: Path) -> None:
    store.create(new(folders, "x", "r8"))
    old = store.acquire("x")
    store.delete("x")
    store.create(new(folders, "x", "r4"))
    fresh = store.acquire("x")
    assert old.version.digest != fresh.version.digest
    assert set(old.version.paged.runs).isdisjoint(fresh.version.paged.runs)
    store.release(old)
    store.release(fresh)
    store.check()


def test_two_names_of_one_content_share_its_pages(store: AdapterStore, folders: Path) -> None:
    store.create(new(folders, "one", "r16"))
    store.create(new(folders, "two", "r16"))
    assert store.num_pages[0] == 2
    store.delete("one")
    assert store.acquire("two").version.paged.runs
    store.check()


def test_a_digest_pins_a_version(store: AdapterStore, folders: Path) -> None:
    digest = store.create(new(folders, "r8")).digest
    store.release(store.acquire(f"r8@{digest}"))
    for wrong in (f"r8@sha256:{'0' * 64}", "r8@sha256:12", "r8@", f"other@{digest}"):
        with pytest.raises(AdapterNotFound):
            store.acquire(wrong)
    store.check()


def test_an_unknown_name_is_refused_with_the_nearest(store: AdapterStore, folders: Path) -> None:
    store.create(new(folders, "sentiment", "r4"))
    with pytest.raises(AdapterNotFound, match="did you mean 'sentiment'"):
        store.acquire("sentimant")


def test_what_is_slow_leaves_the_lock_to_others(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's round waits for it: others get in while names are compared, and between the parts of a long list."""
    names = [f"tenant-{i:03d}" for i in range(200)]
    for name in names:
        store.reserve(NewAdapter(name, "file:/x"), restored=True)
    others = Others(store)

    def compare(name: str, names: list[str]) -> str:
        others.get_in()
        return ""

    monkeypatch.setattr(store_module, "what_was_meant", compare)
    for ask in (store.get, store.delete, store.acquire, lambda name: store.update(name, AdapterChange(pinned=True))):
        with pytest.raises(AdapterNotFound):
            ask("tenant")
    assert others.num_times == 4
    assert [info.name for info in store.list(wanted=others.want)] == names
    assert others.num_times == 204


def test_a_list_begins_and_ends_where_it_is_told_to(store: AdapterStore) -> None:
    names = [f"tenant-{i:03d}" for i in range(200)]
    for name in reversed(names):
        store.reserve(NewAdapter(name, "file:/x"), restored=True)

    def listed(*args: object) -> list[str]:
        return [info.name for info in store.list(*args)]  # type: ignore[arg-type]

    assert listed() == names
    assert store.num_in_state() == {AdapterState.LOADING: 200}
    assert listed("tenant-009", 100) == names[10:110]
    assert listed("tenant-190", 100) == names[191:]
    assert listed("tenant-000", 3, lambda info: info.name.endswith("0")) == ["tenant-010", "tenant-020", "tenant-030"]


def test_acquiring_several_is_all_or_nothing(store: AdapterStore, folders: Path) -> None:
    store.create(new(folders, "r4"))
    with pytest.raises(AdapterNotFound):
        store.acquire_all([("r4", 1.0), ("missing", 1.0)])
    assert store.get("r4").num_in_flight == 0


def test_a_failed_create_leaves_the_name_and_the_pages_free(store: AdapterStore, folders: Path) -> None:
    with pytest.raises(InvalidAdapter):
        store.create(new(folders, "broken"))
    assert store.list() == []
    store.check()


def test_a_failed_reservation_says_why_and_may_be_taken_over(store: AdapterStore, folders: Path) -> None:
    reservation = store.reserve(new(folders, "x", "broken"))
    with pytest.raises(InvalidAdapter):
        store.load(reservation)
    assert store.get("x").state is AdapterState.FAILED
    assert "adapter_config.json" in store.get("x").error
    with pytest.raises(AdapterNotFound, match="failed"):
        store.acquire("x")
    store.create(new(folders, "x", "r4"))
    store.check()


def test_a_load_that_breaks_leaves_neither_pages_nor_the_name_behind(
    store: AdapterStore, folders: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def out_of_memory(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(store._pool, "write", out_of_memory)
    with pytest.raises(Unavailable, match="could not be moved from host"):
        store.create(new(folders, "r4"))
    assert store.list() == []
    assert [type(record.exc_info[1]) for record in caplog.records if record.exc_info] == [MemoryError]
    reservation = store.reserve(new(folders, "r4"))
    with pytest.raises(Unavailable):
        store.load(reservation)
    assert store.get("r4").state is AdapterState.FAILED
    assert store.capacity().host_bytes_used == 0
    store.check()


def test_a_load_whose_name_was_taken_by_another_touches_nothing(store: AdapterStore, folders: Path) -> None:
    first = store.reserve(new(folders, "x", "r8"))
    store.delete("x")
    second = store.reserve(new(folders, "x", "r4"))
    store.load(second)
    with pytest.raises(AdapterNotFound, match="deleted while it loaded"):
        store.load(first)
    assert store.get("x").ranks == (4,)
    store.check()
    store.delete("x")
    assert store.num_pages[0] == 0


@pytest.mark.parametrize("source", ["file:/x\0y", "file:/x\ny", "file:/" + "x" * 5000, "file:{root}/" + "x" * 300])
def test_paths_that_no_file_system_takes_are_refused(store: AdapterStore, folders: Path, source: str) -> None:
    with pytest.raises((InvalidRequest, InvalidAdapter)):
        store.create(NewAdapter("x", source.format(root=folders)))
    store.check()


def test_values_beyond_the_pages_type_are_refused(folders: Path) -> None:
    pool = PagePool(linear_base(SHAPES), PageConfig(5, torch.float16, torch.device("cpu")))
    store = AdapterStore(pool, Sources([folders]), now=lambda: 0.0)
    target = folders / "large"
    if not target.exists():
        make_adapter(make_model("llama", folders.parent / "base3"), target, r=4, target_modules=["q_proj", "v_proj"])
        tensors = load_file(target / "adapter_model.safetensors")
        save_file({name: t * 1e6 for name, t in tensors.items()}, target / "adapter_model.safetensors")
    with pytest.raises(InvalidAdapter, match="beyond the range of float16"):
        store.create(new(folders, "large"))
    store.check()


def test_a_taken_name_is_refused(store: AdapterStore, folders: Path) -> None:
    store.create(new(folders, "r4"))
    with pytest.raises(AdapterExists, match="'r4' exists already"):
        store.create(new(folders, "r4", "r8"))


def test_what_finds_no_free_pages_is_kept_in_host_memory(store: AdapterStore, folders: Path) -> None:
    store.create(new(folders, "a", "r16"))
    store.create(new(folders, "b", "r8"))
    info = store.create(NewAdapter("d", f"file:{second_content(folders)}"))
    assert (info.state, info.device_bytes) == (AdapterState.HOST, 0)
    assert info.host_bytes > 0
    assert store.get("a").state is AdapterState.DEVICE, "nobody makes way for it"
    store.check()


def second_content(folders: Path) -> Path:
    """Another adapter of rank 16."""
    target = folders / "r16b"
    if not target.exists():
        make_adapter(
            make_model("llama", folders.parent / "base2"), target, 9, r=16, target_modules=["q_proj", "v_proj"]
        )
    return target


@pytest.mark.parametrize("name", ["", "a,b", "../x", "a..b", "a@b", "-a", "x" * 129, "naïve", "a b", "a\n"])
def test_bad_names_are_refused(store: AdapterStore, folders: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"adapter\.name"):
        store.create(new(folders, name, "r4"))


@pytest.mark.parametrize(
    "source", ["", "r4", "file:", "s3:bucket/r4", "file:/etc", "file:{root}/../outside", "file:{root}/link"]
)
def test_sources_outside_the_roots_are_refused(store: AdapterStore, folders: Path, source: str) -> None:
    link = folders / "link"
    if not link.exists():
        link.symlink_to(folders.parent / "outside")
    with pytest.raises(InvalidRequest, match=r"adapter\.source"):
        store.create(NewAdapter("x", source.format(root=folders)))


def test_a_file_that_links_out_of_the_roots_is_refused(store: AdapterStore, folders: Path) -> None:
    folder = folders / "linked"
    folder.mkdir(exist_ok=True)
    stolen = folders.parent / "outside" / "secret.safetensors"
    stolen.write_bytes((folders / "r4" / "adapter_model.safetensors").read_bytes())
    (folder / "adapter_config.json").write_bytes((folders / "r4" / "adapter_config.json").read_bytes())
    (folder / "adapter_model.safetensors").unlink(missing_ok=True)
    (folder / "adapter_model.safetensors").symlink_to(stolen)
    with pytest.raises(InvalidAdapter, match="link to a file outside"):
        store.create(new(folders, "linked"))


def test_threads_that_create_use_and_delete_leave_a_clean_pool(store: AdapterStore, folders: Path) -> None:
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            for _ in range(20):
                store.create(new(folders, f"t{rank}", f"r{rank}"))
                ref = store.acquire(f"t{rank}")
                store.delete(f"t{rank}")
                store.release(ref)
        except BaseException as error:  # noqa: BLE001 - reported by the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (4, 8, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert store.num_pages[0] == 0
    store.check()


def test_an_update_swaps_the_content_and_keeps_the_rest(store: AdapterStore, folders: Path) -> None:
    store.create(NewAdapter("x", f"file:{folders / 'r8'}", {"team": "one"}))
    old = store.acquire("x")
    info = store.update("x", AdapterChange(source=f"file:{folders / 'r4'}"))
    fresh = store.acquire("x")
    assert (info.ranks, info.labels, info.pinned) == ((4,), {"team": "one"}, False)
    assert info.source == f"file:{folders / 'r4'}"
    assert old.version.digest != fresh.version.digest == info.digest
    assert store.num_pages[0] == 2, "requests in flight finish on the old one"
    store.check()
    for ref in (old, fresh):
        store.release(ref)
    assert store.num_pages[0] == 1
    relabelled = store.update("x", AdapterChange(labels={"team": "two"}))
    assert (relabelled.labels, relabelled.digest) == ({"team": "two"}, info.digest)
    store.check()


def test_requests_that_belong_together_share_a_version_that_its_name_has_left(
    store: AdapterStore, folders: Path
) -> None:
    store.create(NewAdapter("x", f"file:{folders / 'r8'}"))
    first = store.acquire_all([("x", 1.0)])
    store.update("x", AdapterChange(source=f"file:{folders / 'r4'}"))
    second = store.share(first)
    assert [ref.version for ref in second] == [ref.version for ref in first]
    assert store.get("x").digest != first[0].version.digest
    for ref in first:
        store.release(ref)
    assert store.num_pages[0] == 2, "the second still holds it"
    for ref in second:
        store.release(ref)
    assert store.num_pages[0] == 1
    store.check()


def test_an_update_that_fails_changes_nothing(store: AdapterStore, folders: Path) -> None:
    before = store.create(new(folders, "r8"))
    for source, error in ((f"file:{folders / 'broken'}", InvalidAdapter), ("nonsense", InvalidRequest)):
        with pytest.raises(error):
            store.update("r8", AdapterChange(source, {"team": "one"}, pinned=True))
    with pytest.raises(AdapterNotFound):
        store.update("missing", AdapterChange(pinned=True))
    assert store.get("r8") == before
    store.check()


def test_an_update_brings_a_failed_adapter_to_life(store: AdapterStore, folders: Path) -> None:
    reservation = store.reserve(NewAdapter("x", f"file:{folders / 'broken'}", pinned=True))
    with pytest.raises(InvalidAdapter):
        store.load(reservation)
    store.update("x", AdapterChange(labels={"team": "one"}))
    assert store.get("x").state is AdapterState.FAILED
    info = store.update("x", AdapterChange(source=f"file:{folders / 'r4'}"))
    assert (info.state, info.error, info.pinned) == (AdapterState.DEVICE, "", True)
    assert store.capacity().pages_pinned == 1
    store.check()


def test_of_updates_that_overlap_the_last_one_asked_for_wins(folders: Path) -> None:
    sources = SlowSources(folders)
    pool = PagePool(linear_base(SHAPES), PageConfig(5, torch.float32, torch.device("cpu")))
    store = AdapterStore(pool, sources, now=lambda: 0.0)
    store.create(new(folders, "x", "r16"))
    sources.hold(lambda source: source.endswith("r4"))
    slow = threading.Thread(
        target=store.update, args=("x", AdapterChange(f"file:{folders / 'r4'}", {"by": "slow"}, pinned=True))
    )
    slow.start()
    sources.reached.acquire()
    store.update("x", AdapterChange(source=f"file:{folders / 'r8'}"))
    sources.may_read.set()
    slow.join()
    info = store.get("x")
    assert (info.ranks, info.labels, info.pinned) == ((8,), {"by": "slow"}, True)
    assert info.source.endswith("r8")
    assert store.num_pages[0] == 1
    store.check()


def test_who_may_change_an_adapter_is_asked_when_it_is_changed(folders: Path) -> None:
    sources = SlowSources(folders)
    pool = PagePool(linear_base(SHAPES), PageConfig(5, torch.float32, torch.device("cpu")))
    store = AdapterStore(pool, sources, now=lambda: 0.0)
    before = store.create(replace(new(folders, "x", "r16"), labels={"of": "a"}))

    def only_of_a(labels: Mapping[str, str]) -> None:
        if labels != {"of": "a"}:
            raise PermissionDenied("not yours")

    sources.hold(lambda source: source.endswith("r4"))
    with ThreadPoolExecutor() as threads:
        slow = threads.submit(store.update, "x", AdapterChange(f"file:{folders / 'r4'}"), only_of_a)
        sources.reached.acquire()
        store.update("x", AdapterChange(labels={"of": "b"}), only_of_a)
        sources.may_read.set()
        with pytest.raises(PermissionDenied, match="not yours"):
            slow.result(60)
    with pytest.raises(PermissionDenied, match="not yours"):
        store.delete("x", only_of_a)
    assert store.get("x") == replace(before, labels={"of": "b"})
    store.check()


def test_listeners_hear_of_every_change_in_order(store: AdapterStore, folders: Path) -> None:
    events: list[tuple[str, str, str]] = []
    stop = store.subscribe(lambda event: events.append((event.kind.value, event.info.name, event.info.state.value)))
    store.create(new(folders, "r16"))
    store.update("r16", AdapterChange(labels={"team": "one"}))
    store.create(NewAdapter("b", f"file:{second_content(folders)}"))
    store.create(NewAdapter("r8", f"file:{folders / 'r8'}", pinned=True))
    store.delete("r16")
    with pytest.raises(InvalidAdapter):
        store.create(new(folders, "broken"))
    stop()
    store.delete("r8")
    assert [event for event in events if event[1] == "r16"] == [
        ("added", "r16", "loading"),
        ("changed", "r16", "device"),
        ("changed", "r16", "device"),
        ("changed", "r16", "host"),
        ("deleted", "r16", "host"),
    ]
    assert [event for event in events if event[1] == "broken"] == [
        ("added", "broken", "loading"),
        ("changed", "broken", "failed"),
        ("deleted", "broken", "failed"),
    ]
    assert events[-1][1] == "broken"


def test_capacity_is_told_in_pages_and_bytes(store: AdapterStore, folders: Path) -> None:
    info = store.create(NewAdapter("r16", f"file:{folders / 'r16'}", pinned=True))
    store.create(new(folders, "r8"))
    capacity = store.capacity()
    assert (capacity.pages_total, capacity.pages_free, capacity.pages_pinned) == (4, 1, 2)
    assert (capacity.page_rows, capacity.page_bytes) == (8, info.device_bytes // 2)
    assert capacity.host_bytes_used == info.host_bytes + store.get("r8").host_bytes
    assert capacity.host_bytes_total == 1 << 30


def test_a_dry_run_says_what_the_adapter_will_take_whatever_the_dtype_of_its_file(folders: Path) -> None:
    pool = PagePool(linear_base(SHAPES), PageConfig(5, torch.bfloat16, torch.device("cpu")))
    store = AdapterStore(pool, Sources([folders]), now=lambda: 1000.0)
    source = f"file:{folders / 'r16'}"
    report = store.inspect(source)
    info = store.create(NewAdapter("r16", source))
    assert (report.digest, report.num_pages) == (info.digest, info.num_pages)
    assert (report.device_bytes, report.host_bytes) == (info.device_bytes, info.host_bytes)
    assert report.host_bytes < sum(module.num_bytes for module in report.modules)
