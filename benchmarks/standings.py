"""What `side_by_side.py` makes of its measurements: rates, ratios within rounds, and the floor beside them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from environments import Tokens
from floor import Rates, Sizes, ratios
from report import Samples, table

if TYPE_CHECKING:
    from systems import Cell, System

REFERENCE = "transformers `generate`; PEFT's mixed batch, float32"
PLAIN, WEFT = "Weft, no adapters loaded", "Weft"


@dataclass(frozen=True)
class Scenario:
    """So many requests to so many different adapters; 0: to the base."""

    name: str
    requests: int
    distinct: int

    @property
    def adapters(self) -> list[int]:
        return [index % self.distinct for index in range(self.requests)] if self.distinct else []

    @property
    def names(self) -> list[str]:
        return [f"a{index:02d}" for index in self.adapters] or [""] * self.requests


ONE, ALL = Scenario("base, 1 request", 1, 0), Scenario("base, 16 requests", 16, 0)
DISTINCT = Scenario("16 adapters", 16, 16)
SHARED, SAME = Scenario("4 adapters", 16, 4), Scenario("1 adapter", 16, 1)
SCENARIOS = (ONE, ALL, DISTINCT, SHARED, SAME)


class Lengths(Protocol):
    """Of each request."""

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def new_tokens(self) -> int: ...

    @property
    def scenarios(self) -> list[Scenario]: ...


@dataclass
class Standing:
    """One system. error: why it is not run; tokens: its rows for unlike adapters, by round."""

    system: System
    cells: dict[str, Cell] = field(default_factory=dict)
    tokens: dict[int, Tokens] = field(default_factory=dict)
    error: str = ""
    is_up: bool = False

    def whole(self, scenario: Scenario, lengths: Lengths) -> list[float]:
        """Tokens a second of each round, prompts included."""
        cell = self.cells.get(scenario.name)
        return [scenario.requests * lengths.new_tokens / seconds for seconds in cell.whole_s] if cell else []

    def decode(self, scenario: Scenario, lengths: Lengths) -> list[float]:
        """Of decoding alone."""
        cell = self.cells.get(scenario.name)
        if not cell:
            return []
        tokens = scenario.requests * (lengths.new_tokens - 1)
        return [
            tokens / (whole - first) for whole, first in zip(cell.whole_s, cell.first_s, strict=True) if whole > first
        ]

    def agreement(self, standings: Sequence[Standing]) -> str:
        """How many rows of all rounds have PEFT's tokens."""
        reference = next((other for other in standings if other.system.name == REFERENCE), None)
        turns = sorted(set(self.tokens) & set(reference.tokens)) if reference else []
        if reference is None or not turns:
            return "-"
        pairs = [pair for turn in turns for pair in zip(self.tokens[turn], reference.tokens[turn], strict=True)]
        return f"{sum(a == b for a, b in pairs)} of {len(pairs)}"


def show(standings: Sequence[Standing], lengths: Lengths, rates: Rates, sizes: Sizes) -> str:
    parts = [show_rates(standings, lengths)]
    by_name = {standing.system.name: standing for standing in standings}
    plain = by_name.get(PLAIN)
    if plain is not None and plain.whole(ALL, lengths):
        ours = [standing for name, standing in by_name.items() if name.startswith(WEFT) and standing is not plain]
        parts.append(show_floor(plain, ours, lengths, rates, sizes))
        parts.append(show_ratios(plain, by_name, lengths))
    left_out = [f"- {standing.system.name}: not run: {standing.error}" for standing in standings if standing.error]
    left_out += [
        f"- {standing.system.name}, {name}: not run: {cell.error}"
        for standing in standings
        for name, cell in standing.cells.items()
        if cell.error
    ]
    return "\n\n".join([*parts, *(["\n".join(left_out)] if left_out else [])])


