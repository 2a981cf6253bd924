"""What a command makes is there whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.errors import InvalidConfig
from weft.making.destination import complete_folder


def test_the_folder_takes_its_place_when_it_is_complete(tmp_path: Path) -> None:
    with complete_folder(tmp_path / "made" / "it") as folder:
        (folder / "file").write_text("whole")
        (folder / "file").chmod(0o600)
        assert not (tmp_path / "made" / "it").exists()
    assert (tmp_path / "made" / "it" / "file").read_text() == "whole"
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["it"]
    assert (tmp_path / "made" / "it" / "file").stat().st_mode & 0o777 == 0o644, "a server may run as someone else"


def test_an_empty_folder_may_be_there(tmp_path: Path) -> None:
    with complete_folder(tmp_path) as folder:
        (folder / "file").touch()
    assert (tmp_path / "file").is_file()


def test_nothing_is_left_of_what_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with complete_folder(tmp_path / "made") as folder:
            (folder / "file").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_what_is_there_is_not_written_over(tmp_path: Path, taken: str) -> None:
    path = tmp_path / "made"
    if taken == "file":
        path.touch()
    else:
        path.mkdir()
        (path / "other").touch()
    with pytest.raises(InvalidConfig, match="there already: name a new folder"), complete_folder(path):
        pytest.fail("the block must not run")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InvalidConfig, match=r"file/made', which can't be written: "),
        complete_folder(tmp_path / "file" / "made"),
    ):
        pytest.fail("the block must not run")
