"""What a run's requests come to: rates, latencies by percentile, and what share was on time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

OK = "OK"
SLO_TTFT_S = 6.0
"""A first token that comes within this is on time (S-LoRA's objective)."""

LATE_S = 0.05
"""Requests that leave later than this, at the 99th percentile, say that the generator was the bottleneck."""

BUSY = 0.9
"""So does a generator that computes for this share of the run."""


@dataclass(frozen=True, slots=True)
class Record:
    """One request, in seconds from the run's start. outcome: OK, or the gRPC code that ended it.

    sent_s is when it left; first_token_s and last_token_s are None where no token came.
    """

    adapter: str
    scheduled_s: float
    sent_s: float
    first_token_s: float | None
    last_token_s: float | None
    ended_s: float
    prompt_tokens: int
    new_tokens: int
    outcome: str
    message: str = ""
    gaps_s: tuple[float, ...] = ()
    """What the client waited between its messages of tokens."""

    @property
    def ttft_s(self) -> float | None:
        """From the schedule, not from when it left."""
        return None if self.first_token_s is None else self.first_token_s - self.scheduled_s

    @property
    def latency_s(self) -> float | None:
        return None if self.last_token_s is None else self.last_token_s - self.scheduled_s

    @property
    def tpot_s(self) -> float | None:
        """(end to end - TTFT) / (n - 1)."""
        if self.first_token_s is None or self.last_token_s is None or self.new_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.new_tokens - 1)

    def to_json(self) -> dict[str, object]:
        record = asdict(self)
        del record["gaps_s"]
        return record


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one quantity, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None where there are none."""
        if not values:
            return None
        ordered = sorted(values)
        p50, p90, p99 = (percentile(ordered, percent) for percent in (50, 90, 99))
        return cls(sum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The smallest of the ascending values that so many per cent of all do not exceed."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@dataclass(frozen=True, slots=True)
class Summary:
    """A run at a glance. Latencies are of the requests that were answered; the SLO is held against all."""

    requests: int
    outcomes: dict[str, int]
    duration_s: float
    offered_per_s: float
    requests_per_s: float
    tokens_per_s: float
    slo_attainment: float
    latency: Spread | None
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    lateness: Spread | None
    generator_busy: float

    @property
    def answered(self) -> int:
        return self.outcomes.get(OK, 0)

    @property
    def warning(self) -> str | None:
        """Why the figures may be the generator's and not the server's."""
        late = self.lateness.p99 if self.lateness else 0.0
        reasons = []
        if late > LATE_S:
            reasons.append(f"one request in a hundred left {late * 1e3:.0f} ms late or more")
        if self.generator_busy > BUSY:
            reasons.append(f"it computed for {self.generator_busy:.0%} of the run")
        if not reasons:
            return None
        return f"the load generator was a bottleneck: {' and '.join(reasons)}; give it a core, or a lower --rate"

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "warning": self.warning}


def summarize(records: Sequence[Record], busy_s: float, wall_s: float) -> Summary:
    """busy_s: processor seconds that the generator took; wall_s: from its first request to the end of the last."""
    answered = [record for record in records if record.outcome == OK]
    duration_s = max((record.ended_s for record in records), default=0.0) or math.inf
    last_due_s = max((record.scheduled_s for record in records), default=0.0)
    on_time = [record for record in answered if record.ttft_s is not None and record.ttft_s < SLO_TTFT_S]
    return Summary(
        requests=len(records),
        outcomes=dict(Counter(record.outcome for record in records).most_common()),
        duration_s=duration_s,
        offered_per_s=len(records) / last_due_s if last_due_s else math.inf,
        requests_per_s=len(answered) / duration_s,
        tokens_per_s=sum(record.new_tokens for record in records) / duration_s,
        slo_attainment=len(on_time) / len(records) if records else 0.0,
        latency=_spread([record.latency_s for record in answered]),
        ttft=_spread([record.ttft_s for record in answered]),
        tpot=_spread([record.tpot_s for record in answered]),
        itl=_spread([gap for record in answered for gap in record.gaps_s]),
        lateness=_spread([record.sent_s - record.scheduled_s for record in records]),
        generator_busy=busy_s / wall_s if wall_s else 0.0,
    )


def _spread(values: Sequence[float | None]) -> Spread | None:
    return Spread.of([value for value in values if value is not None])
