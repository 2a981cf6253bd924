"""`weft adapters` against a running server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import grpc
import pytest
from adapterhub import FOLDER
from commands import SCRIPT, Run, free_port

from weft.server.cli.adapter_tables import print_list
from weft.v1 import adapter_pb2 as pb2
from weft.v1 import adapter_pb2_grpc


@pytest.fixture
def mine(run: Run, address: str, folders: Path) -> Iterator[str]:
    """An adapter that a test may change."""
    source = str(folders / "adapters" / "one")
    assert run("adapters", "load", "mine", source, "--label", "team=a", "--address", address).exit_code == 0
    yield "mine"
    run("adapters", "unload", "mine", "--address", address)


def shown(address: str, name: str) -> pb2.Adapter:
    with grpc.insecure_channel(address) as channel:
        stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        return stub.GetAdapter(pb2.GetAdapterRequest(name=name)).adapter


@contextmanager
def watching(address: str, *args: str) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """`weft adapters watch` in a process of its own, and what it prints."""
    command = [sys.executable, "-c", SCRIPT, "adapters", "watch", "--address", address, *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env={**os.environ, "PYTHONUTF8": "1"}, **pipes) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout
        finally:
            process.kill()


def test_list_shows_each_with_its_state(run: Run, address: str) -> None:
    ran = run("adapters", "list", "--address", address)
    assert ran.exit_code == 0
    header, *rows = [line.split() for line in ran.output.splitlines()]
    assert header[:3] == ["name", "state", "ranks"]
    assert [row[:2] for row in rows] == [["broken", "failed"], ["one", "device"], ["two", "device"]]
    assert "adapter_model.safetensors: is missing" in ran.output


@pytest.mark.parametrize("columns", [400, 80])
def test_list_has_one_line_an_adapter_however_much_is_wrong_with_it(
    columns: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("weft.server.cli.output._WIDTH_OF_FILES", columns)
    problems = [f"layer{i} holds\na tensor of another shape" for i in range(20)]
    errors = {"spoilt": "; ".join(problems), "empty": "adapter_config.json: is missing", "fine": ""}
    print_list(pb2.Adapter(name=name, digest=f"sha256:{'0' * 64}", error=error) for name, error in errors.items())
    _, *lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(errors)
    if columns == 400:
        ends = ("layer0 holds a tensor of another shape; …", "adapter_config.json: is missing", "0" * 12)
        assert [line.rstrip().endswith(end) for line, end in zip(lines, ends, strict=True)] == [True] * 3


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


def test_an_empty_source_is_not_the_folder_that_the_command_runs_in(run: Run, address: str) -> None:
    for args in (["load", "x", ""], ["update", "one", "--source", ""], ["check", ""], ["plan", ""]):
        ran = run("adapters", *args, "--address", address)
        assert ran.exit_code == 1
        assert "is empty" in ran.error_line


def test_a_label_without_a_value_is_wrong_usage(run: Run) -> None:
    ran = run("adapters", "load", "x", "/x", "--label", "team")
    assert ran.exit_code == 2
    assert "--label is 'team'; must be KEY=VALUE" in ran.error_line


def test_no_server_says_how_to_start_one(run: Run) -> None:
    ran = run("adapters", "list", "--address", f"127.0.0.1:{free_port()}")
    assert ran.exit_code == 1
    assert "start one with `weft serve`" in ran.error_line


def test_list_filters(run: Run, address: str, mine: str) -> None:
    def names(*args: str) -> list[str]:
        ran = run("adapters", "list", *args, "--address", address)
        assert ran.exit_code == 0
        return [line.split()[0] for line in ran.output.splitlines()[1:]]

    assert names() == ["broken", "mine", "one", "two"]
    assert names("--state", "failed") == ["broken"]
    assert names("--label", "team=a") == ["mine"]
    assert names("--prefix", "o") == ["one"]
    assert names("--prefix", "m", "--label", "team=a", "--state", "device") == ["mine"]
    assert run("adapters", "list", "--label", "team=b", "--address", address).output == "no adapters\n"


def test_lists_are_json_for_scripts(run: Run, address: str, folders: Path, mine: str) -> None:
    listed = json.loads(run("adapters", "list", "--json", "--prefix", "m", "--address", address).output)
    shown_one = json.loads(run("adapters", "show", mine, "--json", "--address", address).output)
    assert listed == [shown_one]
    assert shown_one["state"] == "ADAPTER_STATE_DEVICE"
    assert shown_one["source"] == f"file:{folders}/adapters/one"
    assert shown_one["labels"] == {"team": "a"}
    assert json.loads(run("adapters", "list", "--json", "--prefix", "-", "--address", address).output) == []


def test_check_shows_a_line_a_module(run: Run, address: str, folders: Path) -> None:
    ran = run("adapters", "check", str(folders / "adapters" / "two"), "--address", address)
    assert ran.exit_code == 0
    header, *lines = [line.split() for line in ran.output.splitlines()]
    assert header == ["module", "kind", "applied", "rank", "scale", "dtype", "pages", "bytes"]
    assert lines[0] == [
        *("model.layers.0.self_attn.q_proj", "linear:", "LoRA", "yes", "8", "2", "float32", "1", "4,096"),
    ]
    assert len([line for line in lines if line[0].startswith("model.")]) == 6
    assert lines[-1] == ["can", "be", "served"]
    assert ["pages", "1"] in lines
    as_json = json.loads(run("adapters", "check", "--json", f"{folders}/adapters/two", "--address", address).output)
    assert len(as_json["modules"]) == 6
    assert as_json["digest"] == shown(address, "two").digest


def test_check_names_every_problem_and_fails(run: Run, address: str, folders: Path) -> None:
    for more in ((), ("--json",)):
        ran = run("adapters", "check", str(folders / "adapters" / "broken"), *more, "--address", address)
        assert (ran.exit_code, ran.error) == (1, "")
        assert "adapter_model.safetensors" in ran.output
    ran = run("adapters", "check", "s3:bucket", "--address", address)
    assert ran.exit_code == 1
    assert ran.error_line.startswith("INVALID_ARGUMENT: source ")


def test_update_changes_what_is_given_and_nothing_else(run: Run, address: str, folders: Path, mine: str) -> None:
    before = shown(address, mine)
    ran = run("adapters", "update", mine, "--pin", "--address", address)
    assert ran.exit_code == 0
    assert ran.output == run("adapters", "show", mine, "--address", address).output
    assert run("adapters", "update", mine, "--label", "team=b", "--label", "x=", "--address", address).exit_code == 0
    after = shown(address, mine)
    assert (after.digest, after.pinned, dict(after.labels)) == (before.digest, True, {"team": "b", "x": ""})
    source = str(folders / "adapters" / "two")
    assert run("adapters", "update", mine, "--source", source, "--no-labels", "--address", address).exit_code == 0
    after = shown(address, mine)
    assert (after.source, after.pinned, dict(after.labels)) == (f"file:{source}", True, {})
    assert after.digest == shown(address, "two").digest
    assert run("adapters", "update", mine, "--unpin", "--address", address).exit_code == 0
    assert not shown(address, mine).pinned


def test_an_update_that_fails_changes_nothing(run: Run, address: str, folders: Path, mine: str) -> None:
    before = shown(address, mine)
    source = str(folders / "adapters" / "broken")
    ran = run("adapters", "update", mine, "--source", source, "--pin", "--address", address)
    assert ran.exit_code == 1
    assert ran.error_line == "FAILED_PRECONDITION: adapter_model.safetensors: is missing"
    assert shown(address, mine) == before


def test_pin_and_unpin(run: Run, address: str, mine: str) -> None:
    for command, pinned in (("pin", True), ("pin", True), ("unpin", False), ("unpin", False)):
        assert run("adapters", command, mine, "--address", address).exit_code == 0
        assert shown(address, mine).pinned == pinned
    assert run("adapters", "pin", "none", "--address", address).error_line.startswith("NOT_FOUND: adapter 'none'")


def test_plan_says_what_fits(run: Run, address: str, folders: Path) -> None:
    sources = [str(folders / "adapters" / name) for name in ("one", "two")]
    ran = run("adapters", "plan", *sources, "--shape", "16x3", "--shape", "8", "--rank", "12", "--address", address)
    assert ran.exit_code == 0
    lines = [line.split() for line in ran.output.splitlines()]
    assert ["pages", "needed", "9"] in lines
    assert ["rank", "12", "3", "more", "fit"] in lines
    assert ran.output.endswith("all fit on the device at once\n")
    ran = run("adapters", "plan", "--shape", "16x9", "--address", address)
    assert ran.exit_code == 1
    assert ran.output.endswith("not all fit on the device at once\n")
    ran = run("adapters", "plan", str(folders / "adapters" / "broken"), "--address", address)
    assert ran.exit_code == 1
    assert "broken: adapter_model.safetensors: is missing" in ran.output
    assert ran.output.endswith("not all can be served\n")
    as_json = json.loads(run("adapters", "plan", "--json", "--address", address).output)
    assert [room["rank"] for room in as_json["rooms"]] == [8, 16, 32, 64]
    assert as_json["pages_total"] == "16"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("update", "x"), "nothing to change: give --source, --pin, --unpin, --label or --no-labels"),
        (("update", "x", "--label", "a=b", "--no-labels"), "--label and --no-labels contradict each other"),
        (("update", "x", "--label", "a"), "--label is 'a'; must be KEY=VALUE"),
        (("list", "--label", "a"), "--label is 'a'; must be KEY=VALUE"),
        (("list", "--state", "loaded"), "'loaded'"),
        (("watch", "--state", "loaded"), "'loaded'"),
        (("plan", "--shape", "x3"), "--shape is 'x3'; must be a rank, or RANKxCOUNT such as 16x100"),
        (("plan", "--shape", "-1"), "--shape is '-1'"),
        (("plan", "--shape", "9" * 99), "must be a rank"),
        (("plan", "--rank", "0"), "--rank"),
    ],
)
def test_wrong_usage_is_named(run: Run, args: tuple[str, ...], says: str) -> None:
    ran = run("adapters", *args)
    assert ran.exit_code == 2
    assert says in ran.error_line


def test_watch_prints_a_line_an_event_until_it_is_interrupted(run: Run, address: str, folders: Path) -> None:
    with watching(address, "--label", "team=a") as (process, lines):
        assert lines.readline() == "listed\n"
        source = str(folders / "adapters" / "two")
        run("adapters", "load", "mine", source, "--label", "team=a", "--pinned", "--address", address)
        assert lines.readline().split()[0::2] == ["added", "mine"]
        run("adapters", "unload", "mine", "--address", address)
        while (words := lines.readline().split())[0] == "changed":
            assert words[2] == "mine"
        assert words == ["deleted", "device", "mine", shown(address, "two").digest[:19], "pinned"]
        process.send_signal(signal.SIGINT)
        output, error = process.communicate()
        assert (process.returncode, output, error.strip()) == (130, "", "")


def test_watch_speaks_json_a_line(run: Run, address: str) -> None:
    with watching(address, "--json", "--state", "failed") as (_, lines):
        added, listed = json.loads(lines.readline()), json.loads(lines.readline())
    assert (added["kind"], added["adapter"]["name"]) == ("ADAPTER_EVENT_KIND_ADDED", "broken")
    assert listed == {"kind": "ADAPTER_EVENT_KIND_LISTED"}


def test_convert_makes_a_folder_of_one_of_adapterhubs(run: Run, tmp_path: Path) -> None:
    made = tmp_path / "made"
    ran = run("adapters", "convert", str(FOLDER / "llama" / "houlsby"), "--output", str(made))
    assert ran.exit_code == 0
    assert (
        ran.output.strip() == f"{made}: silu bottlenecks behind self_attn.o_proj, mlp.down_proj, which read the output"
    )
    assert {file.name for file in made.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_convert_says_in_one_line_what_it_can_not(run: Run, folders: Path, tmp_path: Path) -> None:
    ran = run("adapters", "convert", str(folders / "adapters" / "one"), "--output", str(tmp_path / "made"))
    assert ran.exit_code == 1
    assert "version: is None: load and save it with AdapterHub's `adapters` first" in ran.error_line
