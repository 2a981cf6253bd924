"""What the comparison with peers and S-LoRA's suite make of their measurements."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from environments import Gone, NotRun, Peer, Recipe, environment, run
from floor import Rates, Sizes, ratios, step_s
from peers.protocol import Job
from shapes import SHAPES, module_shapes
from side_by_side import Contest, Effort, choose, main, take_turn, to_json
from slora import Suite
from standings import ALL, DISTINCT, ONE, PLAIN, REFERENCE, SAME, SHARED, WEFT, Standing, show
from systems import KINDS, Answer, Cell, System

from weft.server.bench.summary import Record, summarize

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
EFFORT = Effort("tiny", 2, (1, 16), 8, 5)
TINY = Sizes.of(list(module_shapes("tiny").values()), 64, 512)


class Fake(System):
    """Answers with the row's first token; each call takes a second more than the one before."""

    def __init__(self, name: str, error: str = "", cell_error: str = "", dtype: str = "float32") -> None:
        super().__init__(name, dtype, (False,) if name == PLAIN else (False, True))
        self.error, self.cell_error, self.started, self.calls = error, cell_error, 0, 0

    def start(self) -> None:
        if self.error:
            raise NotRun(self.error)
        self.started += 1
        self.version = f"{self.name} 1"

    def answer(self, job: Job) -> Answer:
        if self.cell_error and any(job.adapters):
            raise (Gone if self.cell_error == "gone" else NotRun)(self.cell_error)
        self.calls += 1
        return Answer(float(job.new_tokens), [[prompt[0]] * job.new_tokens for prompt in job.prompts])

    def stop(self) -> None:
        self.started = 0


def contest(*systems: System, resident: bool = True) -> Contest:
    made = Contest(EFFORT, [Standing(system) for system in systems])
    for turn in range(EFFORT.rounds):
        for standing in made.standings:
            take_turn(made, standing, turn, resident=resident)
    return made


class TestFloor:
    rates = Rates(bytes_per_s=4e9, flops_per_s=2e9)

    def test_a_step_takes_as_long_as_its_slower_of_bytes_and_products(self) -> None:
        sizes = Sizes(layers=900, head=100, adapter_per_rank=10)
        assert step_s(self.rates, sizes, 1, 1, (), ()) == pytest.approx(1000 * 4 / 4e9)
        assert step_s(self.rates, sizes, 16, 2, (), ()) == pytest.approx(2 * (900 * 16 + 100 * 2) / 2e9)

    def test_the_machine_is_as_fast_as_it_was_seen_to_be(self) -> None:
        assert self.rates.best(Rates(1e9, 3e9)) == Rates(4e9, 3e9)

    def test_adapters_are_read_once_each_and_multiplied_for_each_token(self) -> None:
        sizes = Sizes(layers=900, head=100, adapter_per_rank=10)
        base_s = step_s(self.rates, sizes, 2, 2, (), ())
        assert step_s(self.rates, sizes, 2, 2, (8, 8), (8, 8)) - base_s == pytest.approx(160e-9)
        assert step_s(self.rates, sizes, 8, 2, (8, 32), (8, 32)) - base_s > 2 * 10 * 40 * 4 / 2e9

    def test_more_sharing_costs_less(self) -> None:
        found = [ratios(self.rates, TINY, scenario.adapters, 64, 64) for scenario in (DISTINCT, SHARED, SAME)]
        assert [each.decode for each in found] == sorted(each.decode for each in found)
        assert all(0 < each.decode <= 1 and 0 < each.whole <= 1 for each in found)

    def test_counts_every_linear_module_once(self) -> None:
        sizes = Sizes.of(list(module_shapes("135m").values()), 576, SHAPES["135m"]["vocab_size"])
        assert sizes.layers + sizes.head == 134_479_872
        assert sizes.adapter_per_rank * 16 * 16 * 4 == pytest.approx(312e6, rel=0.01)