def show_rates(standings: Sequence[Standing], lengths: Lengths) -> str:
    head = ["tokens/s, median (range); decoding alone", *(each.name for each in lengths.scenarios), "rows as PEFT's"]
    rows = [
        [
            standing.system.name,
            *(_rate(standing, scenario, lengths) for scenario in lengths.scenarios),
            standing.agreement(standings),
        ]
        for standing in standings
    ]
    return table(head, rows)


def _rate(standing: Standing, scenario: Scenario, lengths: Lengths) -> str:
    whole, decode = standing.whole(scenario, lengths), standing.decode(scenario, lengths)
    if not whole:
        return "not run" if standing.error else "-"
    return f"{Samples(whole).show()}; {statistics.median(decode):.1f}" if decode else Samples(whole).show()


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Samples:
    """Our rate over theirs, round by round."""
    return Samples([a / b for a, b in zip(ours, theirs, strict=False)])


def show_floor(plain: Standing, ours: Sequence[Standing], lengths: Lengths, rates: Rates, sizes: Sizes) -> str:
    """Weft with adapters over Weft with none, beside what bytes and operations alone allow."""
    head = ["speed over Weft with no adapters", "prompts and answers", "floor", "decoding alone", "floor"]
    rows = []
    for standing in ours:
        for scenario in lengths.scenarios:
            against = scenario if not scenario.distinct else ALL
            if not standing.whole(scenario, lengths) or not plain.whole(against, lengths):
                continue
            cells = [
                paired(standing.whole(scenario, lengths), plain.whole(against, lengths)).show(digits=2),
                paired(standing.decode(scenario, lengths), plain.decode(against, lengths)).show(digits=2),
            ]
            floor = ["1.00", "1.00"]
            if scenario.distinct:
                allowed = ratios(rates, sizes, scenario.adapters, lengths.prompt_tokens, lengths.new_tokens)
                floor = [f"{allowed.whole:.2f}", f"{allowed.decode:.2f}"]
            what = scenario.name if scenario.distinct else f"{scenario.name}, adapters loaded and unused"
            rows.append([f"{standing.system.name}: {what}", cells[0], floor[0], cells[1], floor[1]])
    measured = f"{rates.bytes_per_s / 1e9:.1f} GB/s and {rates.flops_per_s / 1e9:.0f} GFLOP/s, measured in this run"
    return f"{table(head, rows)}\n\nThe floor is counted from the bytes and products of a step at {measured}."


def show_ratios(plain: Standing, by_name: dict[str, Standing], lengths: Lengths) -> str:
    """Weft against transformers and against the best of its peers, by what is asked."""
    peers = [standing for name, standing in by_name.items() if not name.startswith(WEFT)]
    lines = []
    for scenario in lengths.scenarios:
        ours = by_name[WEFT] if scenario.distinct and WEFT in by_name else plain
        if not ours.whole(scenario, lengths):
            continue
        words = []
        reference = by_name.get(REFERENCE)
        if reference and reference.whole(scenario, lengths):
            name = "PEFT's mixed batch" if scenario.distinct else "transformers' `generate`"
            ratio = paired(ours.whole(scenario, lengths), reference.whole(scenario, lengths))
            words.append(f"{ratio.show(digits=2)} times {name} in float32")
        for dtypes in (("float32",), ("float32", "bfloat16")):
            best = _best([peer for peer in peers if peer.system.dtype in dtypes], scenario, lengths)
            if best is not None:
                ratio = paired(ours.whole(scenario, lengths), best.whole(scenario, lengths))
                which = "the best peer in float32" if len(dtypes) == 1 else "the best peer at its best"
                words.append(f"{ratio.show(digits=2)} times {which} ({best.system.name})")
        if words:
            lines.append(f"- {scenario.name}: Weft runs at {'; '.join(words)}.")
    return "\n".join(lines)


def _best(peers: Sequence[Standing], scenario: Scenario, lengths: Lengths) -> Standing | None:
    able = [peer for peer in peers if peer.whole(scenario, lengths)]
    return max(able, key=lambda peer: statistics.median(peer.whole(scenario, lengths)), default=None)
