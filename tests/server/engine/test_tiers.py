"""More adapters than pages: every answer is what it would be with room for all, and nobody waits for ever."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Answer, Harness
from shelf import SlowSources, replace_weights
from tiny import VOCAB, make_adapter, make_model, save_tokenizer

from weft.adapters.records import AdapterChange
from weft.errors import DeadlineExceeded, InvalidAdapter, InvalidRequest, Unavailable
from weft.server.engine.request import FinishReason, Request, Stopping

NAMES = [f"a{i}" for i in range(20)]
RANKS = {name: (4, 8, 8, 12, 16)[i % 5] for i, name in enumerate(NAMES)}
PAGES = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiers")
    model = make_model("llama", root / "base")
    save_tokenizer(root / "base")
    for seed, (name, rank) in enumerate(RANKS.items()):
        make_adapter(model, root / "adapters" / name, seed, r=rank, target_modules=["q_proj", "v_proj", "down_proj"])
    return root


@pytest.fixture(scope="module")
def roomy(folder: Path) -> Harness:
    return start(folder, adapter_pages=64)


def start(folder: Path, adapter_pages: int = PAGES, names: list[str] = NAMES, **how: object) -> Harness:
    adapters = {name: folder / "adapters" / name for name in names}
    return Harness(folder / "base", adapters, adapter_pages=adapter_pages, **how)


def ask(*names: str, seed: int = 0, num_tokens: int = 12, **how: object) -> Request:
    rng = random.Random(seed)
    prompt = tuple(rng.randrange(3, VOCAB) for _ in range(1 + seed % 9))
    deadline_s = how.pop("deadline_s", None)
    stopping = Stopping(max_tokens=num_tokens, ignore_eos=True, **how)
    weights = tuple((name, 1.0 - 0.5 * i) for i, name in enumerate(names))
    return Request("+".join(names), prompt, weights, stopping=stopping, deadline_s=deadline_s)


def mixed(count: int, seed: int = 0) -> list[Request]:
    """Requests for the base, for single adapters and for pairs that fit."""
    rng = random.Random(seed)
    requests = []
    for i in range(count):
        names = rng.sample(NAMES, rng.choice([0, 1, 1, 1, 1, 2]))
        requests.append(ask(*names, seed=i, num_tokens=rng.randint(1, 14)))
    return requests


def ids(answers: list[Answer]) -> list[list[int]]:
    return [answer.ids for answer in answers]


@pytest.mark.parametrize("host_bytes", [0, 100_000, 1 << 30])
def test_twenty_adapters_share_the_pages_of_four(folder: Path, roomy: Harness, host_bytes: int) -> None:
    requests = mixed(60)
    expected = ids([roomy.run([request])[0] for request in requests])
    harness = start(folder, adapter_host_bytes=host_bytes)
    assert ids(harness.run(requests, [i // 3 for i in range(60)])) == expected
    assert harness.store.capacity().pages_total == PAGES
    assert (harness.registry.get_sample_value("weft_adapter_evictions_total", {"tier": "device"}) or 0) >= 16
    assert all(info.num_in_flight == 0 for info in harness.store.list())


def test_they_are_the_same_across_preemptions(folder: Path, roomy: Harness) -> None:
    requests = [ask(name, seed=i, num_tokens=40) for i, name in enumerate(NAMES[:8])]
    expected = ids(roomy.run(requests))
    harness = start(folder, kv_tokens=80, block_tokens=4)
    assert ids(harness.run(requests)) == expected
    assert harness.engine._scheduler.num_preemptions > 0


def test_a_name_that_changes_in_flight_serves_each_request_the_version_it_began_with(
    folder: Path, roomy: Harness
) -> None:
    old, new = (roomy.run([ask(name)])[0].ids for name in ("a1", "a2"))
    harness = start(folder, adapter_host_bytes=0)
    first = [harness.submit(ask("a1")) for _ in range(3)]
    harness.step()
    harness.store.update("a1", AdapterChange(source=f"file:{folder / 'adapters' / 'a2'}"))
    second = [harness.submit(ask("a1")) for _ in range(3)]
    harness.step()
    harness.store.delete("a1")
    harness.finish()
    assert ids(first) == [old] * 3
    assert ids(second) == [new] * 3
    harness.store.check()


def test_a_mix_that_can_not_fit_is_refused_before_it_waits(folder: Path) -> None:
    harness = start(folder)
    with pytest.raises(InvalidRequest, match=r"adapters: need 6 pages at once, and there are 4"):
        harness.submit(ask("a3", "a4", "a8"))
    assert not harness.engine.has_work


def test_a_stalled_read_delays_its_own_requests_only(folder: Path, roomy: Harness) -> None:
    sources = SlowSources(folder / "adapters")
    harness = start(folder, sources=sources, adapter_host_bytes=0)
    cold, *others = [*NAMES[9:13], *NAMES[:3]]
    expected = ids(roomy.run([ask(name) for name in (cold, *others)]))
    sources.hold(lambda source: source.endswith(f"/{cold}"))
    stalled = [harness.submit(ask(cold)), harness.submit(ask(cold, "a1"))]
    answers = [harness.submit(ask(name)) for name in others]
    while not all(answer.ended for answer in answers):
        harness.step()
    assert ids(answers) == expected[1:]
    assert not any(answer.ended for answer in stalled)
    sources.may_read.set()
    harness.finish()
    assert stalled[0].ids == expected[0]


def test_a_read_that_fails_ends_its_own_requests_only(folder: Path, roomy: Harness) -> None:
    sources = SlowSources(folder / "adapters")
    harness = start(folder, sources=sources, adapter_host_bytes=0)
    expected = roomy.run([ask("a1"), ask("a12")])
    sources.slow = lambda source: source.endswith("/a12")
    sources.error = OSError(5, "Input/output error")
    failed, mixed_in, fine = harness.run([ask("a12"), ask("a12", "a1"), ask("a1")])
    assert isinstance(failed.error, Unavailable)
    assert isinstance(mixed_in.error, Unavailable)
    assert fine.ids == expected[0].ids
    sources.error = None
    assert harness.run([ask("a12")])[0].ids == expected[1].ids


class Clock:
    """Seconds that pass when the test says so."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_cancel_deadline_and_time_limit_end_who_waits_for_a_read(folder: Path) -> None:
    sources, clock = SlowSources(folder / "adapters"), Clock()
    harness = start(folder, sources=sources, adapter_host_bytes=0)
    harness.engine.clock = clock
    sources.hold()
    late, limited, cancelled, patient = (
        ask("a12", deadline_s=5.0),
        ask("a12", time_limit_s=7.0),
        ask("a12"),
        ask("a12"),
    )
    answers = [harness.submit(request) for request in (late, limited, cancelled, patient)]
    assert harness.engine.idle_s == 0.0
    harness.step()
    assert harness.engine.idle_s == 5.0
    assert harness.registry.get_sample_value("weft_requests_waiting") == 4
    clock.now_s = 5.0
    harness.wake()
    harness.step()
    assert isinstance(answers[0].error, DeadlineExceeded)
    assert harness.engine.idle_s == 2.0
    clock.now_s = 7.0
    harness.wake()
    harness.step()
    assert answers[1].finish is not None
    assert answers[1].finish.reason is FinishReason.TIME_LIMIT
    harness.engine.cancel(cancelled)
    assert harness.store.get("a12").num_in_flight == 1
    assert harness.engine.idle_s is None
    sources.may_read.set()
    harness.finish()
    assert len(answers[3].ids) == 12
    assert harness.store.get("a12").num_in_flight == 0


