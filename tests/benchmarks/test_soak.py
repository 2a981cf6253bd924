"""A soak in short form: a real server, everybody who comes to it, and nothing left of them; a breach is seen."""

from __future__ import annotations

import asyncio
import socket
import sys
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from open_loop import Shape
from overload import LOADS, Effort, measure
from soak import _HELD_IN_METRICS, Soak, _answers, _leaks, run
from soak import Effort as SoakEffort
from soaking.clients import LOST, RIGHT, WRONG, Tally
from soaking.passing import Passing
from soaking.process import Held, ServerProcess, weft_process
from soaking.truth import DEMO, Truth
from soaking.vandals import Vandals
from streams import measure as measure_streams

from weft.v1 import adapter_pb2_grpc

SHORT = SoakEffort(requests=300, clients=24, adapters=3, max_growth=15.0)
"""So short a run says little of memory: what a process takes once is a large part of it."""


@pytest.mark.slow
def test_a_short_soak_finds_nothing() -> None:
    found, _ = run(SHORT, lambda count: None, lambda words: None)
    assert found.is_good, found.show()
    assert found.tally.total == SHORT.requests
    assert {"readers that stall", "half-open connections", "adapters created"} <= set(found.habits)


@pytest.fixture
def options() -> list[object]:
    """Of a small server."""
    return [
        *("--adapters", DEMO / "adapters", "--threads", 1, "--kv-tokens", 4096),
        *("--max-running-requests", 8, "--max-queue-ms"),
    ]


@pytest.mark.slow
def test_more_streams_than_run_at_once_are_all_answered(options: list[object]) -> None:
    with weft_process(DEMO / "base", *options, 0) as server:
        streams = asyncio.run(measure_streams(server, 40, 40))
    assert (streams.lost.total(), len(streams.ends)) == (0, 40)


@pytest.mark.slow
def test_more_than_a_server_can_do_is_refused_with_a_time_to_come_back(options: list[object]) -> None:
    with weft_process(DEMO / "base", *options, 250) as server:
        overload = asyncio.run(measure(server.address, 250, Effort(1, 2.0, clients=8), lambda words: None))
    low, high = (overload.loads[load] for load in LOADS)
    assert high.refused > 0
    assert high.answered > 0
    assert (high.without_retry, low.lost + high.lost) == (0, [])


HELD = Held(rss_bytes=1000, anonymous_bytes=500, threads=10, files=20, sockets=5, children=0)


class Fake(ServerProcess):
    """A server that holds nothing."""

    def __init__(self, **metrics: float) -> None:
        self._metrics = {**dict.fromkeys(_HELD_IN_METRICS.values(), 0.0), **metrics}
        self.trouble = []

    def metrics(self) -> dict[str, float]:
        return self._metrics


def bad(server: Fake, after: Held) -> list[str]:
    return [name for name, _, _, good in _leaks(server, HELD, after, 2.0) if not good]


def test_whatever_is_still_held_is_a_breach() -> None:
    assert bad(Fake(), HELD) == []
    assert bad(Fake(), replace(HELD, threads=11, files=21, sockets=6, children=1)) == [
        *("threads", "files", "sockets", "children"),
    ]
    assert bad(Fake(), replace(HELD, rss_bytes=1021)) == ["growth of resident memory after warm-up"]
    assert bad(Fake(weft_kv_blocks_used=1.0), HELD) == ["KV blocks in use"]
    assert bad(Fake(weft_adapter_pages_used=1.0), HELD) == ["adapter pages in use once all are deleted"]


@pytest.mark.parametrize("end", [WRONG, LOST])
def test_one_that_is_lost_or_wrong_is_a_breach(end: str) -> None:
    tally = Tally()
    for each in (RIGHT, "cancelled", "refused as it should be"):
        tally.note(each)
    assert all(good for *_, good in _answers(tally, []))
    tally.note(end, "why")
    found = Soak(tally, 1.0, {}, [], [], list(_answers(tally, [])))
    assert not found.is_good
    assert f"{end}: why" in found.show()


def test_what_has_no_end_beside_the_crowd_is_told_and_not_waited_for() -> None:
    async def main(address: str) -> list[str]:
        vandals = Vandals(address, address, seed=0, patience_s=0.1)
        passing = Passing(address, ["file:/nowhere"], seed=0, patience_s=0.1)
        watching = asyncio.create_task(vandals._again(3600.0, vandals._watch))
        async with grpc.aio.insecure_channel(address) as channel:
            await passing._change(adapter_pb2_grpc.AdapterServiceStub(channel))
        vandals.stop()
        await watching
        return [*vandals.wrong, *passing.wrong]

    with socket.create_server(("127.0.0.1", 0)) as silent:  # nobody is let in, and nobody sent away
        watched, changed = asyncio.run(main(f"127.0.0.1:{silent.getsockname()[1]}"))
    assert watched == "watch: no end after 0.1 s"
    assert changed.endswith(": no end after 0.1 s")


def test_answers_are_compared_as_far_as_they_go() -> None:
    truth = Truth(((1,),), {("a", (1,)): (5, 6, 7)}, eos=2)
    assert truth.is_right("a", (1,), [5, 6, 7, 2], is_whole=True)
    assert not truth.is_right("a", (1,), [5, 6], is_whole=True)
    assert truth.is_right("a", (1,), [5, 6], is_whole=False)
    assert truth.is_right("a", (1,), [5, 6, 7, 2, 9], is_whole=False)
    assert not truth.is_right("a", (1,), [5, 8], is_whole=False)


def test_requests_are_the_same_for_the_same_number() -> None:
    shape = Shape(("", "a"), prompt_tokens=4, new_tokens=2)
    assert shape.request(3) == shape.request(3) != shape.request(5)
