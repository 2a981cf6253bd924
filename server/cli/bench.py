"""`weft bench`: load against a running server, and how it fares."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from weft.server.cli.bench_kernels import check_can_write, kernels
from weft.server.cli.bench_tables import Watch, print_runs
from weft.server.cli.client import Endpoint, connected, failures_in_words, server_options

if TYPE_CHECKING:
    from weft.server.bench.summary import Record, Summary
    from weft.server.bench.target import Target
    from weft.server.bench.workload import Burst, Lengths, Trace

POPULARITIES = ("identical", "distinct", "uniform", "skewed")
SWEEPS: Mapping[Literal["adapters", "alpha", "cv"], tuple[float, ...]] = {
    "adapters": (1, 20, 50, 100, 200, 1000, 2000),
    "alpha": (0.1, 0.3, 0.6, 1.0),
    "cv": (1, 2, 4, 6, 8),
}
"""S-LoRA's own."""

PLOT_FORMATS = (".png", ".svg", ".pdf")
_LENGTHS = re.compile(r"(\d{1,7})(?::(\d{1,7}))?")


class _Lengths(click.ParamType["Lengths"]):
    """LOW:HIGH, the second excluded as in S-LoRA's; or one number of tokens."""

    name = "low:high"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Lengths:
        if isinstance(value, tuple):
            return value
        match = _LENGTHS.fullmatch(value)
        low = int(match[1]) if match else 0
        high = int(match[2] or low + 1) if match else 0
        if not 1 <= low < high:
            self.fail(f"is {value!r}; must be LOW:HIGH with 1 <= LOW < HIGH, or a number of tokens from 1", param, ctx)
        return low, high


class _Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers with commas between, each tried in turn."""

    def __init__(self, kind: type[int | float], low: float, high: float) -> None:
        self.name = f"{kind.__name__},…"
        self._kind, self._low, self._high = kind, low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self._kind(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(self._low <= number <= self._high for number in numbers):
            self.fail(f"is {value!r}; must be numbers from {self._low:g} to {self._high:g}, such as 1,10", param, ctx)
        return numbers


def _check_plot(_context: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    if path is not None and path.suffix not in PLOT_FORMATS:
        raise click.UsageError(f"--plot is {str(path)!r}; must end in one of {', '.join(PLOT_FORMATS)}")
    return path


class _Rate(click.FloatRange):
    """From more than 0 to 100,000; nan, which no comparison refuses, is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


_RATE = _Rate(0, 1e5, min_open=True)
_FILE = click.Path(path_type=Path, dir_okay=False)

_rate_options: Sequence[Callable[[Any], Any]] = (
    click.option("--rate", type=_RATE, default=2.0, show_default=True, help="Requests a second that are offered."),
    click.option(
        "--duration", type=_RATE, default=60.0, show_default=True, metavar="SECONDS", help="Of the requests' arrival."
    ),
)
_common_options: Sequence[Callable[[Any], Any]] = (
    server_options,
    click.option("--adapter", "names", multiple=True, metavar="ID", help="Ask for this one; may be given repeatedly."),
    click.option("--match", metavar="GLOB", help="Ask for the server's adapters whose names match, such as 'team-*'."),
    click.option(
        "--prompt-tokens", type=_Lengths(), default=(8, 512), show_default="8:512", help="From LOW to less than HIGH."
    ),
    click.option("--new-tokens", type=_Lengths(), default=(8, 512), show_default="8:512", help="Of each answer."),
    click.option("--fit", is_flag=True, help="Scale lengths down to the server's context."),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=42, show_default=True),
    click.option("--timeout", type=_RATE, metavar="SECONDS", help="Of each request, from when it leaves."),
    click.option("--output", type=_FILE, help="Write every request and the summary here, as JSON."),
    click.option("--plot", type=_FILE, callback=_check_plot, help="Draw throughput and TTFT here: .png, .svg, .pdf."),
)


