"""Faults of the machine, brought about for real on a `weft serve` process: it says what is wrong, goes on, or ends."""

from __future__ import annotations

import re
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import disks
import grpc
import pytest
from commands import SCRIPT, free_port
from disks import FILLER, fill, needs_a_disk, on_disk, seen_by
from google.rpc import error_details_pb2 as details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from house import refusal, refusal_of
from web import Held, serving

from weft.v1 import adapter_pb2, adapter_pb2_grpc, inference_pb2, inference_pb2_grpc

pytestmark = pytest.mark.slow

LOSES_ITS_ENGINE = """
from weft.server.engine.engine import Engine
step, left = Engine.step, [20]
def failing(self):
    left[0] -= 1
    if left[0] < 0:
        raise MemoryError("no more of it")
    return step(self)
Engine.step = failing
"""
"""Run first by a server: its twentieth step fails where no request is to blame."""


HAS_NO_THREADS = """
import pathlib, threading
start = threading.Thread.start
def failing(self):
    if self.name.startswith("weft-") and pathlib.Path(PATH).exists():
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = failing
"""
"""Likewise: while there is a file PATH, no thread of its own can be started, as where memory is exhausted."""


@dataclass
class Process:
    """A server, read up to the line that says where it serves."""

    popen: subprocess.Popen[str]
    address: str
    log: list[str]

    def end(self) -> tuple[int, list[str]]:
        """Its exit code and all that it said."""
        assert self.popen.stderr is not None
        self.log += self.popen.stderr.readlines()
        return self.popen.wait(60), self.log


def command(folders: Path, *options: str, script: str = SCRIPT) -> list[str]:
    base = ["serve", "--model", str(folders / "base"), "--threads", "1", "--kv-tokens", "4096", "--port", "0"]
    return [sys.executable, "-c", script, *base, "--metrics-port", "0", *options]


@contextmanager
def process(args: Sequence[str]) -> Iterator[Process]:
    with subprocess.Popen(args, stderr=subprocess.PIPE, text=True) as popen:
        try:
            log: list[str] = []
            assert popen.stderr is not None
            for line in popen.stderr:
                log.append(line)
                if found := re.search(r"gRPC on (\S+),", line):
                    yield Process(popen, found[1], log)
                    return
            raise AssertionError(f"it did not start: {log}")
        finally:
            popen.kill()


def inference(channel: grpc.Channel) -> Any:
    return inference_pb2_grpc.InferenceServiceStub(channel)


def adapters(channel: grpc.Channel) -> Any:
    return adapter_pb2_grpc.AdapterServiceStub(channel)


def answer(channel: grpc.Channel, adapter_id: str = "") -> list[int]:
    request = inference_pb2.GenerateRequest(
        adapter_id=adapter_id, token_ids={"ids": [5, 6, 7]}, stopping={"max_tokens": 8, "ignore_eos": True}
    )
    return [token.id for token in inference(channel).Generate(request, timeout=60).tokens]


def create(name: str, source: str) -> adapter_pb2.CreateAdapterRequest:
    return adapter_pb2.CreateAdapterRequest(adapter={"name": name, "source": source}, wait=True)


def pinned(name: str) -> adapter_pb2.Adapter:
    return adapter_pb2.Adapter(name=name, pinned=True)


@needs_a_disk
class TestFullDisk:
    def test_at_the_start_the_state_names_it_in_one_line(self, folders: Path, tmp_path: Path) -> None:
        state = tmp_path / "state.db"
        args = command(folders, "--state", str(state), "--log-level", "error")
        script = "from pathlib import Path; from disks import fill; fill(Path(sys.argv.pop(1)))"
        support = str(Path(disks.__file__).parent)
        args[2:3] = [f"import sys; sys.path.append({support!r}); {script}; {SCRIPT}", str(tmp_path)]
        ran = subprocess.run(on_disk(tmp_path, 64, args), check=False, capture_output=True, text=True)
        words = f"weft: --state is {str(state)!r}, whose disk is full: free some of it, or name a file elsewhere\n"
        assert (ran.returncode, ran.stderr) == (2, words)

    def test_later_it_fails_what_needs_it_and_nothing_else(self, folders: Path, tmp_path: Path) -> None:
        source = folders / "adapters" / "one"
        with serving() as web, ExitStack() as stack:
            web.hold(source, "/one")
            options = ["--state", str(tmp_path / "state.db"), "--cache", str(tmp_path / "cache")]
            roots = ["--source-root", str(source.parent), "--source-root", f"{web.url}/"]
            args = on_disk(tmp_path, 1024, command(folders, *options, *roots))
            server = stack.enter_context(process(args))
            channel = stack.enter_context(grpc.insecure_channel(server.address))
            before = answer(channel)
            disk = seen_by(server.popen.pid, tmp_path)
            fill(disk)
            local = refusal(lambda: adapters(channel).CreateAdapter(create("local", f"file:{source}")))
            assert (local.code, local.reason) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
            assert "state.db can't be written (database or disk is full)" in local.message
            assert "would not survive a restart" in local.message
            far = refusal(lambda: adapters(channel).CreateAdapter(create("far", f"{web.url}/one")))
            assert far.code is grpc.StatusCode.UNAVAILABLE
            assert f"the download can't be kept in --cache {tmp_path}/cache (No space left on device)" in far.message
            assert answer(channel) == before
            assert answer(channel, "local") != before, "it was created all the same, as it says"
            (disk / FILLER).unlink()
            adapters(channel).CreateAdapter(create("far", f"{web.url}/one"))
            assert answer(channel, "far") == answer(channel, "local")


