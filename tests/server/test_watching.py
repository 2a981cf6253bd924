"""The adapters folder is followed: what comes, changes and goes in it, and what is not its own."""

from __future__ import annotations

import asyncio
import shutil
from itertools import count
from pathlib import Path

import pytest
from harness import Harness
from prometheus_client import CollectorRegistry
from tiny import make_adapter, make_classifier, make_model, save_tokenizer

from weft.adapters.records import AdapterChange, AdapterState, NewAdapter
from weft.adapters.state import Recorder, State
from weft.adapters.store import AdapterStore
from weft.errors import AdapterNotFound
from weft.server.api.loading import AdapterLoader
from weft.server.metrics import Metrics
from weft.server.watching import AdapterFolders

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Watched:
    """A folder of adapters, the store that follows it, and `spare` adapters elsewhere to copy from."""

    def __init__(self, spare: Path, store: AdapterStore, tmp_path: Path) -> None:
        self.spare = spare
        self.root = tmp_path / "adapters"
        self.root.mkdir()
        self.store = store
        self.state = State(tmp_path / "state.db")
        self.loader = AdapterLoader(store, Metrics(CollectorRegistry()), Recorder(store, self.state))
        self.folders = self.fresh()

    def fresh(self) -> AdapterFolders:
        """As after a restart."""
        return AdapterFolders(self.root, [self.root, self.spare], self.store, self.loader)

    def put(self, name: str, adapter: str = "one") -> Path:
        """A whole folder at once, in place of what was there."""
        target = self.root / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.spare / adapter, target)
        return target

    def states(self) -> dict[str, AdapterState]:
        return {info.name: info.state for info in self.store.list()}

    def digest(self, name: str) -> str:
        return self.store.get(name).digest


@pytest.fixture(scope="module")
def spare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("spare")
    model = make_model("llama", root / "base")
    save_tokenizer(root / "base")
    for seed, name in enumerate(("one", "two")):
        make_adapter(model, root / name, seed=seed, target_modules=["q_proj"])
    make_classifier(root / "base", root / "mood", ("bad", "good"), target_modules=["q_proj"])
    return root


@pytest.fixture(scope="module")
def store(spare: Path) -> AdapterStore:
    return Harness(spare / "base", {"seed": spare / "one"}).store


@pytest.fixture
def watched(spare: Path, store: AdapterStore, tmp_path: Path) -> Watched:
    for info in store.list():
        store.delete(info.name)
    store._reader._sources._roots = (tmp_path / "adapters", spare)
    return Watched(spare, store, tmp_path)


def test_a_classifier_follows_its_labels(watched: Watched) -> None:
    labels = watched.put("mood", "mood") / "config.json"
    watched.folders.catch_up()
    before = watched.store.get("mood").classes
    labels.write_text('{"id2label": {"0": "sad", "1": "glad"}}')
    watched.folders.catch_up()
    after = watched.store.get("mood").classes
    assert [classes.labels for classes in (before, after) if classes] == [("bad", "good"), ("sad", "glad")]


def test_what_comes_is_loaded_what_changes_is_updated_and_what_goes_is_deleted(watched: Watched) -> None:
    watched.folders.catch_up()
    assert watched.states() == {}
    watched.put("a")
    watched.put("b", "two")
    watched.folders.catch_up()
    assert watched.states() == {"a": AdapterState.DEVICE, "b": AdapterState.DEVICE}
    one, two = watched.digest("a"), watched.digest("b")
    held = watched.store.acquire("a")
    watched.put("a", "two")
    watched.folders.catch_up()
    assert watched.digest("a") == two
    assert held.version.digest == one, "requests in flight finish on their version"
    watched.store.release(held)
    shutil.rmtree(watched.root / "b")
    watched.folders.catch_up()
    assert watched.states() == {"a": AdapterState.DEVICE}
    watched.store.check()


