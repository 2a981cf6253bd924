"""`weft generate` against a running server."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from commands import SCRIPT, Run, free_port

from weft.v1 import inference_pb2, inference_pb2_grpc


def answer(address: str, **fields: Any) -> str:
    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        return stub.Generate(inference_pb2.GenerateRequest(**fields)).text


def test_prints_the_answer(run: Run, address: str) -> None:
    expected = answer(address, text="hello", adapter_id="one", stopping={"max_tokens": 5, "ignore_eos": True})
    args = ("generate", "hello", "--address", address, "--adapter", "one", "--max-tokens", "5", "--ignore-eos")
    for more in ((), ("--stream",)):
        ran = run(*args, *more)
        assert (ran.exit_code, ran.output) == (0, expected + "\n")


def test_sampling_and_stopping_reach_the_server(run: Run, address: str) -> None:
    fields = {
        "sampling": {"temperature": 5, "top_k": 200, "seed": 3, "repetition_penalty": 1.5},
        "stopping": {"max_tokens": 8, "min_tokens": 8, "stop_sequences": ["~", "#"]},
    }
    ran = run(
        *("generate", "hello", "--address", address, "--temperature", "5", "--top-k", "200", "--seed", "3"),
        *("--repetition-penalty", "1.5", "--max-tokens", "8", "--min-tokens", "8", "--stop", "~", "--stop", "#"),
    )
    assert ran.output == answer(address, text="hello", **fields) + "\n"


def test_a_dash_reads_standard_input(run: Run, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    ran = run("generate", "-", "--address", address, "--max-tokens", "3")
    assert ran.output == answer(address, text="from a pipe", stopping={"max_tokens": 3}) + "\n"


def test_chat_sends_a_users_message(run: Run, address: str) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    ran = run("generate", "hi", "--chat", "--address", address, "--max-tokens", "3")
    assert ran.output == answer(address, chat=chat, stopping={"max_tokens": 3}) + "\n"


def test_several_answers_are_numbered(run: Run, address: str) -> None:
    args = ("generate", "hello", "--address", address, "--max-tokens", "4", "--temperature", "3")
    ran = run(*args, "--n", "2", "--seed", "8", "--priority", "5", "--cache-salt", "mine")
    texts = [
        answer(address, text="hello", sampling={"temperature": 3, "seed": seed}, stopping={"max_tokens": 4})
        for seed in (8, 9)
    ]
    assert ran.output == f"--- 1 of 2\n{texts[0]}\n--- 2 of 2\n{texts[1]}\n"


def test_several_answers_are_not_streamed(run: Run) -> None:
    ran = run("generate", "x", "--stream", "--n", "2")
    assert ran.exit_code == 2
    assert "--n asks for several" in ran.error_line


def test_an_unknown_adapter_is_named(run: Run, address: str) -> None:
    ran = run("generate", "x", "--address", address, "--adapter", "onne")
    assert ran.exit_code == 1
    assert ran.error_line == "NOT_FOUND: adapter 'onne' is not loaded: did you mean 'one'?"


def test_every_bad_field_is_named(run: Run, address: str) -> None:
    ran = run("generate", "x", "--address", address, "--temperature", "-1", "--top-p", "2")
    assert ran.exit_code == 1
    assert ran.error_line.startswith("INVALID_ARGUMENT: sampling.temperature is -1; ")
    assert "sampling.top_p is 2; " in ran.error_line


@pytest.mark.parametrize("option", ["--top-k", "--n", "--priority"])
def test_a_number_that_no_message_can_hold_is_wrong_usage(run: Run, option: str) -> None:
    ran = run("generate", "x", option, str(1 << 40))
    assert ran.exit_code == 2
    assert str(1 << 40) in ran.error_line


@pytest.mark.parametrize(
    "address", ["", "bad address", "127.0.0.1", "127.0.0.1:", ":50051", "h:0", "h:65536", "::1:50051", "\udcff:1"]
)
def test_an_address_is_host_and_port(run: Run, address: str) -> None:
    ran = run("generate", "x", "--address", address)
    assert ran.exit_code == 2
    assert f"--address is {address!r}; must be HOST:PORT" in ran.error_line


@pytest.mark.parametrize("timeout", ["nan", "inf", "1e300", "0", "-1"])
def test_a_timeout_has_a_range(run: Run, timeout: str) -> None:
    ran = run("generate", "x", "--timeout", timeout)
    assert ran.exit_code == 2
    assert "must be above 0 and at most 604800" in ran.error_line


def test_a_timeout_is_an_error(run: Run, address: str) -> None:
    ran = run("generate", "x", "--address", address, "--timeout", "0.000001")
    assert ran.exit_code == 1
    assert ran.error_line.startswith("DEADLINE_EXCEEDED")


def test_no_server_says_how_to_start_one(run: Run) -> None:
    address = f"127.0.0.1:{free_port()}"
    ran = run("generate", "x", "--address", address)
    assert ran.exit_code == 1
    assert ran.error_line == f"no server answers at {address}: start one with `weft serve`"


def test_the_address_may_come_from_the_environment(run: Run, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_ADDRESS", address)
    assert run("generate", "x", "--max-tokens", "1").exit_code == 0


def test_an_interrupt_is_quiet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        command = [sys.executable, "-c", SCRIPT, "generate", "x"]
        environment = {**os.environ, "WEFT_ADDRESS": f"127.0.0.1:{silent.getsockname()[1]}"}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            connection, _ = silent.accept()
            with connection:
                process.send_signal(signal.SIGINT)
                _, error = process.communicate()
    assert process.returncode == 130
    assert error.strip() == ""


def test_an_answer_is_held_to_a_constraint(run: Run, address: str, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["from a file"]}', encoding="utf-8")
    for options, expected in (
        (("--json-schema", '{"const": {"a": [1]}}'), '{"a":[1]}'),
        (("--json-schema", str(schema)), '"from a file"'),
        (("--regex", "ab{2}"), "abb"),
        (("--grammar", 'start: "x" "y"'), "xy"),
        (("--choice", "only this"), "only this"),
    ):
        ran = run("generate", "hello", "--address", address, *options)
        assert ran.exit_code == 0
        assert re.sub(r"\s+(?=[^a-z])", "", ran.output.rstrip("\n")) == expected


@pytest.mark.parametrize(
    ("option", "kind"), [("--json-schema", "JSON schema"), ("--grammar", "grammar")], ids=["schema", "grammar"]
)
def test_a_file_that_is_not_there_is_told_before_anything_is_sent(run: Run, option: str, kind: str) -> None:
    ran = run("generate", "x", option, "nope.json")
    assert ran.exit_code == 2
    assert f"{option} is 'nope.json', which is no file and no {kind}" in ran.error_line


def test_only_one_constraint_is_taken(run: Run, address: str) -> None:
    ran = run("generate", "x", "--address", address, "--regex", "a", "--choice", "b")
    assert ran.exit_code == 2
    assert "--regex and --choice are given; an answer can be held to one of them" in ran.error


def test_a_bad_constraint_is_one_line(run: Run, address: str) -> None:
    ran = run("generate", "x", "--address", address, "--json-schema", '{"not": {}}')
    assert ran.exit_code == 1
    assert ran.error_line == "INVALID_ARGUMENT: json_schema has the keyword 'not', which is not supported"
