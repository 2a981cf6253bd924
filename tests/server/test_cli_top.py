"""`weft top` against a real server: numbers, screens, and a terminal that is given back."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import grpc
import pytest
from commands import SCRIPT, Run, free_port
from web import serving

from weft.server.app import Server
from weft.server.cli.scraping import Interval, Scrape
from weft.v1 import inference_pb2, inference_pb2_grpc

ENTERED, LEFT, SHOWN = b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[?25h"
"""The terminal's other screen, back from it, and the cursor."""


def options(server: Server, *more: str) -> list[str]:
    return ["top", "--address", server.address, "--metrics", server.metrics_address, "--interval", "0.1", *more]


def ask(server: Server, adapter: str) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        stopping = {"max_tokens": 4, "ignore_eos": True}
        stub.Generate(inference_pb2.GenerateRequest(text="hello", adapter_id=adapter, stopping=stopping))


def counted(at_s: float, **samples: float | Mapping[str, float]) -> Scrape:
    """Samples by name, or by name and the value of the label `le` or `adapter`."""
    found = {}
    for name, value in samples.items():
        label = "le" if name.endswith("_bucket") else "adapter"
        for key, number in value.items() if isinstance(value, Mapping) else [("", value)]:
            found[name, ((label, key),) if key else ()] = float(number)
    return Scrape(at_s, found)


class TestNumbers:
    def test_rates_are_a_second_and_what_began_anew_counts_from_nothing(self) -> None:
        before = counted(10.0, tokens={"one": 100, "two": 50})
        after = counted(12.0, tokens={"one": 140, "two": 6, "three": 4})
        interval = Interval(before, after)
        assert interval.rates("tokens", "adapter") == {"one": 20, "two": 3, "three": 2}
        assert interval.rate("tokens") == 25

    def test_a_share_of_nothing_is_none(self) -> None:
        interval = Interval(counted(0.0, hits=5, queries=10), counted(1.0, hits=5, queries=10))
        assert interval.share("hits", "queries") is None
        assert Interval(counted(0.0), counted(1.0, hits=5, queries=20)).share("hits", "queries") == 0.25

    def test_quantiles_are_those_of_the_interval_alone(self) -> None:
        before = counted(0.0, ttft_bucket={"0.1": 1000, "1.0": 1000, "+Inf": 1000})
        after = counted(1.0, ttft_bucket={"0.1": 1000, "1.0": 1010, "+Inf": 1010})
        interval = Interval(before, after)
        assert interval.quantile("ttft", 0.5) == pytest.approx(0.55)
        assert interval.quantile("ttft", 0.95) == pytest.approx(0.955)

    def test_a_quantile_past_the_last_bound_is_that_bound_and_of_nothing_is_none(self) -> None:
        interval = Interval(counted(0.0), counted(1.0, ttft_bucket={"0.1": 0, "+Inf": 4}))
        assert interval.quantile("ttft", 0.5) == 0.1
        assert interval.quantile("other", 0.5) is None
        assert Interval(interval.after, interval.after).quantile("ttft", 0.5) is None


class TestFrames:
    def test_once_prints_one_screen(self, server: Server, run: Run) -> None:
        ran = run(*options(server, "--once"))
        assert (ran.exit_code, ran.error) == (0, "")
        for words in (server.address, "running", "0 of 8", "first token", "KV blocks", "device 2, failed 1", "tier"):
            assert words in ran.output
        assert "\x1b" not in ran.output

    def test_as_json_it_is_one_line_with_all_numbers(self, server: Server, run: Run) -> None:
        ask(server, "one")
        ran = run(*options(server, "--once", "--json"))
        assert ran.exit_code == 0
        assert ran.output.count("\n") == 1
        frame = json.loads(ran.output)
        assert frame["server"]["ready"] is True
        assert frame["requests"]["running_limit"] == 8
        assert frame["requests"]["running"] == frame["requests"]["waiting"] == 0
        assert frame["kv"] == {"used": 0, "total": 4096 // 16}
        assert frame["pages"]["used"] > 0
        assert frame["adapters"]["states"] == {"loading": 0, "disk": 0, "host": 0, "device": 2, "failed": 1}
        assert frame["latency"]["time_to_first_token_s"] == {"p50": None, "p95": None}

    def test_what_happens_in_an_interval_is_in_its_frame(self, server: Server) -> None:
        command = [sys.executable, "-c", SCRIPT, *options(server, "--json")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            json.loads(watching.stdout.readline())
            ask(server, "one")
            frames = map(json.loads, watching.stdout)
            frame = next(frame for frame in frames if frame["requests"]["ended"])
            watching.send_signal(signal.SIGINT)
        assert watching.returncode == 130
        assert set(frame["requests"]["ended"]) == {"max_tokens"}
        assert frame["latency"]["end_to_end_s"]["p50"] > 0
        (row,) = [row for row in frame["adapters"]["busy"] if row["requests"]]
        assert (row["name"], row["state"]) == ("one", "device")

    def test_ctrl_c_gives_the_terminal_back(self, server: Server) -> None:
        ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
        command = [sys.executable, "-c", SCRIPT, *options(server)]
        with subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        ) as watching:
            os.close(theirs)
            shown = read_until(ours, b"first token")
            watching.send_signal(signal.SIGINT)
            shown += read_all(ours)
        os.close(ours)
        assert watching.returncode == 130
        assert shown.index(ENTERED) < shown.index(LEFT)
        assert shown.rindex(SHOWN) > shown.rindex(b"first token")
        assert b"Traceback" not in shown


def read_until(terminal: int, text: bytes) -> bytes:
    shown = b""
    while text not in shown:
        shown += os.read(terminal, 65536)
    return shown


def read_all(terminal: int) -> bytes:
    """What is still written, to its end; Linux says that by an error."""
    shown = b""
    try:
        while more := os.read(terminal, 65536):
            shown += more
    except OSError:
        pass
    return shown


class TestErrors:
    def test_no_server_is_one_line(self, run: Run) -> None:
        port = free_port()
        ran = run("top", "--once", "--address", f"127.0.0.1:{port}")
        assert (ran.exit_code, ran.output) == (1, "")
        assert ran.error_line == f"no server answers at 127.0.0.1:{port}: start one with `weft serve`"

    def test_no_metrics_is_one_line_that_says_where_they_may_be(self, server: Server, run: Run) -> None:
        port = free_port()
        ran = run("top", "--once", "--address", server.address, "--metrics", f"127.0.0.1:{port}")
        assert ran.exit_code == 1
        assert ran.error_line == (
            f"http://127.0.0.1:{port}/metrics gives no metrics (Connection refused): "
            "start the server, or say where its metrics are with --metrics HOST:PORT"
        )

    def test_another_programs_page_is_no_metrics(self, server: Server, run: Run) -> None:
        with serving() as other:
            other.files["/metrics"] = b"up 1\n"
            ran = run("top", "--once", "--address", server.address, "--metrics", other.address)
        assert ran.exit_code == 1
        assert ran.error_line.endswith("gives metrics that are not Weft's: say where they are with --metrics")

    @pytest.mark.parametrize(
        ("option", "value", "words"),
        [
            ("--metrics", "nowhere", "--metrics is 'nowhere'; must be HOST:PORT"),
            ("--interval", "0", "0.0 is not in the range 0.1<=x<=3600"),
        ],
    )
    def test_a_value_that_is_none_is_wrong_usage(self, run: Run, option: str, value: str, words: str) -> None:
        ran = run("top", "--once", option, value)
        assert ran.exit_code == 2
        assert words in ran.error_line
