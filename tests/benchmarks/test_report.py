"""What the benchmarks make of their samples."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from crowds import Crowd, Edge
from fairness import Crowding, arrivals
from memory import measure_memory
from moves import Timed
from overhead import Overhead
from report import Samples, write_section


def test_samples_are_summed_up() -> None:
    samples = Samples([3.0, 1.0, 2.0, 10.0])
    assert (samples.median, samples.low, samples.high) == (2.5, 1.0, 10.0)
    assert [samples.percentile(percent) for percent in (25, 50, 99)] == [1.0, 2.0, 10.0]
    assert samples.show(factor=10, digits=0) == "25 (10 to 100)"


def test_a_move_is_held_against_the_plain_work_of_its_own_run() -> None:
    timed = Timed(8, 100, {"disk to host": Samples([6.0])}, {"read, copy": Samples([4.0]), "copy": Samples([1.0])})
    assert timed.ratio("disk to host") == 1.5


def test_rates_are_held_against_the_smallest_crowd_with_the_same_working_set() -> None:
    rates = {10: {10: Samples([100.0])}, 100: {10: Samples([99.0]), 32: Samples([80.0]), 0: Samples([60.0])}}
    crowd = Crowd(32, {**rates, 1000: {10: Samples([98.0]), 32: Samples([76.0]), 0: Samples([40.0])}})
    assert [crowd.ratio(1000, working) for working in (10, 32, 0)] == [0.98, 0.95, 40 / 76]


def test_the_edge_compares_one_more_than_slots_with_slots() -> None:
    edge = Edge(2, {"open loop": {2: [Samples([1.0, 1.0]), Samples([2.0])], 3: [Samples([3.0])]}})
    assert (edge.ratio("open loop", 50), edge.ratio("open loop", 99)) == (3.0, 1.5)


def test_fragmented_adapters_take_less_than_a_page_more_than_their_rows() -> None:
    memory = measure_memory("tiny", (1, 12, 33), padded_to=64)
    assert memory.most_beyond_exact_pages == pytest.approx(7 / 8)
    assert memory.num_refused == 0
    assert memory.most_runs > 1


def test_a_section_of_a_document_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- it: begin -->\nold\n<!-- it: end -->\nafter\n")
    write_section(page, "it", "new\n")
    assert page.read_text() == "before\n<!-- it: begin -->\nnew\n<!-- it: end -->\nafter\n"


def test_the_others_are_held_against_what_they_see_without_the_hot_one() -> None:
    alone, beside = Samples([1.0] * 19 + [2.0]), Samples([1.5] * 18 + [3.0, 9.0])
    crowding = Crowding(1.0, {"alone": alone, "beside": beside}, {"alone": 0, "beside": 7})
    assert (crowding.ratio("beside", 50), crowding.ratio("beside", 95)) == (1.5, 3.0)
    assert crowding.show().splitlines()[-1] == "| beside | 20 | 7 | 1500; 1.50x | 3000; 3.00x |"


def test_the_hot_adapter_comes_fifty_times_as_often_and_leaves_the_others_as_they_are() -> None:
    without, beside = (arrivals(1.0, 100.0, 3, hot=hot) for hot in (False, True))
    assert [due for due in beside if due[1] != "hot"] == without
    assert beside == sorted(beside)
    assert 1700 <= len(without) <= 2100
    assert 4700 <= len(beside) - len(without) <= 5300


def test_the_rest_of_a_step_is_what_neither_the_model_nor_sampling_takes() -> None:
    parts = {"step": Samples([2.0]), "forward": Samples([1.5]), "sample": Samples([0.3])}
    assert Overhead(parts).rest == pytest.approx(0.1)