def test_what_has_not_changed_is_not_touched(watched: Watched) -> None:
    watched.put("a")
    watched.folders.load_all()
    events: list[object] = []
    end = watched.store.subscribe(events.append)
    watched.folders.catch_up()
    end()
    assert events == []


def test_a_folder_that_is_half_there_is_left_for_later(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    folder = watched.put("a")
    (folder / WEIGHTS).rename(watched.root / "elsewhere")
    watched.folders.catch_up()
    assert (watched.states(), caplog.messages) == ({}, [])
    (watched.root / "elsewhere").rename(folder / WEIGHTS)
    watched.folders.catch_up()
    assert watched.states() == {"a": AdapterState.DEVICE}
    (folder / CONFIG).unlink()
    watched.folders.catch_up()
    assert watched.states() == {"a": AdapterState.DEVICE}, "as when it is replaced file by file"


def test_one_that_fails_is_logged_in_one_line_and_tried_again_when_it_changes(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    folder = watched.put("a")
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-8])
    for _ in range(3):
        watched.folders.catch_up()
    assert watched.states() == {"a": AdapterState.FAILED}
    (line,) = caplog.messages
    assert WEIGHTS in line
    assert "\n" not in line
    (folder / WEIGHTS).write_bytes(whole)
    watched.folders.catch_up()
    assert watched.states() == {"a": AdapterState.DEVICE}