class TestContest:
    def test_prompts_are_new_for_every_scenario_round_and_length_and_the_same_for_every_system(self) -> None:
        jobs = [
            EFFORT.job(scenario, turn, new) for scenario in (ONE, ALL, DISTINCT) for turn in (0, 1) for new in (1, 5)
        ]
        prompts = [tuple(prompt) for job in jobs for prompt in job.prompts]
        assert len(set(prompts)) == len(prompts)
        assert EFFORT.job(SHARED, 1, 5) == EFFORT.job(SHARED, 1, 5)
        assert EFFORT.job(SHARED, 0, 5).adapters[:5] == ["a00", "a01", "a02", "a03", "a00"]

    def test_rates_are_of_the_whole_and_of_decoding_alone(self) -> None:
        standing = contest(Fake(WEFT)).standings[0]
        assert standing.whole(DISTINCT, EFFORT) == [16 * 5 / 5] * 2
        assert standing.decode(DISTINCT, EFFORT) == [16 * 4 / 4] * 2

    def test_rows_are_held_against_pefts(self) -> None:
        made = contest(Fake(WEFT), Fake(REFERENCE))
        assert made.standings[0].agreement(made.standings) == "32 of 32"
        made.standings[0].tokens[1][3] = [0]
        assert made.standings[0].agreement(made.standings) == "31 of 32"
        assert made.standings[0].agreement(made.standings[:1]) == "-"

    def test_what_can_not_run_is_named_and_stops_nothing(self) -> None:
        made = contest(
            Fake("gone", error="no wheel"), Fake("half", cell_error="no adapters here"), Fake(WEFT), Fake(PLAIN)
        )
        report = show(made.standings, EFFORT, Rates(1e9, 1e9), TINY)
        assert "| gone | not run | not run | not run | not run | not run | - |" in report
        assert "- gone: not run: no wheel" in report
        assert "- half, 16 adapters: not run: no adapters here" in report
        assert "Weft: 16 adapters" in report
        assert [standing.system.started for standing in made.standings] == [0, 1, 1, 1]
        assert json.loads(json.dumps(to_json(made, Rates(1e9, 1e9))))["systems"]["gone"]["error"] == "no wheel"

    def test_one_that_is_gone_is_started_again_for_what_is_left(self) -> None:
        made = contest(Fake(WEFT, cell_error="gone"))
        (standing,) = made.standings
        assert standing.cells[DISTINCT.name].error == "gone"
        assert standing.system.started == 1
        assert len(standing.cells[ALL.name].whole_s) == EFFORT.rounds

    def test_a_large_shape_has_one_system_up_at_a_time(self) -> None:
        made = contest(Fake(WEFT), Fake(PLAIN), resident=False)
        assert [standing.system.started for standing in made.standings] == [0, 0]

    def test_ratios_name_the_best_peer_of_each_dtype(self) -> None:
        made = contest(Fake(PLAIN), Fake(REFERENCE), Fake("swift", dtype="bfloat16"))
        made.standings[2].cells[ALL.name] = Cell([1.0, 1.0], [0.5, 0.5])
        (line,) = [
            line
            for line in show(made.standings, EFFORT, Rates(1e9, 1e9), TINY).splitlines()
            if line.startswith("- base, 16")
        ]
        assert "Weft runs at 1.00 (1.00 to 1.00) times transformers' `generate` in float32" in line
        assert "0.20 (0.20 to 0.20) times the best peer at its best (swift)" in line

    def test_unknown_systems_are_named(self) -> None:
        assert choose("weft, vllm") == ["weft", "vllm"]
        with pytest.raises(Exception, match="'vlm'; there are weft, transformers"):
            choose("weft,vlm")

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--rounds", "0"], "'--rounds': 0"),
            (["--requests", "3"], "'--requests': '3'"),
            (["--threads", "0"], "'--threads': 0"),
            (["--samples", "/nowhere/x.json"], "there is no folder /nowhere"),
            (["--write", "--output", "/nowhere/x.md"], "there is no folder /nowhere"),
        ],
        ids=str,
    )
    def test_what_would_measure_for_nothing_is_refused_at_once(self, options: list[str], words: str) -> None:
        ran = CliRunner().invoke(main, ["--systems", "weft", *options])
        assert ran.exit_code != 0
        assert words in ran.output

    def test_every_peer_has_its_script(self) -> None:
        assert all((BENCHMARKS / "peers" / kind.script).is_file() for kind in KINDS.values())