def _with(*groups: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return decorate


@click.group()
def bench() -> None:
    """Load a running server, and say how it fares.

    An open loop: requests leave at their scheduled times whether or not the server keeps up, and latencies count from
    the schedule. Greedy, to the full length of each answer.
    """


@dataclass(frozen=True, slots=True)
class Settings:
    """What all workloads are run with."""

    server: Endpoint
    names: Sequence[str]
    match: str | None
    fit: bool
    timeout: float | None
    output: Path | None
    plot: Path | None


Workloads = Callable[["Target", int, "Lengths", "Lengths"], "Sequence[Trace | Burst]"]
"""Of a server and how many of its adapters may be asked for; and lengths of prompts and answers that fit it."""


bench.add_command(kernels)


@bench.command()
@_with(_rate_options)
@click.option("--adapters", type=_Numbers(int, 0, 1e6), help="How many to ask for; 0: the base.  [default: all]")
@click.option("--alpha", type=_Numbers(float, 0.01, 100), default="1", show_default=True, help="Less is more skewed.")
@click.option("--cv", type=_Numbers(float, 0.01, 100), default="1", show_default=True, help="Of the gaps; 1: Poisson.")
@_with(_common_options)
def load(
    rate: float,
    duration: float,
    adapters: tuple[int, ...] | None,
    alpha: tuple[float, ...],
    cv: tuple[float, ...],
    prompt_tokens: Lengths,
    new_tokens: Lengths,
    seed: int,
    **settings: Any,
) -> int:
    """Offer S-LoRA's workload. Of options with several values, every combination is run."""

    def workloads(target: Target, available: int, prompt: Lengths, new: Lengths) -> Sequence[Trace | Burst]:
        from weft.server.bench.workload import Trace  # noqa: PLC0415 - brings numpy

        counts = adapters or (available,)
        each = [(count, skew, gap) for count in counts for skew in alpha for gap in cv]
        return [Trace(rate, duration, count, skew, gap, prompt, new, seed) for count, skew, gap in each]

    _check_count(rate, duration)
    base_alone = adapters is not None and not any(adapters)
    return _run(Settings(**settings), prompt_tokens, new_tokens, workloads, base_alone=base_alone)


@bench.command()
@_with(_rate_options)
@click.option("--sweep", "sweeps", type=click.Choice(list(SWEEPS)), multiple=True, help="Only this.  [default: all]")
@_with(_common_options)
def slora(
    rate: float,
    duration: float,
    sweeps: Sequence[Literal["adapters", "alpha", "cv"]],
    prompt_tokens: Lengths,
    new_tokens: Lengths,
    seed: int,
    **settings: Any,
) -> int:
    """Offer S-LoRA's suite: sweeps over adapters, alpha and cv, as far as the server has adapters for them."""

    def workloads(target: Target, available: int, prompt: Lengths, new: Lengths) -> Sequence[Trace | Burst]:
        from weft.server.bench.workload import Trace  # noqa: PLC0415 - brings numpy

        found: list[Trace | Burst] = []
        for sweep in sweeps or SWEEPS:
            for value in SWEEPS[sweep]:
                plain = Trace(rate, duration, available, prompt_tokens=prompt, new_tokens=new, seed=seed)
                trace = plain.vary(sweep, value)
                if trace.adapters <= available and trace not in found:
                    found.append(trace)
        return found

    _check_count(rate, duration)
    return _run(Settings(**settings), prompt_tokens, new_tokens, workloads)


@bench.command()
@click.argument("kinds", metavar="[KIND]...", type=click.Choice(POPULARITIES), nargs=-1)
@click.option("--requests", type=click.IntRange(1, 100000), default=16, show_default=True, help="Sent at once.")
@_with(_common_options)
def popularity(
    kinds: Sequence[Any], requests: int, prompt_tokens: Lengths, new_tokens: Lengths, seed: int, **settings: Any
) -> int:
    """Send Punica's batches: identical, distinct, uniform or skewed adapters; all four in turn unless told."""

    def workloads(target: Target, available: int, prompt: Lengths, new: Lengths) -> Sequence[Trace | Burst]:
        from weft.server.bench.workload import POPULARITIES, Burst  # noqa: PLC0415 - brings numpy

        return [Burst(kind, requests, prompt, new, seed) for kind in kinds or POPULARITIES]

    return _run(Settings(**settings), prompt_tokens, new_tokens, workloads)


def _check_count(rate: float, duration: float) -> None:
    if not 1 <= int(rate * duration) <= 1_000_000:
        raise click.UsageError(f"--rate {rate:g} for --duration {duration:g} are {int(rate * duration)} requests")


def _check_choice(settings: Settings, *, base_alone: bool) -> None:
    """Raises UsageError where what to ask is said twice."""
    if settings.names and settings.match is not None:
        raise click.UsageError("--adapter and --match are both given: choose one")
    if base_alone and (settings.names or settings.match is not None):
        raise click.UsageError("--adapters 0 asks the base alone: leave --adapter and --match out")


def _run(
    settings: Settings, prompt: Lengths, new: Lengths, workloads: Workloads, *, base_alone: bool | None = None
) -> int:
    """Look at the server, run each workload, print and write what came. Returns the exit code.

    base_alone: whether no adapter is asked for; None: the workloads are of adapters.
    """
    from weft.server.bench.plot import check_can_plot  # noqa: PLC0415
    from weft.server.bench.target import survey  # noqa: PLC0415 - brings the stubs
    from weft.server.bench.workload import fitted  # noqa: PLC0415 - brings numpy

    _check_choice(settings, base_alone=bool(base_alone))
    if settings.plot is not None:
        check_can_plot()
    for path in (settings.output, settings.plot):
        if path is not None:
            check_can_write(path)
    with connected(settings.server) as channel:
        target = survey(channel)
    otherwise = "" if base_alone is None else ", or give --adapters 0"
    adapters = [] if base_alone else target.choose(settings.names, settings.match, otherwise)
    if settings.fit:
        prompt, new = fitted(prompt, new, target.context_tokens)
    target.check_fits(prompt, new)
    planned = workloads(target, len(adapters), prompt, new)
    most = max((workload.adapters for workload in planned), default=0)
    if most > len(adapters):
        raise click.ClickException(f"{most} adapters are asked for, and {len(adapters)} are there: load more, or less")
    runs = _run_all(settings, target, adapters, planned)
    print_runs([(workload, summary) for workload, summary, _ in runs])
    _write(settings, target, runs)
    return 0 if all(summary.answered for _, summary, _ in runs) else 1


Runs = list[tuple["Trace | Burst", "Summary", "list[Record]"]]


def _run_all(settings: Settings, target: Target, adapters: Sequence[str], planned: Sequence[Trace | Burst]) -> Runs:
    from weft.server.bench import generator  # noqa: PLC0415 - brings grpc.aio
    from weft.server.bench.summary import summarize  # noqa: PLC0415

    runs: Runs = []
    with Watch() as watch, failures_in_words(settings.server):
        for workload in planned:
            requests = generator.prepare(workload.schedule(), adapters, target.pool, workload.seed)
            watch.begin(workload, len(requests))
            ran = asyncio.run(generator.run(settings.server, requests, settings.timeout, watch.ended))
            runs.append((workload, summarize(ran.records, ran.busy_s, ran.wall_s), ran.records))
    return runs


def _write(settings: Settings, target: Target, runs: Runs) -> None:
    from weft.server.bench import plot  # noqa: PLC0415

    if settings.output is not None:
        found = [
            {
                "workload": workload.to_json(),
                "summary": summary.to_json(),
                "requests": [record.to_json() for record in records],
            }
            for workload, summary, records in runs
        ]
        text = json.dumps({"server": target.to_json(), "runs": _finite(found)}, indent=1, allow_nan=False)
        settings.output.write_text(text + "\n", encoding="utf-8")
    if settings.plot is not None:
        axis, points = _axis([(workload.to_json(), summary) for workload, summary, _ in runs])
        plot.plot(settings.plot, axis, points)


def _axis(runs: Sequence[tuple[Mapping[str, Any], Summary]]) -> tuple[str, list[tuple[float | str, list[Any]]]]:
    """What the runs vary, the adapters first, and the runs at each of its values."""
    from weft.server.bench.plot import Point  # noqa: PLC0415

    varied = [
        name
        for name in ("popularity", "adapters", "alpha", "cv")
        if len({workload[name] for workload, _ in runs if name in workload}) > 1
    ]
    axis = varied[0] if varied else "adapters"
    points: dict[float | str, list[Any]] = {}
    for workload, summary in runs:
        ttft = summary.ttft
        point = Point(summary.requests_per_s, *((ttft.p50, ttft.p99) if ttft else (None, None)))
        points.setdefault(workload[axis], []).append(point)
    return axis, list(points.items())


def _finite(found: Any) -> Any:
    """JSON has no infinity: null in its place."""
    match found:
        case dict():
            return {key: _finite(value) for key, value in found.items()}
        case list() | tuple():
            return [_finite(value) for value in found]
        case float() if not math.isfinite(found):
            return None
    return found
