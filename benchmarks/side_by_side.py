"""Weft and its peers on the same model, adapters and prompts, in one run.

    python benchmarks/side_by_side.py                # makes the peers, prints the tables, writes docs/performance.md
    python benchmarks/side_by_side.py --shape 1.1b   # the same on the larger shape
    python benchmarks/side_by_side.py --shape tiny --systems weft,transformers --rounds 1    # tries the script

Requests of 64 + 64 tokens, greedy, EOS ignored; tokens a second from the first submission to the last token, and of
decoding alone: less what the same prompts take with one new token each. The systems take turns, so that a slow moment
of the machine hits all of them. Prompts are new in each run, so no prefix cache helps. Weft runs as a server of its
own and is asked over gRPC. Each peer has an environment of its own under --cache; one that can't be had is named.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
import transformers
from environments import Gone, NotRun, Tokens
from floor import Rates, Sizes, measure_rates
from peers.protocol import Job, Setup
from report import machine, write_section
from rich.progress import Progress
from shapes import RANKS, SHAPES, make_base, module_shapes, write_adapters
from standings import PLAIN, SCENARIOS, WEFT, Scenario, Standing, show
from systems import KINDS, Cell, PeerSystem, Place, System, WeftServer

import weft
from weft.server.cli.bench_kernels import check_can_write

ROOT = Path(weft.__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "weft-benchmarks"
RESIDENT_SHAPES = ("135m", "tiny")
"""Of which all systems fit the memory at once; of others one is up at a time."""


@dataclass(frozen=True)
class Effort:
    """What is asked. prompt_tokens and new_tokens: of each request."""

    shape: str
    rounds: int
    requests: Sequence[int]
    prompt_tokens: int
    new_tokens: int

    @property
    def scenarios(self) -> list[Scenario]:
        return [scenario for scenario in SCENARIOS if scenario.requests in self.requests]

    def job(self, scenario: Scenario, turn: int, new_tokens: int) -> Job:
        """New prompts for every scenario, round and length of answer; the same for every system."""
        rng = random.Random(f"{scenario.name} {turn} {new_tokens}")
        vocabulary = SHAPES[self.shape]["vocab_size"]
        prompts = [[rng.randrange(1, vocabulary) for _ in range(self.prompt_tokens)] for _ in range(scenario.requests)]
        return Job(prompts, scenario.names, new_tokens)


@dataclass
class Contest:
    """All systems and what came of them."""

    effort: Effort
    standings: list[Standing]
    reference: dict[int, Tokens] = field(default_factory=dict)
    """PEFT's rows for unlike adapters in float32, by round."""


def make_model(shape: str, cache: Path) -> tuple[Path, dict[str, str]]:
    """The base and 16 adapters of rank 8, 16, 32, …, made once for each version of `shapes.py`."""
    version = hashlib.sha256((Path(__file__).parent / "shapes.py").read_bytes()).hexdigest()[:12]
    folder = cache / "models" / f"{shape}-{version}"
    names = {f"a{index:02d}": RANKS[index % len(RANKS)] for index in range(16)}
    if not (folder / "made").exists():
        make_base(shape, folder / "base")
        write_adapters(shape, folder / "adapters", names)
        (folder / "made").touch()
    return folder, {name: str(folder / "adapters" / name) for name in names}


def take_turn(contest: Contest, standing: Standing, turn: int, *, resident: bool) -> None:
    """One system through all scenarios; where it was not up it is started, and warmed up by short answers."""
    effort, system = contest.effort, standing.system
    if standing.error:
        return
    try:
        if not standing.is_up:
            system.start()
            standing.is_up = True
            for scenario in effort.scenarios:
                measure(contest, standing, scenario, turn, warm_up=True)
        for scenario in effort.scenarios:
            measure(contest, standing, scenario, turn)
    except (NotRun, RuntimeError) as error:
        standing.error = " ".join(str(error).split())[:300]
    if not resident or standing.error:
        system.stop()
        standing.is_up = False


def measure(contest: Contest, standing: Standing, scenario: Scenario, turn: int, *, warm_up: bool = False) -> None:
    effort, cell = contest.effort, standing.cells.setdefault(scenario.name, Cell())
    if cell.error or not standing.system.can(effort.job(scenario, turn, 1)):
        return
    try:
        if warm_up:
            standing.system.answer(effort.job(scenario, -1 - turn, 2))
            return
        first = standing.system.answer(effort.job(scenario, turn, 1))
        whole = standing.system.answer(effort.job(scenario, turn, effort.new_tokens))
    except NotRun as error:
        cell.error = str(error)
        if isinstance(error, Gone):
            standing.system.stop()
            standing.system.start()
        return
    if any(len(tokens) != effort.new_tokens for tokens in whole.tokens):
        cell.error = "answers of the wrong length"
        return
    cell.first_s.append(first.seconds)
    cell.whole_s.append(whole.seconds)
    if scenario.distinct == scenario.requests > 1:
        standing.tokens[turn] = whole.tokens