def test_a_change_for_the_worse_leaves_what_is_served(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    folder = watched.put("a")
    watched.folders.catch_up()
    digest = watched.digest("a")
    (folder / CONFIG).write_text("{")
    for _ in range(3):
        watched.folders.catch_up()
    assert (watched.digest("a"), watched.states()) == (digest, {"a": AdapterState.DEVICE})
    (line,) = caplog.messages
    assert line.startswith("adapter a was not updated: ")


def test_names_and_pins_given_over_the_api_are_kept(watched: Watched) -> None:
    watched.put("a")
    watched.folders.catch_up()
    watched.store.update("a", AdapterChange(labels={"k": "v"}, pinned=True))
    watched.put("a", "two")
    watched.folders.catch_up()
    info = watched.store.get("a")
    assert (info.labels, info.pinned) == ({"k": "v"}, True)


def test_an_adapter_of_the_same_name_from_the_api_is_left_alone(watched: Watched) -> None:
    watched.store.create(NewAdapter("a", f"file:{watched.spare / 'two'}"))
    two = watched.digest("a")
    watched.put("a", "one")
    watched.folders.catch_up()
    assert watched.digest("a") == two
    assert watched.fresh().load_all() == []
    shutil.rmtree(watched.root / "a")
    watched.folders.catch_up()
    assert watched.digest("a") == two


def test_one_deleted_over_the_api_stays_away_until_its_folder_changes(watched: Watched) -> None:
    watched.put("a")
    watched.folders.catch_up()
    asyncio.run(watched.loader.delete("a"))
    watched.folders.catch_up()
    assert watched.states() == {}
    watched.put("a", "two")
    watched.folders.catch_up()
    assert watched.states() == {"a": AdapterState.DEVICE}


def test_a_folder_that_is_kept_in_the_state_too_is_one_adapter_and_goes_from_both(watched: Watched) -> None:
    watched.put("a")
    watched.folders.catch_up()
    asyncio.run(watched.loader.update("a", AdapterChange(pinned=True)))
    (kept,) = watched.state.all()
    assert (kept.name, kept.pinned) == ("a", True)
    watched.store.delete("a")
    assert watched.loader.load_now(kept, restored=True)
    assert watched.fresh().load_all() == []
    shutil.rmtree(watched.root / "a")
    watched.folders.catch_up()
    assert (watched.states(), watched.state.all()) == ({}, [])


def test_a_volume_that_goes_away_takes_nothing_with_it(watched: Watched) -> None:
    watched.put("a")
    watched.folders.catch_up()
    watched.root.rename(watched.root.with_name("gone"))
    watched.folders.catch_up()
    assert watched.states() == {"a": AdapterState.DEVICE}


def test_an_empty_folder_in_the_place_of_the_first_takes_nothing_with_it(watched: Watched) -> None:
    """As where a volume was mounted, and is mounted again."""
    watched.put("a")
    watched.folders.catch_up()
    volume = watched.root.rename(watched.root.with_name("volume"))
    watched.root.mkdir()
    for _ in range(2):
        watched.folders.catch_up()
        assert watched.states() == {"a": AdapterState.DEVICE}
    watched.root.rmdir()
    volume.rename(watched.root)
    watched.put("b")
    watched.folders.catch_up()
    assert set(watched.states()) == {"a", "b"}
    for name in ("a", "b"):
        shutil.rmtree(watched.root / name)
    watched.folders.catch_up()
    assert watched.states() == {}, "what is emptied and still itself is meant"


def test_another_folder_that_holds_adapters_is_followed(watched: Watched) -> None:
    """As where a link leads to the next release."""
    watched.put("a")
    watched.folders.catch_up()
    watched.root.rename(watched.root.with_name("before"))
    watched.root.mkdir()
    watched.put("b")
    watched.folders.catch_up()
    assert watched.states() == {"b": AdapterState.DEVICE}


def test_links_are_followed_where_they_may_lead(
    watched: Watched, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(watched.spare / "one", tmp_path / "outside")
    (watched.root / "out").symlink_to(tmp_path / "outside")
    (watched.root / "in").symlink_to(watched.spare / "one")
    watched.folders.catch_up()
    assert watched.states() == {"in": AdapterState.DEVICE}
    (line,) = caplog.messages
    out = tmp_path / "outside"
    assert line == f"{watched.root}/out was not loaded: it leads to {out}; add that with --source-root {out}"
    one = watched.digest("in")
    (watched.root / "new").symlink_to(watched.spare / "two")
    (watched.root / "new").replace(watched.root / "in")
    watched.folders.catch_up()
    assert watched.digest("in") != one


def test_names_that_no_adapter_can_have_are_logged(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    watched.put("a bad name")
    for _ in range(2):
        watched.folders.catch_up()
    assert len(caplog.messages) == 1
    assert "a bad name" in caplog.messages[0]


class TestWatch:
    @pytest.mark.parametrize("look_every_ms", [100, 3_600_000], ids=["looking", "told"])
    def test_changes_are_seen_and_the_watch_ends_when_told(self, watched: Watched, look_every_ms: int) -> None:
        async def main() -> None:
            seen: asyncio.Queue[str] = asyncio.Queue()
            loop = asyncio.get_running_loop()
            end = watched.store.subscribe(
                lambda event: loop.call_soon_threadsafe(seen.put_nowait, f"{event.kind.value} {event.info.name}")
            )
            folders = watched.fresh()
            watching = asyncio.create_task(folders.watch(look_every_ms))

            async def until(event: str) -> None:
                while await seen.get() != event:
                    pass

            async def touch() -> None:
                for i in count():  # the first may come before the watch has begun
                    (watched.root / f"{i}.txt").touch()
                    await asyncio.sleep(0.6)

            watched.put("a")
            touching = asyncio.create_task(touch())
            await asyncio.wait_for(until("changed a"), 60)
            touching.cancel()
            shutil.rmtree(watched.root / "a")
            await asyncio.wait_for(until("deleted a"), 60)
            folders.stop()
            await asyncio.wait_for(watching, 60)
            end()

        asyncio.run(main())
        with pytest.raises(AdapterNotFound):
            watched.store.get("a")

    def test_cancelling_ends_it_too(self, watched: Watched) -> None:
        async def main() -> None:
            watching = asyncio.create_task(watched.fresh().watch(3_600_000))
            await asyncio.sleep(0)
            watching.cancel()
            await asyncio.wait({watching}, timeout=60)
            assert watching.cancelled()

        asyncio.run(main())
