"""What every benchmark reports with: samples, the machine, and a section of a document."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
import transformers


@dataclass
class Samples:
    """Measurements of one thing, in the order in which they were made."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def percentile(self, percent: float) -> float:
        """The smallest value that so many per cent of all do not exceed."""
        ordered = sorted(self.values)
        return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]

    def show(self, factor: float = 1.0, digits: int = 1) -> str:
        """`median (lowest to highest)`."""
        low, median, high = (f"{value * factor:.{digits}f}" for value in (self.low, self.median, self.high))
        return f"{median} ({low} to {high})"

    def to_json(self) -> dict[str, object]:
        return {"median": self.median, "low": self.low, "high": self.high, "samples": self.values}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def machine() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    cores = f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"
    return f"{cores}, {versions}, {torch.get_num_threads()} threads"


def write_section(path: Path, mark: str, report: str) -> None:
    """Replace what stands between the two marks of the document."""
    start, end = f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->\n"
    text = path.read_text()
    path.write_text(text.split(start)[0] + start + report + end + text.split(end)[1])