def weft_systems(folder: Path, dtype: str, threads: int, more: Sequence[str]) -> list[System]:
    base, adapters = folder / "base", folder / "adapters"
    return [
        WeftServer(PLAIN, dtype, base, None, (), threads),
        WeftServer(WEFT, dtype, base, adapters, (), threads),
        *(WeftServer(f"{WEFT}, `{each}`", dtype, base, adapters, shlex.split(each), threads) for each in more),
    ]


def choose(systems: str) -> list[str]:
    chosen = [name.strip() for name in systems.split(",")]
    unknown = [name for name in chosen if name != "weft" and name not in KINDS]
    if unknown:
        raise click.UsageError(f"--systems has {unknown[0]!r}; there are weft, {', '.join(KINDS)}")
    return chosen


@click.command(help=__doc__)
@click.option("--shape", type=click.Choice(list(SHAPES)), default="135m", show_default=True)
@click.option("--systems", default=",".join(["weft", *KINDS]), show_default=True, help="Which, with commas between.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(["float32", "bfloat16"]), help="[default: both]")
@click.option("--requests", multiple=True, type=click.Choice([1, 16]), help="Only scenarios of so many.")
@click.option(
    "--rounds", type=click.IntRange(1), default=3, show_default=True, help="How often each system takes its turn."
)
@click.option("--weft", "more", multiple=True, metavar="OPTIONS", help="One more `weft serve`, with these options.")
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count() or 1, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=CACHE, help="Of environments and converted models.")
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "docs" / "performance.md")
@click.option("--samples", type=click.Path(path_type=Path), help="A file for every measurement, as JSON.")
@click.option("--write/--no-write", default=None, help="Write both.  [default: for 135m and 1.1b with all systems]")
def main(
    shape: str,
    systems: str,
    dtypes: Sequence[str],
    requests: Sequence[int],
    rounds: int,
    more: Sequence[str],
    threads: int,
    cache: Path,
    output: Path,
    samples: Path | None,
    write: bool | None,
) -> None:
    chosen = choose(systems)
    mark = {"135m": "side_by_side", "1.1b": "side_by_side_1b"}.get(shape)
    if write is None:
        write = set(chosen) == {"weft", *KINDS}
    written = [output] if write and mark is not None else []
    for path in (*written, *([samples] if samples is not None else [])):
        check_can_write(path)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end, too
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    length = 16 if shape == "tiny" else 64
    effort = Effort(shape, rounds, requests or (1, 16), length, length)
    with Progress() as progress:
        work = progress.add_task("making the model and 16 adapters", total=None)
        folder, adapters = make_model(shape, cache)
        progress.update(work, description="measuring the machine")
        rates = measure_rates()
        with (folder / "peers.log").open("w") as log:
            found = weft_systems(folder, "float32", threads, more) if "weft" in chosen else []
            for name in chosen:
                for dtype in KINDS[name].dtypes if name in KINDS else ():
                    if dtype in (dtypes or ("float32", "bfloat16")):
                        setup = Setup(str(folder / "base"), adapters, dtype, threads, str(folder))
                        found.append(PeerSystem(KINDS[name], Place(cache, setup, Path(sys.executable), log)))
            contest = Contest(effort, [Standing(system) for system in found])
            run(contest, progress, work)
            rates = rates.best(measure_rates())
    modules = list(module_shapes(shape).values())
    sizes = Sizes.of(modules, SHAPES[shape]["hidden_size"], SHAPES[shape]["vocab_size"])
    report = f"{show(contest.standings, effort, rates, sizes)}\n\n{footer(contest, threads)}\n"
    click.echo(report)
    if write and mark is not None:
        write_section(output, mark, report)
        samples = samples or ROOT / "benchmarks" / "results" / f"{mark}.json"
    if samples is not None:
        samples.write_text(json.dumps(to_json(contest, rates), indent=1) + "\n")


def run(contest: Contest, progress: Progress, work: object) -> None:
    resident = contest.effort.shape in RESIDENT_SHAPES
    progress.update(work, total=contest.effort.rounds * len(contest.standings))
    try:
        for turn in range(contest.effort.rounds):
            for standing in contest.standings:
                progress.update(work, description=f"round {turn + 1}: {standing.system.name}")
                take_turn(contest, standing, turn, resident=resident)
                progress.advance(work)
    finally:
        for standing in contest.standings:
            standing.system.stop()


def footer(contest: Contest, threads: int) -> str:
    versions = dict.fromkeys(standing.system.version for standing in contest.standings)
    named = "; ".join(version for version in versions if version)
    words = f"Machine: {machine()}; every system with {threads} threads; {contest.effort.rounds} rounds."
    return f"{words} {named}." if named else words


def to_json(contest: Contest, rates: Rates) -> dict[str, object]:
    return {
        "machine": machine(),
        "shape": contest.effort.shape,
        "prompt_tokens": contest.effort.prompt_tokens,
        "new_tokens": contest.effort.new_tokens,
        "rates": asdict(rates),
        "systems": {
            standing.system.name: {
                "version": standing.system.version,
                "error": standing.error,
                "scenarios": {name: asdict(cell) for name, cell in standing.cells.items()},
                "rows_as_peft": standing.agreement(contest.standings),
            }
            for standing in contest.standings
        },
    }


if __name__ == "__main__":
    main()
