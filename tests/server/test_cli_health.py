"""`weft health` against a running server."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from commands import SCRIPT, Run, free_port


@pytest.mark.parametrize("service", ["", "liveness", "readiness", "startup", "weft.v1.AdapterService"])
def test_a_server_that_serves_ends_it_with_0(run: Run, address: str, service: str) -> None:
    ran = run("health", "--service", service, "--address", address)
    assert (ran.exit_code, ran.output, ran.error) == (0, "serving\n", "")


def test_a_service_that_is_none_is_named(run: Run, address: str) -> None:
    ran = run("health", "--service", "readyness", "--address", address)
    assert ran.exit_code == 1
    assert ran.error_line.startswith("the server has no service 'readyness': ask for liveness, readiness, startup")


def test_no_server_ends_it_with_1(run: Run) -> None:
    ran = run("health", "--address", f"127.0.0.1:{free_port()}")
    assert ran.exit_code == 1
    assert "no server answers" in ran.error_line


def test_a_server_that_says_nothing_is_not_waited_for(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        ran = run("health", "--timeout", "0.2", "--address", f"127.0.0.1:{mute.getsockname()[1]}")
    assert ran.exit_code == 1
    assert "within 0.2 s" in ran.error_line


def test_the_environment_of_a_server_with_tls_does_not_make_it_talk_tls(
    run: Run, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WEFT_TLS_CERT", "WEFT_TLS_KEY"):
        monkeypatch.setenv(name, "/not/of/the/client")
    assert run("health", "--address", address).output == "serving\n"


def test_a_server_that_is_about_to_serve_is_waited_for(folders: Path) -> None:
    port = str(free_port())
    command = [sys.executable, "-c", SCRIPT]
    options = ["--model", str(folders / "base"), "--port", port, "--metrics-port", "0", "--threads", "1"]
    ask = [*command, "health", "--wait", "--timeout", "120", "--address", f"127.0.0.1:{port}"]
    with (
        subprocess.Popen(ask, stdout=subprocess.PIPE, text=True) as waiting,
        subprocess.Popen([*command, "serve", *options], stderr=subprocess.DEVNULL) as server,
    ):
        output, _ = waiting.communicate()
        server.terminate()
    assert (waiting.returncode, output) == (0, "serving\n")


def test_it_is_not_waited_for_longer_than_said(run: Run) -> None:
    ran = run("health", "--wait", "--timeout", "0.2", "--address", f"127.0.0.1:{free_port()}")
    assert ran.exit_code == 1
    assert "within 0.2 s" in ran.error_line
