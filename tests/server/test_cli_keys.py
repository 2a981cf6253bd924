"""`weft keys`: what it prints is what the server takes."""

from __future__ import annotations

import io
import re
import sys
import tomllib
from pathlib import Path

import pytest
from commands import Run

from weft.server.api.access.access_file import read_access
from weft.server.api.access.keys import digest_of


@pytest.mark.parametrize("name", ["team-a", "a team's, odd \" name", "x.y"])
def test_a_new_key_comes_with_lines_that_the_access_file_takes(run: Run, tmp_path: Path, name: str) -> None:
    ran = run("keys", "new", name)
    assert ran.exit_code == 0
    (key,) = re.findall(r"weft_[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])", ran.output)
    lines = ran.output.partition("For the access file:")[2]
    assert key not in lines
    (tmp_path / "access.toml").write_text(lines)
    rules = read_access(tmp_path / "access.toml", has_client_ca=False).callers[name]
    assert rules.key_sha256 == (digest_of(key),)
    assert list(tomllib.loads(lines)["callers"]) == [name]


def test_no_two_keys_are_alike(run: Run) -> None:
    assert run("keys", "new", "x").output != run("keys", "new", "x").output


@pytest.mark.parametrize("name", ["", "x" * 257, "a\nb"])
def test_a_name_that_no_caller_can_have_is_refused(run: Run, name: str) -> None:
    ran = run("keys", "new", name)
    assert ran.exit_code == 2
    assert "NAME must have 1 to 256 printable characters" in ran.error_line


def test_those_who_stand_for_all_others_have_no_key(run: Run) -> None:
    ran = run("keys", "new", "*")
    assert (ran.exit_code, ran.output) == (2, "")
    assert "NAME is '*', which stands for the callers of tokens and can't have a key" in ran.error_line


def test_a_key_on_standard_input_is_hashed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("k" * 40 + "\n"))
    ran = run("keys", "hash")
    assert (ran.exit_code, ran.output) == (0, digest_of("k" * 40) + "\n")


@pytest.mark.parametrize(
    ("given", "words"), [("", "holds no key"), ("two words", "holds no key"), ("hunter2", "could be guessed")]
)
def test_what_is_no_key_is_refused_and_not_repeated(
    run: Run, monkeypatch: pytest.MonkeyPatch, given: str, words: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(given))
    ran = run("keys", "hash")
    assert ran.exit_code == 2
    assert words in ran.error_line
    assert not given or given not in ran.error_line
