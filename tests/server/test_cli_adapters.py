"""`weft adapters` against a running server."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import Run, free_port


def test_list_shows_each_with_its_state(run: Run, address: str) -> None:
    ran = run("adapters", "list", "--address", address)
    assert ran.exit_code == 0
    header, *rows = [line.split() for line in ran.output.splitlines()]
    assert header[:3] == ["name", "state", "ranks"]
    assert [row[:2] for row in rows] == [["broken", "failed"], ["one", "device"], ["two", "device"]]
    assert "adapter_model.safetensors: is missing" in ran.output


def test_list_turns_pages(run: Run, address: str, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.server.api.adapters.DEFAULT_PAGE_SIZE", 1)
    ran = run("adapters", "list", "--address", address)
    assert [line.split()[0] for line in ran.output.splitlines()[1:]] == ["broken", "one", "two"]


def test_load_show_unload(run: Run, address: str, folders: Path) -> None:
    source = folders / "adapters" / "two"
    ran = run(
        *("adapters", "load", "mine", str(source), "--address", address),
        *("--label", "team=a", "--label", "made=by=hand", "--pinned"),
    )
    assert ran.exit_code == 0
    shown = run("adapters", "show", "mine", "--address", address)
    assert shown.output == ran.output
    rows = dict(line.split(maxsplit=1) for line in shown.output.splitlines())
    assert rows["source"].strip() == f"file:{source}"
    assert rows["labels"].strip() == "made=by=hand, team=a"
    assert rows["pinned"].strip() == "yes"
    assert rows["modules"].strip() == "q_proj, v_proj"
    assert run("adapters", "unload", "mine", "--address", address).output == "mine is unloaded\n"
    ran = run("adapters", "show", "mine", "--address", address)
    assert ran.exit_code == 1
    assert ran.error_line.startswith("NOT_FOUND: adapter 'mine'")


def test_load_without_waiting_shows_it_loading(run: Run, address: str, folders: Path) -> None:
    ran = run("adapters", "load", "later", f"file:{folders}/adapters/one", "--no-wait", "--address", address)
    assert ran.exit_code == 0
    assert "loading" in ran.output
    run("adapters", "unload", "later", "--address", address)


def test_every_problem_of_an_adapter_is_named(run: Run, address: str, folders: Path) -> None:
    ran = run("adapters", "load", "bad", str(folders / "adapters" / "broken"), "--address", address)
    assert ran.exit_code == 1
    assert ran.error_line == "FAILED_PRECONDITION: adapter_model.safetensors: is missing"


def test_a_taken_name_is_refused(run: Run, address: str, folders: Path) -> None:
    ran = run("adapters", "load", "one", str(folders / "adapters" / "two"), "--address", address)
    assert ran.exit_code == 1
    assert ran.error_line.startswith("ALREADY_EXISTS: adapter 'one' exists already")


def test_a_label_without_a_value_is_wrong_usage(run: Run) -> None:
    ran = run("adapters", "load", "x", "/x", "--label", "team")
    assert ran.exit_code == 2
    assert "--label is 'team'; must be KEY=VALUE" in ran.error_line


def test_no_server_says_how_to_start_one(run: Run) -> None:
    ran = run("adapters", "list", "--address", f"127.0.0.1:{free_port()}")
    assert ran.exit_code == 1
    assert "start one with `weft serve`" in ran.error_line
