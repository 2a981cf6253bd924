"""Disk, host memory and pages: who is where, who makes way for whom, and what a move that fails leaves behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from shelf import Shelf, equally, make_shelf, replace_weights

from weft.adapters.records import AdapterChange
from weft.adapters.residency import AdapterRef
from weft.adapters.tiers import NUM_READERS
from weft.errors import InvalidAdapter, InvalidRequest, OutOfCapacity, Unavailable, WeftError

PAGE_BYTES = 3 * 8 * (64 + 64 + 64 + 32) * 4
"""What a full page of rank rows takes in host memory."""

RANKS = {"a": 8, "b": 8, "c": 8, "d": 8, "wide": 16, "all": 32}


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shelf(tmp_path_factory.mktemp("tiers"), RANKS)


@pytest.fixture
def shelf(origin: Path, tmp_path: Path) -> Callable[..., Shelf]:
    return lambda num_pages, **how: Shelf(origin, tmp_path, num_pages, **how)


def hold(shelf: Shelf, *names: str) -> tuple[AdapterRef, ...]:
    """Acquire and run, as the engine does: ask in rounds until all are there."""
    return wait_and_hold(shelf, shelf.store.acquire_all(equally(names)))


def wait_and_hold(shelf: Shelf, refs: tuple[AdapterRef, ...]) -> tuple[AdapterRef, ...]:
    while not try_hold(shelf, refs):
        shelf.wait()
    return refs


def try_hold(shelf: Shelf, refs: tuple[AdapterRef, ...]) -> bool:
    with shelf.store.residency.round() as adapters:
        ready = adapters.ready(refs)
        if ready:
            adapters.hold(refs)
    shelf.store.check()
    return ready


def let_go(shelf: Shelf, refs: tuple[AdapterRef, ...]) -> None:
    shelf.store.residency.let_go(refs)
    for ref in refs:
        shelf.store.release(ref)
    shelf.store.check()


def use(shelf: Shelf, *names: str) -> None:
    let_go(shelf, hold(shelf, *names))


def test_an_adapter_is_put_where_room_is_without_anybody_making_way(shelf: Callable[..., Shelf]) -> None:
    tight = shelf(2, host_bytes=3 * PAGE_BYTES)
    for name in "abcd":
        tight.create(name)
    assert tight.states() == {"a": "device", "b": "device", "c": "host", "d": "host"}
    assert tight.store.get("c").host_bytes == PAGE_BYTES
    assert tight.store.capacity().host_bytes_used == 3 * PAGE_BYTES
    assert tight.evicted == ["host"], "the copy of a, which was used least recently"
    tight.store.check()


def test_without_a_budget_it_stays_on_disk(shelf: Callable[..., Shelf]) -> None:
    tight = shelf(1, host_bytes=0)
    for name in "ab":
        tight.create(name)
    assert tight.states() == {"a": "device", "b": "disk"}
    use(tight, "b")
    assert tight.states() == {"a": "disk", "b": "device"}
    assert tight.moved == [("host", "ok"), ("disk", "ok"), ("host", "ok")]
    assert tight.store.capacity().host_bytes_used == 0


def test_the_least_recently_used_makes_way(shelf: Callable[..., Shelf]) -> None:
    tight = shelf(2)
    for name in "abc":
        tight.create(name)
    use(tight, "a")
    use(tight, "c")
    assert tight.states() == {"a": "device", "b": "host", "c": "device"}
    assert tight.evicted == ["device"]


def test_what_runs_or_is_pinned_does_not_make_way(shelf: Callable[..., Shelf]) -> None:
    tight = shelf(2)
    tight.create("a", pinned=True)
    for name in "bcd":
        tight.create(name)
    running = hold(tight, "b")
    waiting = tight.store.acquire_all(equally(["c"]))
    assert not try_hold(tight, waiting)
    assert tight.states() == {"a": "device", "b": "device", "c": "host", "d": "host"}
    let_go(tight, running)
    let_go(tight, wait_and_hold(tight, waiting))
    assert tight.states() == {"a": "device", "b": "host", "c": "device", "d": "host"}


def test_a_pin_takes_the_pages_of_those_that_do_not_run(shelf: Callable[..., Shelf]) -> None:
    tight = shelf(2)
    for name in "ab":
        tight.create(name)
    assert tight.create("wide", pinned=True).state.value == "device"
    assert tight.states() == {"a": "host", "b": "host", "wide": "device"}
    assert tight.store.capacity().pages_pinned == 2
    with pytest.raises(OutOfCapacity, match="needs 1 pages; of 2, 0 are free"):
        tight.store.update("a", AdapterChange(pinned=True))
    assert not tight.store.get("a").pinned
    with pytest.raises(OutOfCapacity):
        tight.create("c", pinned=True)
    assert "c" not in tight.states()
    tight.store.update("wide", AdapterChange(pinned=False))
    assert tight.store.update("a", AdapterChange(pinned=True)).state.value == "device"
    tight.store.check()


def test_a_pin_of_what_is_on_disk_reads_it(shelf: Callable[..., Shelf]) -> None:
    tight = shelf(1, host_bytes=0)
    for name in "ab":
        tight.create(name)
    assert tight.store.update("b", AdapterChange(pinned=True)).state.value == "device"
    assert tight.states() == {"a": "disk", "b": "device"}
    tight.store.check()


def test_more_than_all_pages_hold_is_refused_with_the_remedy(shelf: Callable[..., Shelf]) -> None:
    tight = shelf(3)
    with pytest.raises(InvalidAdapter, match=r"takes 4 pages .* there are 3 in all: start .* --adapter-pages 4"):
        tight.create("all")
    tight.create("wide")
    tight.create("a")
    tight.create("b", pinned=True)
    with pytest.raises(InvalidRequest, match="need 4 pages at once, and there are 3"):
        tight.store.acquire_all(equally(["wide", "a", "b"]))
    with pytest.raises(OutOfCapacity, match="need 3 pages; of 3, 1 are pinned by others"):
        tight.store.acquire_all(equally(["wide", "a"]))
    assert all(info.num_in_flight == 0 for info in tight.store.list())
    let_go(tight, hold(tight, "wide", "b"))


def test_loads_of_one_content_are_one(shelf: Callable[..., Shelf]) -> None:
    tight = shelf(1, host_bytes=0)
    tight.create("a")
    for name in ("one", "two"):
        tight.create(name, "b")
    before = tight.sources.num_fetches
    refs = [tight.store.acquire_all(equally([name])) for name in ("one", "two", "one")]
    while not all([try_hold(tight, each) for each in refs]):  # noqa: C419 - each is asked, as in a round
        for each in refs:
            if each[0].version.active:
                tight.store.residency.let_go(each)
        tight.wait()
    assert tight.sources.num_fetches == before + 1
    assert {each[0].version for each in refs} == {refs[0][0].version}
    for each in refs:
        let_go(tight, each)


def test_changed_content_ends_who_waits_and_says_what_to_do(shelf: Callable[..., Shelf]) -> None:
    tight = shelf(1, host_bytes=0)
    for name in "ab":
        tight.create(name)
    replace_weights(tight.folder / "b", tight.folder / "c")
    with pytest.raises(InvalidAdapter, match=r"its files at file:.*/b have changed since .*: update the adapter"):
        hold(tight, "b")
    use(tight, "a")
    replace_weights(tight.folder / "b", tight.folder / "a")
    tight.store.update("b", AdapterChange(source=tight.source("b")))
    use(tight, "b")


def test_a_second_name_s_source_serves_when_the_first_has_changed(shelf: Callable[..., Shelf]) -> None:
    tight = shelf(1, host_bytes=0)
    tight.create("a")
    replace_weights(tight.folder / "c", tight.folder / "b")
    for name in "bc":
        tight.create(name)
    replace_weights(tight.folder / "b", tight.folder / "d")
    use(tight, "b")


def truncate(shelf: Shelf) -> None:
    path = shelf.folder / "b" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def remove(shelf: Shelf) -> None:
    (shelf.folder / "b" / "adapter_model.safetensors").unlink()


def break_disk(shelf: Shelf) -> None:
    shelf.sources.error = OSError(5, "Input/output error")


def break_network(shelf: Shelf) -> None:
    shelf.sources.error = Unavailable("the hub can't be reached")


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (truncate, InvalidAdapter, "have changed since it was loaded"),
        (remove, Unavailable, "No such file or directory"),
        (break_disk, Unavailable, "Input/output error"),
        (break_network, Unavailable, "the hub can't be reached"),
    ],
)
def test_a_read_that_fails_ends_who_waits_for_it_and_the_next_tries_again(
    shelf: Callable[..., Shelf], fault: Callable[[Shelf], None], error: type[WeftError], words: str
) -> None:
    tight = shelf(1, host_bytes=0)
    for name in "ab":
        tight.create(name)
    content = {file: file.read_bytes() for file in (tight.folder / "b").iterdir() if file.is_file()}
    fault(tight)
    running = hold(tight, "a")
    waiting = [tight.store.acquire_all(equally(["b"])) for _ in range(2)]
    for refs in waiting:
        with pytest.raises(error, match=words):
            wait_and_hold(tight, refs)
    late = tight.store.acquire_all(equally(["b"]))
    tight.sources.error = None
    for file, data in content.items():
        file.write_bytes(data)
    let_go(tight, running)
    let_go(tight, wait_and_hold(tight, late))
    for refs in waiting:
        tight.store.release(refs[0])
    assert tight.states() == {"a": "disk", "b": "device"}
    tight.store.check()


def test_a_copy_that_fails_gives_its_pages_back(shelf: Callable[..., Shelf], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("the device has had enough")

    tight = shelf(1)
    for name in "ab":
        tight.create(name)
    with monkeypatch.context() as patch:
        patch.setattr(tight.pool, "write", fail)
        with pytest.raises(Unavailable, match=r"could not be moved from host \(RuntimeError\): try again"):
            hold(tight, "b")
    assert tight.states() == {"a": "host", "b": "host"}
    use(tight, "b")


def test_a_disk_that_hangs_holds_up_nobody_in_host_memory(shelf: Callable[..., Shelf]) -> None:
    tight = shelf(1, host_bytes=PAGE_BYTES)
    for i in range(NUM_READERS):
        tight.create(f"cold{i}", "abcd"[i % 4])
    tight.create("wide2", "d")
    use(tight, "cold0")
    use(tight, "cold1")
    assert tight.states()["cold0"] == "disk"
    tight.sources.hold()
    waiting = tight.store.acquire_all(equally(["cold2"]))
    assert not try_hold(tight, waiting)
    tight.sources.reached.acquire()
    use(tight, "cold1")
    tight.sources.may_read.set()
    let_go(tight, wait_and_hold(tight, waiting))


def test_deleting_what_is_being_read_frees_it_when_the_read_ends(shelf: Callable[..., Shelf]) -> None:
    tight = shelf(1, host_bytes=0)
    for name in "ab":
        tight.create(name)
    tight.sources.hold()
    waiting = tight.store.acquire_all(equally(["b"]))
    assert not try_hold(tight, waiting)
    tight.store.delete("b")
    tight.sources.reached.acquire()
    tight.store.release(waiting[0])
    tight.store.check()
    tight.sources.may_read.set()
    while tight.store.is_moving:
        tight.wait()
    tight.store.check()
    assert tight.store._tiers.versions.keys() == {tight.store.get("a").digest}


def test_a_deleted_adapter_can_still_be_read_for_who_waits(shelf: Callable[..., Shelf]) -> None:
    tight = shelf(1, host_bytes=0)
    for name in "ab":
        tight.create(name)
    waiting = tight.store.acquire_all(equally(["b"]))
    tight.store.delete("b")
    let_go(tight, wait_and_hold(tight, waiting))
    assert tight.store.num_pages[0] == 0


def test_copies_wait_beyond_the_budget_only_while_somebody_waits_for_them(shelf: Callable[..., Shelf]) -> None:
    tight = shelf(2, host_bytes=0)
    for name in "abcd":
        tight.create(name)
    running = hold(tight, "a", "b")
    waiting = tight.store.acquire_all(equally(["c", "d"]))
    while tight.store.capacity().host_bytes_used < 2 * PAGE_BYTES:
        assert not try_hold(tight, waiting)
        tight.wait()
    assert not try_hold(tight, waiting)
    for ref in waiting:
        tight.store.release(ref)
    assert tight.store.capacity().host_bytes_used == 0
    tight.store.check()
    let_go(tight, running)


def test_threads_that_create_use_update_pin_and_delete_leave_clean_tiers(shelf: Callable[..., Shelf]) -> None:
    tight = shelf(3, host_bytes=2 * PAGE_BYTES)
    errors: list[BaseException] = []

    def work(index: int) -> None:
        mine, other = "abcd"[index], "abcd"[(index + 1) % 4]
        try:
            for i in range(15):
                tight.create(f"n{index}", mine)
                ref = tight.store.acquire(f"n{index}")
                tight.store.update(f"n{index}", AdapterChange(source=tight.source(other), labels={"i": str(i)}))
                try:
                    tight.store.update(f"n{index}", AdapterChange(pinned=True))
                except OutOfCapacity:
                    assert not tight.store.get(f"n{index}").pinned
                tight.store.delete(f"n{index}")
                tight.store.release(ref)
        except BaseException as error:  # noqa: BLE001 - reported by the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    while tight.store.is_moving:
        tight.wait()
    assert errors == []
    assert tight.store.num_pages[0] == 0
    assert tight.store.capacity().host_bytes_used == 0
    tight.store.check()