def test_a_log_that_can_not_be_written_stops_nobody(folders: Path) -> None:
    port = free_port()
    args = [word if word != "0" else str(port) for word in command(folders)]
    args[args.index("--metrics-port") + 1] = "0"
    with Path("/dev/full").open("w") as full, subprocess.Popen(args, stderr=full) as popen:
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                watch: Any = health_pb2_grpc.HealthStub(channel).Watch(
                    health_pb2.HealthCheckRequest(), wait_for_ready=True
                )
                while next(watch).status != health_pb2.HealthCheckResponse.SERVING:
                    pass
                assert len(answer(channel)) == 8
                popen.terminate()
            assert popen.wait(60) == 0
        finally:
            popen.kill()


def test_a_lost_engine_answers_everybody_and_ends_the_process(folders: Path) -> None:
    with process(command(folders, script=LOSES_ITS_ENGINE + SCRIPT)) as server:
        with grpc.insecure_channel(server.address) as channel:
            request = inference_pb2.StreamGenerateRequest(
                text="hello", stopping={"max_tokens": 200, "ignore_eos": True}
            )
            calls = [inference(channel).StreamGenerate(request, timeout=60) for _ in range(5)]
            for call in calls:
                with pytest.raises(grpc.RpcError) as raised:
                    list(call)
                lost = refusal_of(raised.value)
                assert (lost.code, lost.message) == (grpc.StatusCode.UNAVAILABLE, "the engine stopped unexpectedly")
                assert lost.detail(details_pb2.RetryInfo).retry_delay.ToNanoseconds() > 0
        exit_code, log = server.end()
    assert exit_code == 1
    assert log[-1] == "weft: the engine stopped unexpectedly; the log says how\n"
    assert sum("the engine thread died" in line for line in log) == 1
    assert sum(line == "MemoryError: no more of it\n" for line in log) == 1


def test_a_lost_engine_ends_the_process_though_a_source_hangs(folders: Path) -> None:
    with serving() as web, ExitStack() as stack:
        held = web.held["/one/adapter_config.json"] = Held()
        stack.callback(held.set)
        options = ("--source-root", f"{web.url}/", "--drain-grace-seconds", "0.1")
        args = command(folders, *options, script=LOSES_ITS_ENGINE + SCRIPT)
        with process(args) as server, grpc.insecure_channel(server.address) as channel:
            loading = adapters(channel).CreateAdapter.future(create("far", f"{web.url}/one"))
            assert held.reached.wait(60)
            lost = refusal(lambda: [answer(channel) for _ in range(20)])
            assert lost.message == "the engine stopped unexpectedly"
            server.popen.wait(30)
            exit_code, log = server.end()
            loading.cancel()
    assert exit_code == 1
    assert "the engine stopped unexpectedly; the log says how" in log[-1]


def test_without_memory_for_threads_adapters_wait_and_the_engine_goes_on(folders: Path, tmp_path: Path) -> None:
    """A thread's stack is the first that finds no room: it takes 8 MiB of addresses at once."""
    exhausted, source = tmp_path / "exhausted", f"file:{folders / 'adapters' / 'one'}"
    names = ("--adapters", str(folders / "adapters"), "--no-watch")
    tight = ("--adapter-pages", "1", "--adapter-host-bytes", "0")
    args = command(folders, *names, *tight, script=HAS_NO_THREADS.replace("PATH", repr(str(exhausted))) + SCRIPT)
    with process(args) as server, grpc.insecure_channel(server.address) as channel:
        before = {name: answer(channel, name) for name in ("", "two", "one")}
        exhausted.touch()
        refused = refusal(lambda: answer(channel, "two"))
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
        assert "the system gives no more threads or memory" in refused.message
        adapters(channel).CreateAdapter(create("new", source))  # by threads that are there from the start
        assert answer(channel) == before[""]
        exhausted.unlink()
        assert {name: answer(channel, name) for name in before} == before
        assert answer(channel, "new") == before["one"]
        server.popen.terminate()
        exit_code, log = server.end()
    assert exit_code == 0
    assert not any(line.startswith("Traceback") for line in log)


def test_without_files_left_those_who_are_connected_go_on_and_others_wait_until_there_are(folders: Path) -> None:
    with process(command(folders)) as server, grpc.insecure_channel(server.address) as channel:
        before = answer(channel)
        pid = server.popen.pid
        num_files = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE, (num_files + 8, num_files + 8))
        assert limits[0] == limits[1], "it allows itself as many as it can"
        host, _, port = server.address.rpartition(":")
        with ExitStack() as stack:
            for _ in range(64):
                stack.enter_context(socket.create_connection((host, int(port))))
            assert [answer(channel) for _ in range(3)] == [before] * 3
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(server.address, options) as other:
            grpc.channel_ready_future(other).result(60)
            assert answer(other) == before
        assert server.popen.poll() is None
