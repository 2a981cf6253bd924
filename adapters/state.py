"""What was registered, kept on disk over a restart: names, sources, labels and pins, in one small SQLite table."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weft.adapters.records import NewAdapter
from weft.adapters.store import AdapterStore
from weft.errors import AdapterNotFound, InvalidConfig, Unavailable

SCHEMA_VERSION = 1
_APPLICATION_ID = 0x57454654
"""'WEFT', where SQLite keeps whose file it is."""

_CREATE = """
CREATE TABLE adapters (
    name TEXT PRIMARY KEY,
    source TEXT NOT NULL,
    labels TEXT NOT NULL CHECK (json_valid(labels)),
    pinned INTEGER NOT NULL
) STRICT, WITHOUT ROWID
"""
_PUT = "INSERT OR REPLACE INTO adapters (name, source, labels, pinned) VALUES (?, ?, ?, ?)"


class State:
    """One file, held by one server at a time. Every method may be called from any thread.

    `put` and `remove` return once the change is on disk.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, or make it. Raises InvalidConfig where it is another's, spoilt, in use or can't be written."""
        self._path = path
        self._lock = threading.Lock()
        try:
            self._database = _open(path)
        except (sqlite3.Error, OSError) as error:
            raise InvalidConfig(_refusal(path, error)) from None

    def put(self, adapter: NewAdapter) -> None:
        """Keep an adapter under its name, in place of what was there. Raises Unavailable."""
        labels = json.dumps(dict(adapter.labels), sort_keys=True)
        with self._writing() as database:
            database.execute(_PUT, (adapter.name, adapter.source, labels, adapter.pinned))

    def remove(self, name: str) -> None:
        """Forget a name, if it is there. Raises Unavailable."""
        with self._writing() as database:
            database.execute("DELETE FROM adapters WHERE name = ?", (name,))

    def all(self) -> list[NewAdapter]:
        """Everything kept, by name."""
        with self._lock:
            rows = self._database.execute("SELECT name, source, labels, pinned FROM adapters ORDER BY name").fetchall()
        return [NewAdapter(name, source, json.loads(labels), bool(pinned)) for name, source, labels, pinned in rows]

    def close(self) -> None:
        with self._lock:
            self._database.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One change: on disk at the end of the block, or Unavailable."""
        try:
            with self._lock, self._database:
                yield self._database
        except sqlite3.Error as error:
            words = (
                f"--state {self._path} can't be written ({error}): the change was made, but would not survive a restart"
            )
            raise Unavailable(words) from None


class Recorder:
    """Brings a state in step with a store, name by name, in whatever order and from whatever threads changes come.

    What is written is how the store has a name when it is written: after the last of several changes the two agree.
    """

    def __init__(self, store: AdapterStore, state: State) -> None:
        self._store = store
        self._state = state
        self._lock = threading.Lock()
        self._owed: set[str] = set()

    def record(self, name: str) -> None:
        """Return once it is on disk how the store has the name now, and any name that could not be written before.

        Raises Unavailable.
        """
        with self._lock:
            self._owed.add(name)
            for owed in sorted(self._owed):
                try:
                    info = self._store.get(owed)
                except AdapterNotFound:
                    self._state.remove(owed)
                else:
                    self._state.put(NewAdapter(owed, info.source, info.labels, info.pinned))
                self._owed.discard(owed)


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=0, check_same_thread=False)
    try:
        _prepare(database)
    except BaseException:
        database.close()
        raise
    return database


def _prepare(database: sqlite3.Connection) -> None:
    # The lock is held to the end: two servers with one file would overwrite each other's adapters. And WAL then needs
    # no shared memory, which network file systems lack.
    database.execute("PRAGMA locking_mode = EXCLUSIVE")
    is_new = _is_new(database)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    with database:
        database.execute("BEGIN EXCLUSIVE")
        if is_new:
            database.execute(_CREATE)
            database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(f"it is spoilt: {' '.join(verdict.split())}")


def _is_new(database: sqlite3.Connection) -> bool:
    """Whether nothing is in it yet. Raises DatabaseError, before anything is written, where it is not ours."""
    (owner,) = database.execute("PRAGMA application_id").fetchone()
    (version,) = database.execute("PRAGMA user_version").fetchone()
    (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if (owner, version, tables) == (0, 0, 0):
        return True
    if owner != _APPLICATION_ID:
        raise sqlite3.DatabaseError("it is another program's database")
    if version != SCHEMA_VERSION:
        raise sqlite3.DatabaseError(f"its version is {version}, and this Weft reads {SCHEMA_VERSION}")
    return False


def _refusal(path: Path, error: Exception) -> str:
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
        return f"--state is {str(path)!r}, which another server has open: give each its own"
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return f"--state is {str(path)!r}, whose disk is full: free some of it, or name a file elsewhere"
    return f"--state is {str(path)!r}, which can't be used ({error}): move it away to begin anew, or name another file"
