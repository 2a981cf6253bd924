"""What survives a restart: everything that was acknowledged, whole, and only from a file that is Weft's own."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from weft.adapters.records import NewAdapter
from weft.adapters.state import SCHEMA_VERSION, Recorder, State
from weft.adapters.store import AdapterStore
from weft.errors import AdapterNotFound, InvalidConfig, Unavailable

ONE = NewAdapter("team/one", "hf:org/one@main", {"tier": "gold", "ключ": "“värde”\n"}, pinned=True)
TWO = NewAdapter("two", "file:/srv/two")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


def kept(path: Path) -> list[NewAdapter]:
    state = State(path)
    try:
        return state.all()
    finally:
        state.close()


def test_what_is_put_is_there_after_a_restart(path: Path) -> None:
    state = State(path)
    state.put(TWO)
    state.put(ONE)
    state.close()
    assert kept(path) == [ONE, TWO]


def test_a_later_one_takes_the_place_of_an_earlier(path: Path) -> None:
    state = State(path)
    state.put(ONE)
    state.put(NewAdapter("team/one", "s3://bucket/one"))
    assert state.all() == [NewAdapter("team/one", "s3://bucket/one")]
    state.remove("team/one")
    state.remove("team/one")
    assert state.all() == []
    state.close()


def test_a_change_is_on_disk_when_it_returns(path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from weft.adapters.state import State; "
        "from weft.adapters.records import NewAdapter; state = State(Path(sys.argv[1])); "
        "[state.put(NewAdapter(f'n{i}', 'file:/x')) for i in range(9)]; state.remove('n4'); os.kill(os.getpid(), 9)"
    )
    ran = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert ran.returncode == -signal.SIGKILL
    assert [adapter.name for adapter in kept(path)] == [f"n{i}" for i in range(9) if i != 4]


def test_it_is_one_servers_alone(path: Path) -> None:
    state = State(path)
    state.put(ONE)
    with pytest.raises(
        InvalidConfig, match=r"--state is '.*state.db', which another server has open: give each its own"
    ):
        State(path)
    state.close()
    assert kept(path) == [ONE]


def test_threads_may_share_it(path: Path) -> None:
    state = State(path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: state.put(NewAdapter(f"n{i:02}", "file:/x")), range(40)))
    assert [adapter.name for adapter in state.all()] == [f"n{i:02}" for i in range(40)]
    state.close()


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE recipes (name TEXT)")
    database.close()


def newer(path: Path) -> None:
    State(path).close()
    with sqlite3.connect(path) as database:
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    database.close()


def spoilt(path: Path) -> None:
    state = State(path)
    for i in range(2000):
        state.put(NewAdapter(f"n{i}", "file:/x"))
        if i == 200:
            break
    state.close()
    content = bytearray(path.read_bytes())
    content[4096:8192] = bytes(4096)
    path.write_bytes(content)


def cut(path: Path) -> None:
    spoilt(path)
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (foreign, "another program's database"),
        (newer, f"its version is {SCHEMA_VERSION + 1}, and this Weft reads {SCHEMA_VERSION}"),
        (spoilt, "spoilt|malformed"),
        (cut, "spoilt|malformed"),
        (lambda path: path.write_bytes(b"not a database, whatever it is" * 400), "not a database"),
        (lambda path: path.mkdir(), "unable to open"),
    ],
    ids=["foreign", "newer", "spoilt", "cut", "text", "folder"],
)
def test_a_file_that_is_none_is_refused_in_one_line_and_left_as_it_is(
    path: Path, make: Callable[[Path], object], words: str
) -> None:
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(
        InvalidConfig, match=rf"--state is '.*', which can't be used \(.*({words}).*\): move it away"
    ) as raised:
        State(path)
    assert "\n" not in str(raised.value)
    assert before is None or path.read_bytes() == before


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"--state is .*unable to open"):
        State(tmp_path / "nowhere" / "state.db")


class Names:
    """What a recorder asks of a store."""

    def __init__(self) -> None:
        self.adapters: dict[str, NewAdapter] = {}

    def get(self, name: str) -> Any:
        if name not in self.adapters:
            raise AdapterNotFound(name)
        new = self.adapters[name]
        return SimpleNamespace(source=new.source, labels=new.labels, pinned=new.pinned)


class TestRecorder:
    def test_it_writes_how_a_name_stands_now(self, path: Path) -> None:
        names, state = Names(), State(path)
        recorder = Recorder(cast("AdapterStore", names), state)
        names.adapters = {adapter.name: adapter for adapter in (ONE, TWO)}
        recorder.record(ONE.name)
        assert state.all() == [ONE]
        names.adapters.clear()
        recorder.record(ONE.name)
        recorder.record(TWO.name)
        assert state.all() == []
        state.close()

    def test_what_could_not_be_written_is_said_and_made_good(self, path: Path) -> None:
        names, state = Names(), State(path)
        recorder = Recorder(cast("AdapterStore", names), state)
        names.adapters = {adapter.name: adapter for adapter in (ONE, TWO)}
        state._database.execute("PRAGMA query_only = 1")
        with pytest.raises(
            Unavailable, match=r"--state .* can't be written .*: the change was made, but would not survive"
        ):
            recorder.record(ONE.name)
        state._database.execute("PRAGMA query_only = 0")
        recorder.record(TWO.name)
        assert state.all() == [ONE, TWO]
        state.close()

    def test_changes_from_many_threads_end_as_the_store_is(self, path: Path) -> None:
        names, state = Names(), State(path)
        recorder = Recorder(cast("AdapterStore", names), state)
        together = threading.Barrier(4)

        def change(thread: int) -> None:
            together.wait()
            for i in range(25):
                name = f"n{(thread + i) % 3}"
                if (thread + i) % 2:
                    names.adapters[name] = NewAdapter(name, f"file:/{thread}/{i}")
                else:
                    names.adapters.pop(name, None)
                recorder.record(name)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(change, range(4)))
        assert state.all() == [names.adapters[name] for name in sorted(names.adapters)]
        state.close()
