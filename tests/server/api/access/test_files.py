"""Files that change, are half written, or go away while somebody relies on them."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import pytest

from weft.errors import InvalidConfig
from weft.server.api.access.files import Opening, Reloading


class Reader:
    """Reads one file, which must not hold "bad", and one more that it may name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.used: list[str] = []
        self.counted: list[tuple[str, str]] = []
        self.reloading = Reloading(
            "thing", self.load, self.used.append, lambda what, how: self.counted.append((what, how))
        )

    def load(self, opening: Opening) -> str:
        try:
            text = opening(self.path).read_text()
            if text.startswith("see "):
                text = opening(self.path.parent / text.removeprefix("see ")).read_text()
        except OSError:
            raise InvalidConfig("the file can't be read") from None
        if text == "odd":
            raise RecursionError
        if text == "bad":
            raise InvalidConfig("the file is bad")
        return text

    def look(self, times: int = 2) -> list[str]:
        """What is in use after so many looks."""

        async def looks() -> None:
            for _ in range(times):
                await self.reloading.catch_up()

        asyncio.run(looks())
        return self.used


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    reader = Reader(tmp_path / "file")
    reader.path.write_text("first")
    reader.reloading.start()
    return reader


def test_what_does_not_change_is_read_once(reader: Reader) -> None:
    assert reader.look(5) == ["first"]
    assert reader.counted == []


def test_a_change_is_read_when_it_has_come_to_rest(reader: Reader) -> None:
    reader.look(1)
    reader.path.write_text("half")
    assert reader.look(1) == ["first"]
    reader.path.write_text("whole file")
    assert reader.look(1) == ["first"]
    assert reader.look(1) == ["first", "whole file"]
    assert reader.counted == [("thing", "ok")]


def test_what_is_bad_is_logged_once_and_what_was_read_before_stays(
    reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    reader.path.write_text("bad")
    with caplog.at_level(logging.WARNING):
        assert reader.look(5) == ["first"]
    assert caplog.messages == ["the file is bad; what was read before stays"]
    assert reader.counted == [("thing", "failed")]
    reader.path.write_text("mended")
    assert reader.look() == ["first", "mended"]


def test_a_file_that_goes_away_changes_nothing_until_it_is_there_again(reader: Reader) -> None:
    reader.path.unlink()
    assert reader.look() == ["first"]
    assert reader.counted == [("thing", "failed")]
    reader.path.write_text("back")
    assert reader.look() == ["first", "back"]


def test_files_that_the_first_one_names_are_watched_too(reader: Reader) -> None:
    other = reader.path.parent / "other"
    reader.path.write_text("see other")
    assert reader.look() == ["first"], "the other is not there yet"
    other.write_text("second")
    assert reader.look() == ["first", "second"]
    other.write_text("the third")
    assert reader.look() == ["first", "second", "the third"]


def test_a_link_that_moves_to_another_folder_is_a_change(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "data").symlink_to("one")
    reader = Reader(tmp_path / "data" / "file")
    reader.reloading.start()
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").replace(tmp_path / "data")
    assert reader.look() == ["one", "two"]


def test_what_is_bad_at_the_start_is_raised(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="can't be read"):
        Reader(tmp_path / "none").reloading.start()


def test_what_nobody_has_foreseen_is_one_failure_and_ends_nothing(
    reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    reader.path.write_text("odd")
    with caplog.at_level(logging.WARNING):
        assert reader.look(5) == ["first"]
    assert caplog.messages == ["thing could not be read again; what was read before stays"]
    assert reader.counted == [("thing", "failed")]


def test_a_pipe_is_not_waited_for(reader: Reader, caplog: pytest.LogCaptureFixture) -> None:
    reader.path.unlink()
    os.mkfifo(reader.path)
    with caplog.at_level(logging.WARNING):
        assert reader.look(5) == ["first"]
    assert caplog.messages == [f"{reader.path} is a pipe, and can't be read again; what was read before stays"]
