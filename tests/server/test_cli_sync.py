"""`weft sync` against a running server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import grpc
import pytest
from certificates import make_ca, make_certificate
from commands import SCRIPT, Run, free_port
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import served

from weft.server.api.access.keys import digest_of, new_key
from weft.server.config import EngineConfig, ModelConfig, ServerConfig
from weft.v1 import adapter_pb2 as pb2
from weft.v1 import adapter_pb2_grpc

OWNER = {"managed-by": "weft-sync"}


@pytest.fixture(scope="module")
def empty_config(folders: Path) -> ServerConfig:
    """Of a server without adapters, which may read those of `folders`."""
    return ServerConfig(
        model=ModelConfig(str(folders / "base"), dtype="float32", device="cpu"),
        engine=EngineConfig(max_batch_tokens=64, max_running_requests=8, kv_tokens=4096, adapter_pages=16),
        port=0,
        metrics_port=0,
        source_roots=(folders,),
    )


@pytest.fixture(scope="module")
def shared(empty_config: ServerConfig) -> Iterator[str]:
    with served(empty_config) as server:
        yield server.address


@pytest.fixture
def empty(shared: str) -> Iterator[str]:
    """The address of a server that has no adapters, whatever a test leaves there."""
    yield shared
    with grpc.insecure_channel(shared) as channel:
        stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        for name in listed(shared):
            stub.DeleteAdapter(pb2.DeleteAdapterRequest(name=name))


def listed(address: str) -> dict[str, pb2.Adapter]:
    with grpc.insecure_channel(address) as channel:
        stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        return {adapter.name: adapter for adapter in stub.ListAdapters(pb2.ListAdaptersRequest()).adapters}


def write(path: Path, entries: Sequence[Any]) -> Path:
    """As JSON, in one step, as Kubernetes does."""
    new = path.with_name("new")
    new.write_text(json.dumps({"adapters": list(entries)}))
    new.rename(path)
    return path


def entry(folders: Path, name: str, folder: str = "one", **fields: Any) -> dict[str, Any]:
    return {"name": name, "source": f"file:{folders}/adapters/{folder}", **fields}


class TestOnce:
    def test_it_creates_updates_and_deletes_until_all_is_as_declared(
        self, run: Run, empty: str, folders: Path, tmp_path: Path
    ) -> None:
        file = tmp_path / "adapters.json"
        write(file, [entry(folders, "a"), entry(folders, "b", labels={"k": "v"}), entry(folders, "c")])
        ran = run("sync", str(file), "--address", empty)
        assert (ran.exit_code, ran.error) == (0, "")
        assert sorted(ran.output.splitlines()) == [
            f"created {name} from file:{folders}/adapters/one" for name in ("a", "b", "c")
        ]
        assert dict(listed(empty)["b"].labels) == {"k": "v", **OWNER}

        write(file, [entry(folders, "a", "two", pinned=True), entry(folders, "b"), entry(folders, "d")])
        ran = run("sync", str(file), "--address", empty)
        assert (ran.exit_code, ran.error) == (0, "")
        assert ran.output.splitlines()[0] == f"created d from file:{folders}/adapters/one"
        assert ran.output.splitlines()[1:] == [
            f"updated a: source file:{folders}/adapters/two, pinned",
            "updated b: labels",
            "deleted c",
        ]
        there = listed(empty)
        assert set(there) == {"a", "b", "d"}
        assert there["a"].source.endswith("/two")
        assert there["a"].pinned
        assert dict(there["b"].labels) == OWNER

        ran = run("sync", str(file), "--address", empty)
        assert (ran.exit_code, ran.output, ran.error) == (0, "", ""), "nothing is left to do"

    def test_toml_and_plain_paths(self, run: Run, empty: str, folders: Path, tmp_path: Path) -> None:
        file = tmp_path / "adapters.toml"
        file.write_text(
            f'[[adapters]]\nname = "team/a"\nsource = "{folders}/adapters/one"\nlabels = {{ team = "a" }}\n'
        )
        assert run("sync", str(file), "--address", empty).exit_code == 0
        assert listed(empty)["team/a"].source == f"file:{folders}/adapters/one"

    def test_it_deletes_only_what_it_made(self, run: Run, empty: str, folders: Path, tmp_path: Path) -> None:
        source = str(folders / "adapters" / "one")
        assert run("adapters", "load", "by-hand", source, "--address", empty).exit_code == 0
        file = write(tmp_path / "a.json", [entry(folders, "mine")])
        assert run("sync", str(file), "--managed-by", "others", "--address", empty).exit_code == 0
        ran = run("sync", str(write(tmp_path / "b.json", [])), "--address", empty)
        assert (ran.exit_code, ran.output) == (0, "")
        assert set(listed(empty)) == {"by-hand", "mine"}
        write(file, [])
        assert run("sync", str(file), "--managed-by", "others", "--no-prune", "--address", empty).output == ""
        assert run("sync", str(file), "--managed-by", "others", "--address", empty).output == "deleted mine\n"
        assert set(listed(empty)) == {"by-hand"}

    def test_what_was_loaded_by_hand_is_taken_over_when_it_is_declared(
        self, run: Run, empty: str, folders: Path, tmp_path: Path
    ) -> None:
        run("adapters", "load", "a", str(folders / "adapters" / "one"), "--address", empty)
        file = write(tmp_path / "a.json", [entry(folders, "a")])
        assert run("sync", str(file), "--address", empty).output == "updated a: labels\n"
        assert run("sync", str(write(file, [])), "--address", empty).output == "deleted a\n"

    def test_a_dry_run_prints_the_plan(self, run: Run, empty: str, folders: Path, tmp_path: Path) -> None:
        file = write(tmp_path / "a.json", [entry(folders, "a")])
        ran = run("sync", str(file), "--dry-run", "--address", empty)
        assert (ran.exit_code, ran.output) == (0, f"would create a from file:{folders}/adapters/one\n")
        assert listed(empty) == {}

    def test_one_that_cannot_be_served_costs_a_line_and_no_other(
        self, run: Run, empty: str, folders: Path, tmp_path: Path
    ) -> None:
        file = write(tmp_path / "a.json", [entry(folders, "bad", "broken"), entry(folders, "good")])
        ran = run("sync", str(file), "--address", empty)
        assert ran.exit_code == 1
        assert ran.error_line == ("bad was not created: FAILED_PRECONDITION: adapter_model.safetensors: is missing")
        assert set(listed(empty)) == {"good"}

    def test_one_that_failed_is_tried_again(self, run: Run, empty: str, folders: Path, tmp_path: Path) -> None:
        broken = str(folders / "adapters" / "broken")
        run("adapters", "load", "a", broken, "--no-wait", "--label", "managed-by=weft-sync", "--address", empty)
        run("adapters", "load", "b", broken, "--no-wait", "--address", empty)
        with grpc.insecure_channel(empty) as channel:
            stub: Any = adapter_pb2_grpc.AdapterServiceStub(channel)
            for event in stub.WatchAdapters(pb2.WatchAdaptersRequest(name_prefix="a")):
                if event.adapter.state == pb2.ADAPTER_STATE_FAILED:
                    break
        file = write(tmp_path / "a.json", [entry(folders, "a", "broken"), entry(folders, "b")])
        ran = run("sync", str(file), "--address", empty)
        assert ran.exit_code == 1
        assert ran.error_line.startswith("a was not updated: FAILED_PRECONDITION")
        assert listed(empty)["b"].error == ""

    def test_no_server_says_so(self, run: Run, folders: Path, tmp_path: Path) -> None:
        ran = run("sync", str(write(tmp_path / "a.json", [])), "--address", f"127.0.0.1:{free_port()}")
        assert ran.exit_code == 1
        assert "start one with `weft serve`" in ran.error_line

    def test_options_that_contradict(self, run: Run, tmp_path: Path) -> None:
        ran = run("sync", str(write(tmp_path / "a.json", [])), "--dry-run", "--watch")
        assert (ran.exit_code, ran.error_line) == (2, "--dry-run and --watch contradict each other; choose one")


BAD_FILES = [
    ("a.toml", "adapters = [", "can't be read as TOML ("),
    ("a.json", "[", "can't be read as JSON ("),
    ("a.json", "[]", "has no list 'adapters'; an empty one is written adapters = []"),
    ("a.toml", "adapters = 1", "has no list 'adapters'"),
    ("a.toml", "adapters = []\nadapter = 1", "'adapter' is no key; there is 'adapters' alone"),
]
BAD_ENTRIES = [
    ("x", "is 'x'; must be a table"),
    ({"name": "z"}, "has no 'source'"),
    ({"source": "file:/x"}, "has no 'name'"),
    ({"name": "z", "source": 1}, "'source' is 1; must be a text"),
    ({"name": "a b", "source": "file:/x"}, "'name' is 'a b'; must be 1 to 128 letters"),
    ({"name": "z", "source": "file:/x", "pin": True}, "'pin' is no key; did you mean 'pinned'?"),
    ({"name": "z", "source": "file:/x", "pinned": "yes"}, "'pinned' is 'yes'; must be true or false"),
    ({"name": "z", "source": "file:/x", "labels": {"k": 1}}, "'labels' is {'k': 1}; must be texts by key"),
    (
        {"name": "z", "source": "file:/x", "labels": {"managed-by": "me"}},
        "'labels' holds 'managed-by', which is set by",
    ),
    ({"name": "good", "source": "file:/x"}, "'good' is declared before: give each name once"),
]


class TestBadInput:
    @pytest.mark.parametrize(("name", "text", "said"), BAD_FILES)
    def test_a_file_that_is_none_changes_nothing(
        self, run: Run, empty: str, tmp_path: Path, name: str, text: str, said: str
    ) -> None:
        (tmp_path / name).write_text(text)
        ran = run("sync", str(tmp_path / name), "--address", empty)
        assert ran.exit_code == 2
        assert ran.error_line.startswith(str(tmp_path / name))
        assert said in ran.error_line

    def test_a_file_that_is_missing(self, run: Run, empty: str, tmp_path: Path) -> None:
        ran = run("sync", str(tmp_path / "none.toml"), "--address", empty)
        assert ran.exit_code == 2
        assert "none.toml can't be read as TOML (No such file or directory)" in ran.error_line

    @pytest.mark.parametrize(("bad", "said"), BAD_ENTRIES)
    def test_a_bad_entry_is_named_and_stops_no_other(
        self, run: Run, empty: str, folders: Path, tmp_path: Path, bad: Any, said: str
    ) -> None:
        file = write(tmp_path / "a.json", [entry(folders, "good"), bad])
        ran = run("sync", str(file), "--no-prune", "--address", empty)
        assert ran.exit_code == 1
        assert f"{file}: adapters[1]: {said}" in ran.error_line
        assert set(listed(empty)) == {"good"}

    def test_an_adapter_whose_entry_is_spoilt_is_not_deleted(
        self, run: Run, empty: str, folders: Path, tmp_path: Path
    ) -> None:
        file = write(tmp_path / "a.json", [entry(folders, "a"), entry(folders, "b")])
        assert run("sync", str(file), "--address", empty).exit_code == 0
        ran = run("sync", str(write(file, [entry(folders, "a", pin=True)])), "--address", empty)
        assert (ran.exit_code, ran.output) == (1, "deleted b\n")
        nameless = entry(folders, "a")
        del nameless["name"]
        ran = run("sync", str(write(file, [nameless])), "--address", empty)
        assert (ran.exit_code, ran.output) == (1, "")
        assert "nothing is deleted while an entry's name can't be read" in ran.error
        assert set(listed(empty)) == {"a"}


class Watching:
    """`weft sync --watch` in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self.process = process
        self.said: IO[str] = process.stdout
        self.problems: IO[str] = process.stderr

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait()


