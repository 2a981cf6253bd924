"""A server's metrics, read twice: what happened between."""

from __future__ import annotations

import http.client
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import click
from prometheus_client.parser import text_string_to_metric_families

_TIMEOUT_S = 10.0
_MARK = "weft_ready"
"""What every scrape of Weft holds."""

Series = tuple[str, tuple[tuple[str, str], ...]]
"""A sample's name and its labels in order."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """All samples at one time, in seconds of a monotonic clock."""

    at_s: float
    samples: Mapping[Series, float]

    def value(self, name: str, **wanted: str) -> float:
        """The sum over the series that have these labels; 0 where there is none."""
        return sum(value for labels, value in self.series(name) if wanted.items() <= labels.items())

    def series(self, name: str) -> list[tuple[dict[str, str], float]]:
        return [(dict(labels), value) for (found, labels), value in self.samples.items() if found == name]


def scrape(address: str, clock: Callable[[], float] = time.monotonic) -> Scrape:
    """Raises click.ClickException where there are no metrics of Weft's. address: HOST:PORT."""
    url = f"http://{address}/metrics"
    connection = http.client.HTTPConnection(address, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        at_s = clock()
        families = list(text_string_to_metric_families(text))
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        hint = "start the server, or say where its metrics are with --metrics HOST:PORT"
        raise click.ClickException(f"{url} gives no metrics ({reason}): {hint}") from None
    finally:
        connection.close()
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }
    if not any(name == _MARK for name, _ in samples):
        raise click.ClickException(f"{url} gives metrics that are not Weft's: say where they are with --metrics")
    return Scrape(at_s, samples)


@dataclass(frozen=True, slots=True)
class Interval:
    """What was counted between two scrapes."""

    before: Scrape
    after: Scrape

    @property
    def seconds(self) -> float:
        return max(self.after.at_s - self.before.at_s, 1e-9)

    def rate(self, name: str) -> float:
        """Of a counter over all its series, a second."""
        return sum(increase for _, increase in self._increases(name)) / self.seconds

    def rates(self, name: str, label: str) -> dict[str, float]:
        """The same for each value of a label, where it is not 0."""
        totals: defaultdict[str, float] = defaultdict(float)
        for labels, increase in self._increases(name):
            totals[labels.get(label, "")] += increase / self.seconds
        return {value: total for value, total in totals.items() if total}

    def share(self, part: str, whole: str) -> float | None:
        """Of one counter's increase in another's; None where there was none."""
        total = self.rate(whole)
        return self.rate(part) / total if total else None

    def quantile(self, histogram: str, q: float) -> float | None:
        """As Prometheus estimates it, linear within a bucket; None where nothing was observed."""
        counts: defaultdict[float, float] = defaultdict(float)
        for labels, increase in self._increases(f"{histogram}_bucket"):
            counts[float(labels["le"])] += increase
        bounds = sorted(counts)
        total = counts[bounds[-1]] if bounds else 0.0
        if not total:
            return None
        low, below = 0.0, 0.0
        for bound in bounds:
            if counts[bound] >= q * total:
                if math.isinf(bound):
                    return low
                return low + (bound - low) * (q * total - below) / (counts[bound] - below)
            low, below = bound, counts[bound]
        return low

    def _increases(self, name: str) -> list[tuple[dict[str, str], float]]:
        """Of each series; one that has begun anew counts from 0."""
        found = []
        for labels, value in self.after.series(name):
            earlier = self.before.samples.get((name, tuple(sorted(labels.items()))), 0.0)
            found.append((labels, value - earlier if value >= earlier else value))
        return found
