"""`weft bench`: its workloads, its open loop, what it makes of what it sees, and its commands against a real server."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import numpy
import pytest
from commands import Run, free_port

from weft.server.bench import generator
from weft.server.bench.summary import LATE_S, Record, Spread, Summary, percentile, summarize
from weft.server.bench.target import CannotLoad, Target
from weft.server.bench.workload import Burst, Scheduled, Trace, fitted, prompt_ids, shares
from weft.server.cli.bench import _finite
from weft.server.cli.client import Endpoint
from weft.v1 import inference_pb2, inference_pb2_grpc

FEW = ("--prompt-tokens", "4:12", "--new-tokens", "2:6")


class TestSLora:
    @pytest.mark.parametrize("seed", [42, 7])
    def test_draws_what_its_own_generator_draws_in_the_same_order(self, seed: int) -> None:
        trace = Trace(rate=7.5, duration_s=9.0, adapters=20, alpha=0.3, cv=2.0, seed=seed)
        numpy.random.seed(seed)
        count = int(7.5 * 9.0)
        adapters = (numpy.random.power(0.3, count) * 20).astype(int)
        prompts = numpy.random.randint(8, 512, count)
        answers = numpy.random.randint(8, 512, count)
        gaps = numpy.random.gamma(1 / (2.0 * 2.0), 2.0 * 2.0 / 7.5, count)
        at_s = 0.0
        expected = []
        for gap, *drawn in zip(gaps, adapters, prompts, answers, strict=True):
            at_s += gap
            expected.append(Scheduled(at_s, *drawn))
        assert trace.schedule() == expected

    def test_a_small_alpha_is_skewed_as_published(self) -> None:
        schedule = Trace(rate=1000, duration_s=20, adapters=200, alpha=0.1).schedule()
        most = Counter(each.adapter for each in schedule).most_common(1)[0][1]
        assert most / len(schedule) == pytest.approx(200**-0.1, abs=0.02)

    def test_gaps_have_the_rate_and_the_variation_asked_for(self) -> None:
        at_s = [each.at_s for each in Trace(rate=50, duration_s=400, adapters=5, cv=4).schedule()]
        gaps = numpy.diff(at_s)
        assert gaps.mean() == pytest.approx(1 / 50, rel=0.1)
        assert gaps.std() / gaps.mean() == pytest.approx(4, rel=0.15)

    def test_lengths_are_drawn_from_the_first_to_less_than_the_second(self) -> None:
        schedule = Trace(rate=100, duration_s=20, adapters=1, prompt_tokens=(3, 5), new_tokens=(7, 8)).schedule()
        assert {each.prompt_tokens for each in schedule} == {3, 4}
        assert {each.new_tokens for each in schedule} == {7}

    def test_no_adapters_ask_the_base(self) -> None:
        assert {each.adapter for each in Trace(rate=5, duration_s=2, adapters=0).schedule()} == {None}


class TestPunica:
    @pytest.mark.parametrize(
        ("popularity", "count", "expected"),
        [
            ("identical", 16, [16]),
            ("distinct", 4, [1, 1, 1, 1]),
            ("uniform", 16, [4, 4, 4, 4]),
            ("uniform", 18, [4, 4, 4, 3, 3]),
            ("skewed", 16, [5, 4, 3, 2, 1, 1]),
            ("skewed", 1, [1]),
        ],
    )
    def test_shares(self, popularity: Any, count: int, expected: list[int]) -> None:
        assert shares(popularity, count) == expected

    @pytest.mark.parametrize("popularity", ["identical", "distinct", "uniform", "skewed"])
    def test_every_request_has_an_adapter(self, popularity: Any) -> None:
        for count in range(1, 70):
            assert sum(shares(popularity, count)) == count
            assert min(shares(popularity, count)) >= 1

    def test_all_come_at_once_in_random_order(self) -> None:
        burst = Burst("skewed", 64)
        schedule = burst.schedule()
        assert {each.at_s for each in schedule} == {0.0}
        drawn = [each.adapter for each in schedule]
        assert sorted(Counter(drawn).values(), reverse=True) == shares("skewed", 64)
        assert drawn != sorted(drawn, key=str)
        assert burst.adapters == len(set(drawn))


def test_prompts_are_the_pools_tokens_and_differ() -> None:
    draw = numpy.random.RandomState(1)
    first, second = prompt_ids((5, 9, 11), 40, draw), prompt_ids((5, 9, 11), 40, draw)
    assert set(first) == set(second) == {5, 9, 11}
    assert first != second


@pytest.mark.parametrize("context", [16, 100, 512, 1022, 5000])
def test_fitted_lengths_fit_and_keep_what_fits(context: int) -> None:
    prompt, new = fitted((8, 512), (8, 512), context)
    assert prompt[1] - 1 + new[1] - 1 <= context
    assert 1 <= prompt[0] < prompt[1]
    assert (prompt == (8, 512)) == (context >= 1022)


def record(scheduled_s: float = 0.0, first_s: float | None = 1.0, last_s: float | None = 3.0, **fields: Any) -> Record:
    given = {"sent_s": scheduled_s, "ended_s": last_s or 0.0, "prompt_tokens": 4, "new_tokens": 5, "outcome": "OK"}
    return Record("a", scheduled_s, first_token_s=first_s, last_token_s=last_s, **{**given, **fields})


class TestSummary:
    def test_latencies_count_from_the_schedule(self) -> None:
        late = record(scheduled_s=2.0, sent_s=2.5, first_s=3.0, last_s=5.0)
        assert (late.ttft_s, late.latency_s, late.tpot_s) == (1.0, 3.0, 0.5)

    def test_one_token_has_no_time_per_further_token(self) -> None:
        assert record(new_tokens=1).tpot_s is None

    def test_a_percentile_is_a_value_that_was_seen(self) -> None:
        ordered = [float(value) for value in range(1, 11)]
        assert [percentile(ordered, percent) for percent in (0, 50, 90, 99, 100)] == [1, 5, 9, 10, 10]
        assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 2.0, 3.0, 3.0, 3.0)
        assert Spread.of([]) is None

    def test_rates_are_of_what_was_answered_until_the_last_ended(self) -> None:
        failed = record(first_s=None, last_s=None, new_tokens=0, ended_s=4.0, outcome="RESOURCE_EXHAUSTED")
        summary = summarize([record(gaps_s=(0.5, 0.25)), record(first_s=7.0, last_s=8.0), failed], 2.0, 8.0)
        assert summary.outcomes == {"OK": 2, "RESOURCE_EXHAUSTED": 1}
        assert (summary.answered, summary.requests_per_s, summary.tokens_per_s) == (2, 2 / 8, 10 / 8)
        assert summary.itl == Spread(0.375, 0.25, 0.5, 0.5, 0.5)
        assert summary.generator_busy == 0.25

    def test_the_objective_is_held_against_all_that_were_offered(self) -> None:
        failed = record(first_s=None, last_s=None, outcome="UNAVAILABLE")
        on_time = [record(), record(first_s=5.99, last_s=9.0)]
        assert summarize([*on_time, record(first_s=6.0, last_s=9.0), failed], 0.0, 9.0).slo_attainment == 0.5

    def test_a_late_or_busy_generator_is_warned_of(self) -> None:
        def warned(late_s: float, busy_s: float) -> str | None:
            return summarize([record(sent_s=late_s)], busy_s, 10.0).warning

        assert warned(LATE_S, 5.0) is None
        assert "left 60 ms late" in str(warned(0.06, 5.0))
        assert "computed for 95% of the run" in str(warned(0.0, 9.5))


class Echo(inference_pb2_grpc.InferenceServiceServicer):
    """Answers when told to: each request with as many tokens as it asks for, in two messages; odd prompts fail."""

    def __init__(self) -> None:
        self.asked = 0
        self.all_asked = asyncio.Event()
        self.wanted = 0

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802 - gRPC's name
        self.asked += 1
        if self.asked == self.wanted:
            self.all_asked.set()
        await self.all_asked.wait()
        if len(request.token_ids.ids) % 2:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        token = inference_pb2.Token(id=1)
        yield inference_pb2.StreamGenerateResponse(tokens=[token] * (request.stopping.max_tokens - 1))
        yield inference_pb2.StreamGenerateResponse(tokens=[token], usage={"prompt_tokens": len(request.token_ids.ids)})


@asynccontextmanager
async def echoing(wanted: int) -> AsyncIterator[tuple[Echo, str]]:
    """An echo that answers nothing before it has been asked so often."""
    server, echo = grpc.aio.server(), Echo()
    echo.wanted = wanted
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(echo, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield echo, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def test_a_server_without_adapters_is_told_what_to_do_about_it() -> None:
    target = Target("", "", "", "", 256, 256, adapters=(), pool=(1,))
    with pytest.raises(CannotLoad, match=r"^the server has no adapters: load some with `weft adapters load`$"):
        target.choose((), None)
    with pytest.raises(CannotLoad, match=r"`weft adapters load`, or give --adapters 0$"):
        target.choose((), None, ", or give --adapters 0")


class TestOpenLoop:
    def run(self, schedule: list[Scheduled], timeout_s: float | None = None, unanswered: int = 0) -> list[Record]:
        async def run() -> list[Record]:
            async with echoing(len(schedule) + unanswered) as (_, address):
                ready = generator.prepare(schedule, ["x", "y"], (5, 6), seed=1)
                seen: list[Record] = []
                ran = await generator.run(Endpoint(address), ready, timeout_s, seen.append)
                assert sorted(map(id, seen)) == sorted(map(id, ran.records))
                assert ran.busy_s > 0
                return ran.records

        return asyncio.run(run())

    def test_requests_leave_at_their_times_though_nothing_is_answered(self) -> None:
        """The server answers none before all have come: a closed loop would wait for ever."""
        records = self.run([Scheduled(index * 0.01, index % 2, 4, 3) for index in range(30)])
        assert [each.adapter for each in records] == ["x", "y"] * 15
        assert all(each.sent_s >= each.scheduled_s for each in records)
        assert all(before.sent_s <= now.sent_s for before, now in pairwise(records))
        assert {(each.new_tokens, each.prompt_tokens, each.outcome, len(each.gaps_s)) for each in records} == {
            (3, 4, "OK", 1)
        }

    def test_hundreds_at_once(self) -> None:
        records = self.run([Scheduled(0.0, None, 2, 2)] * 400)
        assert Counter(each.outcome for each in records) == {"OK": 400}

    def test_a_refusal_is_an_outcome(self) -> None:
        records = self.run([Scheduled(0.0, 0, length, 2) for length in (1, 2, 3)])
        assert [each.outcome for each in records] == ["RESOURCE_EXHAUSTED", "OK", "RESOURCE_EXHAUSTED"]
        assert records[0].message == "the queue is full"
        assert records[0].first_token_s is None

    def test_a_deadline_ends_a_request(self) -> None:
        (late,) = self.run([Scheduled(0.0, 0, 2, 2)], timeout_s=0.05, unanswered=1)
        assert (late.outcome, late.new_tokens) == ("DEADLINE_EXCEEDED", 0)


class TestCommands:
    def test_load_prints_a_summary_and_writes_every_request(self, run: Run, address: str, tmp_path: Path) -> None:
        file = tmp_path / "out.json"
        ran = run(
            "bench", "load", "--address", address, "--rate", "50", "--duration", "0.5", *FEW, "--output", str(file)
        )
        assert (ran.exit_code, ran.error.count("\n")) == (0, ran.error.count("bottleneck"))
        assert "2 adapters, alpha 1, cv 1, 50/s: 25 of 25 answered" in ran.output
        for words in ("requests/s", "tokens/s", "first token within 6 s", "TTFT", "TPOT", "ITL", "p99"):
            assert words in ran.output
        (only,) = json.loads(file.read_text())["runs"]
        assert only["workload"]["workload"] == "s-lora"
        schedule = Trace(50, 0.5, 2, prompt_tokens=(4, 12), new_tokens=(2, 6)).schedule()
        assert [
            (each["adapter"], each["scheduled_s"], each["prompt_tokens"], each["new_tokens"], each["outcome"])
            for each in only["requests"]
        ] == [
            (("one", "two")[each.adapter or 0], each.at_s, each.prompt_tokens, each.new_tokens, "OK")
            for each in schedule
        ]
        for each in only["requests"]:
            assert each["scheduled_s"] <= each["sent_s"] < each["first_token_s"] <= each["last_token_s"]

    def test_several_values_are_run_in_turn_and_drawn(self, run: Run, address: str, tmp_path: Path) -> None:
        file, picture = tmp_path / "out.json", tmp_path / "out.svg"
        ran = run(
            *("bench", "load", "--address", address, "--rate", "20", "--duration", "0.2", "--adapters", "0,1,2", *FEW),
            *("--output", str(file), "--plot", str(picture)),
        )
        assert ran.exit_code == 0
        runs = json.loads(file.read_text())["runs"]
        assert [each["workload"]["adapters"] for each in runs] == [0, 1, 2]
        assert {each["adapter"] for each in runs[0]["requests"]} == {""}
        assert "<svg" in picture.read_text()

    def test_slora_sweeps_as_far_as_there_are_adapters(self, run: Run, address: str, tmp_path: Path) -> None:
        file = tmp_path / "out.json"
        args = ("--rate", "20", "--duration", "0.1", "--new-tokens", "2", "--prompt-tokens", "4")
        ran = run("bench", "slora", "--address", address, *args, "--output", str(file))
        assert ran.exit_code == 0
        workloads = [each["workload"] for each in json.loads(file.read_text())["runs"]]
        assert [(each["adapters"], each["alpha"], each["cv"]) for each in workloads] == [
            *((1, 1, 1), (2, 0.1, 1), (2, 0.3, 1), (2, 0.6, 1), (2, 1, 1)),
            *((2, 1, 2), (2, 1, 4), (2, 1, 6), (2, 1, 8)),
        ]

    def test_popularity_sends_batches(self, run: Run, address: str) -> None:
        ran = run("bench", "popularity", "identical", "--address", address, "--requests", "4", *FEW)
        assert ran.exit_code == 0
        assert "identical, 4 at once: 4 of 4 answered" in ran.output

    def test_one_adapter_by_name_or_by_pattern(self, run: Run, address: str, tmp_path: Path) -> None:
        file = tmp_path / "out.json"
        for args in (("--adapter", "two"), ("--match", "t*")):
            short = ("--rate", "20", "--duration", "0.1", *FEW, "--output", str(file))
            assert run("bench", "load", "--address", address, *short, *args).exit_code == 0
            assert {each["adapter"] for each in json.loads(file.read_text())["runs"][0]["requests"]} == {"two"}

    @pytest.mark.parametrize("none", ["0", "0,0"])
    def test_no_adapter_is_the_base(self, run: Run, address: str, tmp_path: Path, none: str) -> None:
        file = tmp_path / "out.json"
        short = ("--rate", "20", "--duration", "0.1", *FEW, "--output", str(file))
        assert run("bench", "load", "--address", address, *short, "--adapters", none).exit_code == 0
        runs = json.loads(file.read_text())["runs"]
        assert {each["adapter"] for ran in runs for each in ran["requests"]} == {""}
        assert len(runs) == none.count("0")

    def test_lengths_that_do_not_fit_are_refused_or_scaled(self, run: Run, address: str) -> None:
        short = ("bench", "load", "--address", address, "--rate", "20", "--duration", "0.1")
        ran = run(*short)
        assert ran.exit_code == 1
        assert "up to 511 tokens and answers of up to 511 are more than the server's context of 256" in ran.error_line
        assert "--fit" in ran.error_line
        assert run(*short, "--fit", "--new-tokens", "64").exit_code == 0

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (("--adapter", "nix"), "--adapter is 'nix', which the server does not have; it has one, two"),
            (("--match", "z*"), "--match is 'z*', which none of the server's 2 adapters does"),
            (("--adapters", "3"), "3 adapters are asked for, and 2 are there"),
            (("--output", "/nowhere/x.json"), "/nowhere/x.json can't be written: there is no folder /nowhere"),
            (("--plot", "/nowhere/x.svg"), "/nowhere/x.svg can't be written: there is no folder /nowhere"),
        ],
    )
    def test_what_the_server_can_not_do_is_one_line(
        self, run: Run, address: str, args: tuple[str, ...], words: str
    ) -> None:
        ran = run("bench", "load", "--address", address, "--rate", "20", "--duration", "0.1", *FEW, *args)
        assert ran.exit_code == 1
        assert words in ran.error_line
        assert "answered" not in ran.output  # it is told before the run

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (("load", "--alpha", "x"), "'--alpha': is 'x'; must be numbers from 0.01 to 100"),
            (("load", "--adapters", "-1"), "'--adapters': is '-1'"),
            (("load", "--prompt-tokens", "9:3"), "'--prompt-tokens': is '9:3'; must be LOW:HIGH"),
            (("load", "--rate", "0"), "--rate"),
            (("load", "--rate", "nan"), "'--rate': 'nan' is not a number"),
            (("slora", "--duration", "nan"), "'--duration': 'nan' is not a number"),
            (("load", "--rate", "0.1", "--duration", "1"), "are 0 requests"),
            (("load", "--plot", "x.gif"), "--plot is 'x.gif'; must end in one of .png, .svg, .pdf"),
            (("popularity", "zipf"), "zipf"),
            (("load", "--adapter", "a", "--match", "b*"), "--adapter and --match are both given: choose one"),
            (("slora", "--adapter", "a", "--match", "b*"), "--adapter and --match are both given: choose one"),
            (("load", "--adapters", "0,0", "--match", "b*"), "--adapters 0 asks the base alone: leave --adapter and"),
        ],
    )
    def test_wrong_usage_is_one_line(self, run: Run, args: tuple[str, ...], words: str) -> None:
        ran = run("bench", *args)
        assert ran.exit_code == 2
        assert words in ran.error_line

    def test_no_server_is_one_line(self, run: Run) -> None:
        address = f"127.0.0.1:{free_port()}"
        ran = run("bench", "load", "--address", address)
        assert (ran.exit_code, ran.error_line) == (
            1,
            f"no server answers at {address}: start one with `weft serve`",
        )

    def test_a_missing_matplotlib_is_told_before_the_run(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        ran = run("bench", "load", "--address", f"127.0.0.1:{free_port()}", "--plot", "x.svg")
        assert (ran.exit_code, ran.error_line) == (1, "plots need matplotlib: pip install 'weft[bench]'")

    def test_a_run_without_an_answer_fails(self, run: Run, address: str) -> None:
        short = ("bench", "load", "--address", address, "--rate", "20", "--duration", "0.1", *FEW)
        ran = run(*short, "--timeout", "0.000001")
        assert ran.exit_code == 1
        assert "of 2 requests failed: 2 DEADLINE_EXCEEDED" in ran.output


def test_json_holds_no_infinity() -> None:
    summary: Summary = summarize([record(scheduled_s=0.0)], 0.0, 1.0)
    assert math.isinf(summary.offered_per_s)
    assert _finite({"a": [summary.offered_per_s, 1.0]}) == {"a": [None, 1.0]}
