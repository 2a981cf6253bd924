"""Adapters from object stores, tried on file systems of fsspec's own that stand for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from weft.adapters.buckets import Buckets, check_library
from weft.adapters.downloads import Downloads, Limits
from weft.adapters.locations import parse_location, parse_prefix
from weft.errors import InvalidAdapter, InvalidConfig, Unavailable

SOURCE = parse_location("s3://bucket/loras/x")
AT = "/bucket/loras/x/adapter_model.safetensors"
WEIGHTS = bytes(range(256)) * (1 << 15)


@pytest.fixture
def store() -> Iterator[MemoryFileSystem]:
    store = MemoryFileSystem()
    store.pipe(AT, WEIGHTS)
    store.pipe("/bucket/loras/x/adapter_config.json", b"{}")
    yield store
    store.rm("/bucket", recursive=True)


class Faulty:
    """The store, whose next files break off after so many bytes."""

    def __init__(self, store: MemoryFileSystem, *cuts: int, error: Exception | None = None) -> None:
        self.store = store
        self.cuts = list(cuts)
        self.error = error or ConnectionError("gone")
        self.seeks: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def open(self, path: str, mode: str, **settings: Any) -> Any:
        file = self.store.open(path, mode, **settings)
        if path.endswith("safetensors"):
            return _File(file, self)
        return file


class _File:
    def __init__(self, file: Any, faults: Faulty) -> None:
        self.file = file
        self.faults = faults

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def seek(self, at: int) -> None:
        self.faults.seeks.append(at)
        self.file.seek(at)

    def read(self, num_bytes: int) -> bytes:
        if not self.faults.cuts:
            return bytes(self.file.read(num_bytes))
        if self.faults.cuts[0] == 0:
            self.faults.cuts.pop(0)
            raise self.faults.error
        part = bytes(self.file.read(self.faults.cuts[0]))
        self.faults.cuts[0] = 0
        return part


def fetch(store: Any, cache: Path, limits: Limits | None = None) -> Path:
    return Downloads(cache, limits or Limits()).fetch(SOURCE, Buckets(lambda scheme: store))


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_the_two_files_come(store: MemoryFileSystem, tmp_path: Path) -> None:
    folder = fetch(store, tmp_path)
    assert weights(folder) == WEIGHTS
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_what_has_not_changed_is_not_read_again(store: MemoryFileSystem, tmp_path: Path) -> None:
    folder = fetch(store, tmp_path)
    watched = Faulty(store)
    assert fetch(watched, tmp_path) == folder
    assert watched.seeks == []


def test_a_new_version_lies_in_a_folder_of_its_own(store: MemoryFileSystem, tmp_path: Path) -> None:
    old = fetch(store, tmp_path)
    store.pipe(AT, WEIGHTS[::-1])
    assert weights(fetch(store, tmp_path)) == WEIGHTS[::-1]
    assert weights(old) == WEIGHTS


def test_it_goes_on_where_it_broke_off(store: MemoryFileSystem, tmp_path: Path) -> None:
    faulty = Faulty(store, 1000, 5000)
    assert weights(fetch(faulty, tmp_path)) == WEIGHTS
    assert faulty.seeks == [0, 1000, 6000]


def test_one_that_changes_while_it_is_read_starts_again(store: MemoryFileSystem, tmp_path: Path) -> None:
    changes = [WEIGHTS[::-1]]

    def change(source: str, done: int, total: int | None) -> None:
        if changes:
            store.pipe(AT, changes.pop())

    assert weights(fetch(store, tmp_path, Limits(on_progress=change))) == WEIGHTS[::-1]


@pytest.mark.parametrize(
    "error", [ConnectionError("gone"), OSError(5, "I/O error"), TimeoutError(), RuntimeError("no\ncredentials")]
)
def test_a_store_that_can_not_be_read_now_may_be_asked_again(
    store: MemoryFileSystem, tmp_path: Path, error: Exception
) -> None:
    with pytest.raises(Unavailable, match=type(error).__name__) as raised:
        fetch(Faulty(store, 0, error=error), tmp_path)
    assert "\n" not in str(raised.value)
    assert weights(fetch(store, tmp_path)) == WEIGHTS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda store: store.rm(AT), "adapter_model.safetensors: is missing at s3://bucket/loras/x"),
        (lambda store: (store.rm(AT), store.mkdir(AT)), "adapter_model.safetensors: is missing at"),
        (
            lambda store: store.pipe(AT.replace("model.safetensors", "config.json"), bytes(2 << 20)),
            "1,048,576 are allowed",
        ),
    ],
)
def test_what_can_not_be_had_is_named(
    store: MemoryFileSystem, tmp_path: Path, change: Callable[[MemoryFileSystem], object], words: str
) -> None:
    change(store)
    with pytest.raises(InvalidAdapter, match=re.escape(words)):
        fetch(store, tmp_path)


def test_what_may_not_be_read_is_named(store: MemoryFileSystem, tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match=r"may not be read at s3://bucket/loras/x \(Access Denied\)"):
        fetch(Faulty(store, 0, error=PermissionError("Access Denied")), tmp_path)


def test_what_is_too_large_is_not_read(store: MemoryFileSystem, tmp_path: Path) -> None:
    watched = Faulty(store)
    with pytest.raises(InvalidAdapter, match=rf"has {len(WEIGHTS):,} bytes or more; 1,000 are allowed"):
        fetch(watched, tmp_path, Limits(max_bytes=1000))
    assert watched.seeks == []


@pytest.mark.parametrize(
    ("prefix", "library", "extra"), [("s3://bucket", "s3fs", "s3"), ("gs://bucket/x", "gcsfs", "gcs")]
)
def test_a_library_that_is_missing_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, prefix: str, library: str, extra: str
) -> None:
    monkeypatch.setattr("weft.adapters.buckets.find_spec", lambda name: None)
    with pytest.raises(
        InvalidConfig, match=rf"--source-root is {prefix}, which needs {library}: pip install 'weft\[{extra}\]'"
    ):
        check_library(parse_prefix(prefix))
    check_library(parse_prefix("https://host"))


def test_a_classifiers_labels_come_with_it_where_there_are_any(store: MemoryFileSystem, tmp_path: Path) -> None:
    store.pipe("/bucket/loras/x/adapter_config.json", b'{"task_type": "SEQ_CLS"}')
    assert not (fetch(store, tmp_path) / "config.json").exists()
    store.pipe("/bucket/loras/x/config.json", b'{"num_labels": 2}')
    assert (fetch(store, tmp_path) / "config.json").read_bytes() == b'{"num_labels": 2}'
