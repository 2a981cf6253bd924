"""How every command that talks to a server finds it, trusts it, and says who it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import make_ca, make_certificate
from commands import Ran, Run, free_port, shell
from guarded import Guarded, guarded

ASK = ("generate", "x", "--max-tokens", "1")


def last_line(ran: Ran) -> str:
    """Before it, gRPC's C library may log a failed handshake, here where it was imported before the commands."""
    return ran.error.splitlines()[-1]


def test_a_command_of_its_own_prints_its_line_alone(address: str) -> None:
    ran = shell("generate", "x", "--address", address, "--tls")
    assert ran.error_line == f"the server at {address} does not talk TLS: leave --tls and its files out"


@pytest.fixture(scope="module")
def guard(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with guarded(folders, tmp_path_factory.mktemp("guarded"), ("one",)) as guard:
        yield guard


@pytest.fixture
def place(guard: Guarded, tmp_path: Path) -> list[str]:
    """Options that say where the server is, whom to trust, and a certificate that names nobody."""
    ca, _ = guard.ca.write(tmp_path, "trusted")
    cert, key = make_certificate(guard.ca, "stranger").write(tmp_path, "client")
    return [
        *("--address", guard.server.address, "--tls-ca", str(ca)),
        *("--tls-cert", str(cert), "--tls-key", str(key)),
    ]


def test_a_key_may_be_given_in_three_ways(
    guard: Guarded, place: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, file = guard.keys["boss"], tmp_path / "key"
    file.write_text(key + "\n")
    assert run(*ASK, *place, "--api-key", key).exit_code == 0
    assert run(*ASK, *place, "--api-key-file", str(file)).exit_code == 0
    monkeypatch.setenv("WEFT_API_KEY", key)
    assert run(*ASK, *place).exit_code == 0
    assert run(*ASK, *place, "--stream").exit_code == 0


def test_every_command_that_talks_to_a_server_takes_them(
    guard: Guarded, place: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEFT_API_KEY", guard.keys["boss"])
    one = f"file:{guard.adapters / 'one'}"
    for command in (
        ["adapters", "list"],
        ["adapters", "show", "team-a/one"],
        ["adapters", "check", one],
        ["adapters", "load", "new", one],
        ["adapters", "pin", "new"],
        ["adapters", "unload", "new"],
        ["adapters", "plan"],
    ):
        assert run(*command, *place).exit_code == 0, command
    output = tmp_path / "bench.json"
    few = ("--requests", "2", "--prompt-tokens", "4", "--new-tokens", "2", "--output", str(output))
    assert run("bench", "popularity", "identical", *place, *few).exit_code == 0
    assert json.loads(output.read_text())["runs"][0]["summary"]["outcomes"] == {"OK": 2}


def test_a_refusal_is_one_line(guard: Guarded, place: list[str], run: Run) -> None:
    ran = run(*ASK, *place, "--api-key", "weft_wrong")
    assert ran.exit_code == 1
    assert ran.error_line == "UNAUTHENTICATED: the key is not known here"
    ran = run(*ASK, *place, "--api-key", guard.keys["reader"])
    assert ran.error_line.startswith("PERMISSION_DENIED: caller 'reader' does not have the role 'infer'")


def test_a_server_that_is_not_trusted_is_named_with_the_remedy(guard: Guarded, run: Run, tmp_path: Path) -> None:
    at = ("--address", guard.server.address)
    other, _ = make_ca("other").write(tmp_path, "other")
    ca, _ = guard.ca.write(tmp_path, "trusted")
    untrusted = run(*ASK, *at, "--tls-ca", str(other))
    assert f"the certificate of {guard.server.address} is not trusted: give who signed it with --tls-ca" in (
        last_line(untrusted)
    )
    without = run(*ASK, *at)
    assert last_line(without).endswith("or, if it takes TLS alone, add --tls")
    unknown = run(*ASK, *at, "--tls-ca", str(ca))
    assert "give one that it trusts with --tls-cert" in last_line(unknown)
    named = run(*ASK, "--address", guard.server.address.replace("127.0.0.1", "localhost"), "--tls-ca", str(ca))
    assert "is for another name: use one that it names in --address" in last_line(named)


def test_a_server_without_tls_is_named_with_the_remedy(address: str, run: Run) -> None:
    ran = run(*ASK, "--address", address, "--tls")
    assert last_line(ran) == f"weft: the server at {address} does not talk TLS: leave --tls and its files out"


def test_a_key_that_nobody_asks_for_does_no_harm(address: str, run: Run) -> None:
    assert run(*ASK, "--address", address, "--api-key", "anything").exit_code == 0


def test_no_server_with_tls_is_no_server(run: Run) -> None:
    ran = run(*ASK, "--address", f"127.0.0.1:{free_port()}", "--tls")
    assert "no server answers at" in ran.error_line


def test_a_key_on_an_open_line_is_warned_of(run: Run) -> None:
    ran = run(*ASK, "--address", "no.such.host.invalid:1", "--api-key", "weft_secret", "--timeout", "0.001")
    first, _, rest = ran.error.partition("\n")
    assert first == "weft: the API key goes to no.such.host.invalid:1 unencrypted: add --tls"
    assert "weft_secret" not in rest


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tls-cert", "{pem}"], "--tls-cert is given without --tls-key"),
        (["--tls-key", "{pem}"], "--tls-key is given without --tls-cert"),
        (["--tls-ca", "{none}"], "--tls-ca {none} can't be read: No such file"),
        (["--tls-ca", "{text}"], "--tls-ca {text} holds no certificate in PEM"),
        (["--tls-cert", "{pem}", "--tls-key", "{pem}"], "--tls-key {pem} holds no private key in PEM"),
        (["--api-key", "two words"], "--api-key (WEFT_API_KEY) holds no key"),
        (["--api-key", "a" * 7500], "--api-key (WEFT_API_KEY) holds no key"),
        (["--api-key", "a", "--api-key-file", "{text}"], "--api-key (WEFT_API_KEY) and --api-key-file are both given"),
        (["--api-key-file", "{none}"], "--api-key-file {none} can't be read: No such file"),
        (["--api-key-file", "{empty}"], "--api-key-file {empty} is empty"),
        (["--api-key-file", "{pem}"], "--api-key-file {pem} holds no key"),
    ],
)
def test_each_mistake_is_named(run: Run, tmp_path: Path, options: list[str], words: str) -> None:
    paths = {name: str(tmp_path / name) for name in ("none", "text", "pem", "empty")}
    (tmp_path / "text").write_text("secret text")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "pem").write_bytes(make_ca().certificate_pem)
    ran = run(*ASK, *(option.format(**paths) for option in options))
    assert ran.exit_code == 2
    assert words.format(**paths) in ran.error_line
    assert "secret" not in ran.error_line
