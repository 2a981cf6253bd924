"""`weft train` from the command line: from a file to an answer of a running server."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import SCRIPT, Run, free_port, shell
from training_runs import make_base, shouted, write_rows

from weft.server.cli import main

QUICK = ("--max-steps", "1", "--rank", "2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The class and sizes of the server's own."""
    return make_base(tmp_path_factory.mktemp("train") / "base")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "prompts.jsonl", shouted(8))


def test_train_push_ask_and_train_again(run: Run, address: str, base: Path, folders: Path, prompts: Path) -> None:
    """The name moves to the second one; no server starts anew."""
    digests = []
    for output in ("first", "second"):
        folder = folders / "adapters" / "nested" / output
        options = ("--model", str(base), "--data", str(prompts), "--output", str(folder), *QUICK)
        ran = run("train", *options, "--seed", str(len(digests)), "--push", address, "--name", "pushed")
        assert (ran.exit_code, ran.error) == (0, "")
        told, served = ran.output.splitlines()
        assert told.startswith(f"{folder}: 1 steps on 8 examples, loss ")
        assert served.startswith(f"{address} serves it as pushed, sha256:")
        digests.append(served.split()[-1])
        assert run("generate", "a=", "--adapter", f"pushed@{digests[-1]}", "--address", address).exit_code == 0
    assert digests[0] != digests[1]
    run("adapters", "unload", "pushed", "--address", address)


@pytest.mark.parametrize("reason", ["outside", "nobody"])
def test_a_push_that_is_refused_leaves_the_adapter(
    run: Run, address: str, base: Path, prompts: Path, tmp_path: Path, reason: str
) -> None:
    server = address if reason == "outside" else f"127.0.0.1:{free_port()}"
    folder = tmp_path / "made"
    ran = run("train", "--model", str(base), "--data", str(prompts), "--output", str(folder), *QUICK, "--push", server)
    assert ran.exit_code == 1
    assert ran.error_line.startswith(f"{server} did not take it: ")
    assert ran.error_line.endswith(f"The adapter is in {folder}")
    assert ("source-root" if reason == "outside" else "no server answers") in ran.error_line
    assert (folder / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("key", [("--api-key", "secret"), ("--api-key=secret",)])
def test_the_card_has_the_command_without_the_key(
    base: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: tuple[str, ...]
) -> None:
    folder = tmp_path / "made"
    options = ("--model", str(base), "--data", str(prompts), "--output", str(folder), *QUICK, *key)
    monkeypatch.setattr("sys.argv", ["weft", "train", *options])
    assert main(["train", *options]) == 0
    card = (folder / "README.md").read_text()
    assert f"    weft train --model {base} --data {prompts} --output {folder} --max-steps 1 --rank 2 " in card
    assert "secret" not in card


def test_columns_and_labels_are_options(run: Run, base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_text("body,kind\nall is well,b\nall is lost,a\n")
    options = ("--text-column", "body", "--label-column", "kind", "--labels", "b,a", "--template", "{text}?")
    ran = run("train", "--model", str(base), "--data", str(data), "--output", str(tmp_path / "made"), *options, *QUICK)
    assert ran.exit_code == 0
    assert "- Labels: b, a.\n" in (tmp_path / "made" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        (("--output", "DIR"), 2, "which is there already: name a new folder"),
        (("--data", "nowhere.jsonl"), 1, "nowhere.jsonl can't be read: No such file or directory"),
        (("--model", "DIR/nowhere"), 1, "nowhere has no tokenizer that loads"),
        (("--layers", "0-99999999999"), 2, "--layers is '0-99999999999'; must be layers"),
        (("--layers", "3-1"), 2, "--layers is '3-1'; must be layers and ranges of them, such as 0-3,5"),
        (("--method", "distill"), 2, "--method distill needs a teacher, and only it has one"),
        (("--teacher-prompt", "@nowhere"), 2, "--teacher-prompt @nowhere can't be read"),
        (("--prompt-column", "question"), 1, "prompts.jsonl:1: has the columns prompt, completion; needs question and"),
        (("--max-length", "4"), 1, "prompts.jsonl:1: has "),
    ],
)
def test_what_is_wrong_is_one_line(
    run: Run, base: Path, prompts: Path, tmp_path: Path, options: tuple[str, ...], exit_code: int, message: str
) -> None:
    given = {"--model": str(base), "--data": str(prompts), "--output": str(tmp_path / "made")}
    given |= {options[0]: options[1].replace("DIR", str(tmp_path))}
    ran = run("train", *(word for option in given.items() for word in option), *QUICK)
    assert ran.exit_code == exit_code
    assert message in ran.error_line
    assert not (tmp_path / "made").exists()


def test_without_its_extra_it_says_what_to_install(base: Path, prompts: Path, tmp_path: Path) -> None:
    script = f"import sys; sys.modules['peft'] = None\n{SCRIPT}"
    options = ("--model", str(base), "--data", str(prompts), "--output", str(tmp_path / "made"))
    ran = shell("train", *options, script=script)
    assert ran.exit_code == 1
    assert ran.error_line == "weft train needs peft: pip install 'weft[train]'"
