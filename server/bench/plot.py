"""Throughput and time to the first token against what a run varied, as a picture. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from weft.errors import WeftError


class CannotPlot(WeftError):
    """matplotlib is not there; the message says how to get it."""


@dataclass(frozen=True, slots=True)
class Point:
    """What one run gave. TTFT in seconds; None where no request was answered."""

    requests_per_s: float
    ttft_p50_s: float | None
    ttft_p99_s: float | None


def check_can_plot() -> None:
    """Raises CannotPlot. Before a run, so that none is for nothing."""
    if find_spec("matplotlib") is None:
        raise CannotPlot("plots need matplotlib: pip install 'weft[bench]'")


def plot(path: Path, axis: str, points: Sequence[tuple[float | str, Sequence[Point]]]) -> None:
    """One place on the axis for each value that was run, evenly apart; its rounds as a median and a range."""
    check_can_plot()
    import matplotlib as mpl  # noqa: PLC0415 - an extra
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context({"svg.hashsalt": "weft", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        rates, firsts = figure.subplots(1, 2)
        names = [f"{value:,}" if isinstance(value, int) else str(value) for value, _ in points]
        _draw(rates, names, [[point.requests_per_s for point in rounds] for _, rounds in points], "median, range")
        rates.set(xlabel=axis, ylabel="requests/s", title="Throughput")
        for label, attribute in (("p50", "ttft_p50_s"), ("p99", "ttft_p99_s")):
            values = [[v for point in rounds if (v := getattr(point, attribute)) is not None] for _, rounds in points]
            _draw(firsts, names, values, label)
        firsts.set(xlabel=axis, ylabel="seconds", title="Time to first token")
        firsts.legend(frameon=False)
        for axes in (rates, firsts):
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)


def _draw(axes: Any, names: Sequence[str], rounds: Sequence[Sequence[float]], label: str) -> None:
    kept = [(name, values) for name, values in zip(names, rounds, strict=True) if values]
    middle = [median(values) for _, values in kept]
    below = [at - min(values) for at, (_, values) in zip(middle, kept, strict=True)]
    above = [max(values) - at for at, (_, values) in zip(middle, kept, strict=True)]
    axes.errorbar([name for name, _ in kept], middle, (below, above), marker="o", capsize=3, linewidth=1, label=label)