@contextmanager
def watching(file: Path, address: str, *options: str) -> Iterator[Watching]:
    """Looks again only when it is told that something changed."""
    command = [sys.executable, "-c", SCRIPT, "sync", str(file), "--watch", "--interval", "3600", *options]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, "--address", address], text=True, env=environment, **pipes) as process:
        try:
            yield Watching(process)
        finally:
            process.kill()


class TestWatch:
    def test_it_follows_a_config_map(self, empty: str, folders: Path, tmp_path: Path) -> None:
        """As the kubelet lays it out: a link to a file beyond a link, of which only the latter is replaced."""

        def publish(version: str, *entries: Any) -> None:
            (tmp_path / version).mkdir()
            write(tmp_path / version / "adapters.json", entries)
            (tmp_path / "..data_tmp").symlink_to(version)
            (tmp_path / "..data_tmp").rename(tmp_path / "..data")

        publish("..1", entry(folders, "a"))
        (tmp_path / "adapters.json").symlink_to("..data/adapters.json")
        ready = tmp_path / "ready"
        with watching(tmp_path / "adapters.json", empty, "--ready-file", str(ready)) as sync:
            assert next(sync.said) == f"created a from file:{folders}/adapters/one\n"
            publish("..2", entry(folders, "a"), entry(folders, "b"))
            assert next(sync.said).startswith("created b ")
            assert ready.exists(), "since the first list was gone through"
            publish("..3", entry(folders, "b"), {"name": "c"})
            assert next(sync.said) == "deleted a\n"
            assert "adapters[1]: has no 'source'" in next(sync.problems)
            assert sync.end() == 0
        assert set(listed(empty)) == {"b"}

    def test_what_is_taken_away_comes_back(self, run: Run, empty: str, folders: Path, tmp_path: Path) -> None:
        with watching(write(tmp_path / "a.json", [entry(folders, "a")]), empty) as sync:
            assert next(sync.said).startswith("created a ")
            assert run("adapters", "unload", "a", "--address", empty).exit_code == 0
            assert next(sync.said).startswith("created a ")

    def test_a_server_that_restarts_gets_its_adapters_again(
        self, empty_config: ServerConfig, folders: Path, tmp_path: Path
    ) -> None:
        port = free_port()
        config = replace(empty_config, port=port)
        with watching(write(tmp_path / "a.json", [entry(folders, "a")]), f"127.0.0.1:{port}") as sync:
            assert next(sync.problems).startswith("weft: no server answers at ")
            for _ in range(2):
                with served(config):
                    assert next(sync.said).startswith("created a ")

    def test_a_file_that_is_spoilt_for_a_while_changes_nothing(self, empty: str, folders: Path, tmp_path: Path) -> None:
        file = write(tmp_path / "a.json", [entry(folders, "a")])
        with watching(file, empty) as sync:
            assert next(sync.said).startswith("created a ")
            file.write_text("{")
            assert "can't be read as JSON" in next(sync.problems)
            write(file, [entry(folders, "a"), entry(folders, "b")])
            assert next(sync.said).startswith("created b ")
        assert set(listed(empty)) == {"a", "b"}


