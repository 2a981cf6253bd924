"""Whose adapters get pages: in order, without a jam, and so that everybody gets a turn."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shelf import Shelf, equally, make_shelf

from weft.adapters.records import AdapterChange
from weft.adapters.residency import AdapterRef
from weft.server.engine.kv_blocks import BlockPool
from weft.server.engine.request import Request
from weft.server.engine.scheduler import Scheduler
from weft.server.engine.sequence import Sequence
from weft.server.engine.text import OutputText

RANKS = {**{f"s{i}": 8 for i in range(6)}, "m0": 16, "m1": 16, "l": 24}
NAMES = list(RANKS)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shelf(tmp_path_factory.mktemp("residency"), RANKS)


@pytest.fixture
def queue(origin: Path, tmp_path: Path) -> Callable[..., Queue]:
    return lambda num_pages, host_bytes=1 << 30, **how: Queue(Shelf(origin, tmp_path, num_pages, host_bytes), **how)


class Queue:
    """A scheduler over a shelf, with a model that gives any token at once."""

    def __init__(self, shelf: Shelf, max_running: int = 8, kv_blocks: int = 100) -> None:
        self.shelf = shelf
        for name in NAMES:
            if RANKS[name] <= 8 * shelf.pool.num_pages:
                shelf.create(name)
        self.scheduler = Scheduler(BlockPool(1 + kv_blocks, 4), 16, max_running, residency=shelf.store.residency)
        self.wanted: dict[Sequence, int] = {}
        self.started: list[str] = []

    def add(self, *names: str, num_tokens: int = 1) -> Sequence:
        refs = self.shelf.store.acquire_all(equally(names))
        text = OutputText(lambda ids: "")
        sequence = Sequence(Request("+".join(names), (1,)), refs, text, random.Random(0), 0.0)
        self.scheduler.add(sequence)
        self.wanted[sequence] = num_tokens
        return sequence

    def step(self) -> None:
        """Run what is ready; where nothing is, wait until something moved."""
        picked = self.scheduler.schedule()
        self.audit()
        for sequence, error in self.scheduler.hopeless:
            raise AssertionError(f"{sequence.request.request_id} can't run") from error
        if not picked:
            self.shelf.wait()
        for item in picked:
            if item.sequence.num_computed == 0 and item.sequence.num_generated == 0:
                self.started.append(item.sequence.request.request_id)
            assert all(ref.version.resident and ref.version.active for ref in item.sequence.adapters)
            item.sequence.num_computed += item.num_tokens
            if item.completes or item.sequence.num_pending == 0:
                item.sequence.tokens.append(7)
            if item.sequence.num_generated >= self.wanted[item.sequence]:
                self.end(item.sequence)
        self.audit()

    def end(self, sequence: Sequence) -> None:
        del self.wanted[sequence]
        self.scheduler.remove(sequence)
        for ref in sequence.adapters:
            self.shelf.store.release(ref)

    def run(self, limit: int = 3000) -> None:
        for _ in range(limit):
            if not self.wanted:
                return
            self.step()
        raise AssertionError("somebody waits for ever")

    def audit(self) -> None:
        self.scheduler.check()
        self.shelf.store.check()
        running: dict[AdapterRef, int] = {}
        for sequence in self.scheduler.running:
            for ref in sequence.adapters:
                running[ref] = running.get(ref, 0) + 1
        active = sum(version.active for version in self.shelf.store._tiers.versions.values())
        assert active == sum(running.values()), "what runs and what is held differ"


def test_a_cold_adapter_lets_those_behind_it_pass(queue: Callable[..., Queue]) -> None:
    line = queue(2)
    line.shelf.store._tiers._copiers._size = 0  # nothing moves
    cold = line.add("s5")
    warm = line.add("s0", num_tokens=3)
    for _ in range(3):
        line.step()
    assert warm not in line.wanted
    assert cold in line.wanted


def test_a_cold_adapter_gets_its_turn_however_many_ask_for_the_warm_one(queue: Callable[..., Queue]) -> None:
    line = queue(1)
    line.add("s0", num_tokens=4)
    line.step()
    cold = line.add("s1")
    for _ in range(100):
        if cold not in line.wanted:
            break
        line.add("s0", num_tokens=4)
        line.step()
    assert line.started == ["s0", "s1"], "those that came after it wait"
    line.run()


@pytest.mark.parametrize("host_bytes", [0, 1 << 30])
def test_a_large_adapter_gets_its_turn_however_many_ask_for_small_ones(
    queue: Callable[..., Queue], host_bytes: int
) -> None:
    line = queue(2, host_bytes)
    for name, num_tokens in (("s0", 3), ("s1", 15)):
        line.add(name, num_tokens=num_tokens)
        line.step()
    large = line.add("m0")
    for at in range(200):
        if large not in line.wanted:
            break
        line.add(f"s{2 + at % 4}", num_tokens=3)
        line.shelf.settle()  # what is still being read holds up nobody
        line.step()
    assert large not in line.wanted
    assert line.started == ["s0", "s1", "m0"]
    assert line.shelf.evicted.count("device") == 2, "pages come free for it, and for nobody behind it"
    line.run()


def test_the_turns_go_by_arrival(queue: Callable[..., Queue]) -> None:
    line = queue(1)
    for name in ("s0", "s1", "s2", "s0", "s1"):
        line.add(name)
    line.run()
    assert line.started == ["s0", "s0", "s1", "s1", "s2"], "who can share a turn does"


def test_those_who_run_on_other_adapters_go_on_while_one_drains(queue: Callable[..., Queue]) -> None:
    line = queue(3)
    long = line.add("s0", num_tokens=30)
    line.add("s1", num_tokens=2)
    line.add("s2", num_tokens=10)
    line.step()
    line.add("s3")
    line.add("s0")
    line.run()
    assert sorted(line.started[3:]) == ["s0", "s3"]
    assert long not in line.wanted


def test_a_mix_gets_all_its_adapters_or_none(queue: Callable[..., Queue]) -> None:
    line = queue(3)
    for names in (("s0", "m0"), ("m0", "s1"), ("s1", "m1"), ("m1", "s0"), ("l",), ("s2", "s3", "s4")):
        line.add(*names, num_tokens=3)
    line.run()
    assert len(line.started) == 6


def test_who_ends_while_it_has_claimed_pages_claims_no_more(queue: Callable[..., Queue]) -> None:
    line = queue(1)
    line.add("s0", num_tokens=5)
    line.step()
    cold = line.add("s1")
    line.step()
    assert line.shelf.store._tiers.pages_are_claimed
    line.end(cold)
    assert not line.shelf.store._tiers.pages_are_claimed
    line.run()


def test_a_preempted_request_lets_its_adapter_go_and_comes_back(queue: Callable[..., Queue]) -> None:
    line = queue(1, kv_blocks=4)
    for _ in range(3):
        line.add("s0", num_tokens=12)
    line.add("s1", num_tokens=12)
    line.run()
    assert line.scheduler.num_preemptions > 0


Arrivals = list[tuple[int, list[str], int]]


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(
            st.integers(0, 20),
            st.lists(st.sampled_from(NAMES), max_size=3).filter(lambda mix: sum(RANKS[n] for n in set(mix)) <= 32),
            st.integers(1, 8),
        ),
        min_size=1,
        max_size=16,
    ),
    cancels=st.sets(st.integers(0, 15), max_size=4),
    num_pages=st.integers(4, 6),
    host_pages=st.sampled_from([0, 2, 100]),
    pinned=st.sampled_from([None, "s0"]),
    kv_blocks=st.integers(4, 12),
)
def test_every_history_serves_everybody(
    origin: Path,
    arrivals: Arrivals,
    cancels: set[int],
    num_pages: int,
    host_pages: int,
    pinned: str | None,
    kv_blocks: int,
) -> None:
    with TemporaryDirectory() as root:
        shelf = Shelf(origin, Path(root), num_pages + bool(pinned), host_pages * 16128)
        line = Queue(shelf, max_running=4, kv_blocks=kv_blocks)
        if pinned:
            shelf.store.update(pinned, AdapterChange(pinned=True))
        live = {}
        for at in range(21):
            for index, (due, names, num_tokens) in enumerate(arrivals):
                if due == at:
                    live[index] = line.add(*names, num_tokens=num_tokens)
            for index in cancels & live.keys() if at % 7 == 6 else ():
                if live[index] in line.wanted:
                    line.end(live[index])
            if line.wanted:
                line.step()
        line.run()
        while shelf.store.is_moving:
            shelf.wait()
        assert all(info.num_in_flight == 0 for info in shelf.store.list())
        shelf.store.check()