@pytest.fixture
def own_folder(folder: Path, tmp_path: Path) -> Iterator[Path]:
    """Some adapters that a test may break."""
    (tmp_path / "base").symlink_to(folder / "base")
    for name in NAMES[:8]:
        (tmp_path / "adapters" / name).mkdir(parents=True)
        replace_weights(tmp_path / "adapters" / name, folder / "adapters" / name)
    return tmp_path


@pytest.mark.parametrize("fault", ["truncated", "replaced", "removed", "a folder"])
def test_files_that_break_disturb_nobody_else_and_recover(own_folder: Path, roomy: Harness, fault: str) -> None:
    names = NAMES[:8]
    harness = start(own_folder, names=names, adapter_host_bytes=0)
    expected = ids(roomy.run([ask(name) for name in names]))
    path = own_folder / "adapters" / "a7" / "adapter_model.safetensors"
    content = path.read_bytes()
    if fault == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif fault == "replaced":
        path.write_bytes((own_folder / "adapters" / "a6" / path.name).read_bytes())
    else:
        path.unlink()
    if fault == "a folder":
        path.mkdir()
    *fine, broken = harness.run([ask(name) for name in names], [2] * 7 + [0])
    assert ids(fine) == expected[:7]
    assert isinstance(broken.error, Unavailable if fault == "removed" else InvalidAdapter)
    if fault == "a folder":
        path.rmdir()
    path.write_bytes(content)
    assert harness.run([ask("a7")])[0].ids == expected[7]
    assert ids(harness.run([ask(name) for name in names])) == expected