class TestAccess:
    """Over TLS, with a key, as the sidecar does it."""

    @pytest.fixture
    def guarded(self, empty_config: ServerConfig, tmp_path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Address, and the options that get in."""
        ca = make_ca()
        (tmp_path / "ca.crt").write_bytes(ca.certificate_pem)
        cert, key = make_certificate(ca, "weft", "localhost").write(tmp_path, "tls")
        secret = new_key()
        (tmp_path / "key").write_text(secret)
        (tmp_path / "access.toml").write_text(
            f'[callers.sync]\nroles = ["admin"]\nkey_sha256 = ["{digest_of(secret)}"]\n'
        )
        config = replace(empty_config, tls_cert=cert, tls_key=key, access=tmp_path / "access.toml", health_port=0)
        with served(config) as server:
            address = f"localhost:{server.address.rpartition(':')[2]}"
            yield address, ("--tls", "--tls-ca", str(tmp_path / "ca.crt"), "--api-key-file", str(tmp_path / "key"))
            with grpc.insecure_channel(server.health_address) as channel:
                stub: Any = health_pb2_grpc.HealthStub(channel)
                assert stub.Check(health_pb2.HealthCheckRequest(service="readiness")).status == 1, "probes stay plain"

    def test_the_sidecar_gets_in_with_its_files(
        self, run: Run, guarded: tuple[str, tuple[str, ...]], folders: Path, tmp_path: Path
    ) -> None:
        address, options = guarded
        file = write(tmp_path / "a.json", [entry(folders, "a")])
        ran = run("sync", str(file), "--address", address, *options)
        assert (ran.exit_code, ran.error) == (0, "")
        assert ran.output.startswith("created a ")
        assert run("health", "--address", address, *options[:3]).output == "serving\n"

    def test_a_key_that_is_replaced_is_taken_from_its_file_again(
        self, guarded: tuple[str, tuple[str, ...]], folders: Path, tmp_path: Path
    ) -> None:
        address, options = guarded
        good = (tmp_path / "key").read_text()
        (tmp_path / "key").write_text(new_key())
        with watching(write(tmp_path / "a.json", [entry(folders, "a")]), address, *options) as sync:
            assert next(sync.problems).startswith("weft: UNAUTHENTICATED: ")
            (tmp_path / "key").write_text("")
            (tmp_path / "key").write_text(good)
            assert next(sync.said).startswith("created a ")

    def test_an_authority_that_is_replaced_is_read_again(
        self, guarded: tuple[str, tuple[str, ...]], folders: Path, tmp_path: Path
    ) -> None:
        address, options = guarded
        good = (tmp_path / "ca.crt").read_bytes()
        (tmp_path / "ca.crt").write_bytes(make_ca("another").certificate_pem)
        with watching(write(tmp_path / "a.json", [entry(folders, "a")]), address, *options) as sync:
            assert "is not trusted: give who signed it with --tls-ca" in next(sync.problems)
            (tmp_path / "ca.crt").write_bytes(b"")
            (tmp_path / "ca.crt").write_bytes(good)
            assert next(sync.said).startswith("created a ")
            assert sync.end() == 0