PEER = """
from protocol import NotSupported, serve

def load(setup):
    print("to the log")
    def answer(job):
        if job.adapters == ["bad"]:
            raise ValueError("a bad one")
        if job.adapters == ["odd"]:
            raise NotSupported("not that")
        return job.gather({name: [[len(rows)] for _ in rows] for name, rows in job.groups().items()})
    return setup.mode + " 1", answer

serve(load)
"""
SETUP = {"base": "b", "adapters": {}, "dtype": "float32", "threads": 1, "scratch": "s", "mode": "fake"}


def test_a_peer_answers_over_pipes_and_says_what_it_can_not_do(tmp_path: Path) -> None:
    (tmp_path / "peer.py").write_text(f"import sys; sys.path.insert(0, {str(BENCHMARKS / 'peers')!r})\n{PEER}")
    with (tmp_path / "log").open("w") as log:
        peer = Peer(Path(sys.executable), str(tmp_path / "peer.py"), {}, log, threads=1)
        try:
            assert peer.ask(SETUP) == {"version": "fake 1"}
            answer = peer.ask({"prompts": [[1], [2], [3]], "adapters": ["x", "y", "x"], "new_tokens": 1})
            assert answer["tokens"] == [[2], [1], [2]]
            for adapter, words in (("bad", "ValueError: a bad one"), ("odd", "not that")):
                with pytest.raises(NotRun, match=words):
                    peer.ask({"prompts": [[1]], "adapters": [adapter], "new_tokens": 1})
        finally:
            peer.close()
        with pytest.raises(NotRun, match="it ended"):
            peer.ask(SETUP)
    assert "to the log" in (tmp_path / "log").read_text()


def test_a_peer_that_does_not_answer_is_ended(tmp_path: Path) -> None:
    (tmp_path / "peer.py").write_text("import sys; sys.stdin.read()")
    with (tmp_path / "log").open("w") as log:
        peer = Peer(Path(sys.executable), str(tmp_path / "peer.py"), {}, log, threads=1)
        with pytest.raises(NotRun, match="no answer within 0 s"):
            peer.ask(SETUP, limit_s=0.2)
        with pytest.raises(NotRun, match="it ended"):
            peer.ask(SETUP)


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(NotRun, match=r"`python.* -c …` failed: ValueError: no such wheel"):
        run(sys.executable, "-c", "raise ValueError('no such wheel')")


def test_an_environment_that_is_ready_is_not_made_again(tmp_path: Path) -> None:
    recipe = Recipe("mine", ("nothing==1",), variables=lambda folder: {"AT": str(folder)})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".ready").write_text(recipe.digest())
    assert environment(recipe, tmp_path) == (tmp_path / "mine" / "bin" / "python", {"AT": str(tmp_path / "mine")})
    assert recipe.digest() != Recipe("mine", ("nothing==2",)).digest()


def test_s_loras_suite_holds_each_round_against_the_fewest_adapters_of_that_round() -> None:
    def ran(seconds: float) -> Record:
        return Record("a", 0.0, 0.0, 1.0, seconds, seconds, 1, 5, "OK")

    suite = Suite(1.0)
    for count, rounds in ((5, (2.0, 4.0)), (1000, (4.0, 4.0))):
        suite.runs[count] = [summarize([ran(seconds)], 0.0, seconds) for seconds in rounds]
        suite.records[count] = [[ran(seconds)] for seconds in rounds]
    assert suite.ratio(1000).values == [0.5, 1.0]
    assert "| 1,000 | 0.25 (0.25 to 0.25) | 0.750 (0.500 to 1.000) |" in suite.show()
    assert [place for place, _ in suite.points()] == [5, 1000]
    assert len(json.loads(json.dumps(suite.to_json()))["runs"]["5"]) == 2
