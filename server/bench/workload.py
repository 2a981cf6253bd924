"""Which requests come when: S-LoRA's generator and Punica's popularity. Nothing here knows a server."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

import numpy

Popularity = Literal["identical", "distinct", "uniform", "skewed"]
POPULARITIES: tuple[Popularity, ...] = get_args(Popularity)
SKEW = 1.5
"""How many times as many requests each next adapter of a skewed batch has."""

Lengths = tuple[int, int]
"""Numbers of tokens: from the first to less than the second."""


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A request to come. adapter: its index among those that are asked for; None: the base."""

    at_s: float
    adapter: int | None
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Trace:
    """S-LoRA's synthetic workload (Sheng et al. 2023, section 7.1), as its own generator draws it.

    Each of int(rate * duration_s) requests asks for the adapter int(U^(1/alpha) * adapters), so 1 is uniform and a
    smaller alpha is more skewed. Gaps are Gamma with mean 1 / rate and coefficient of variation cv; 1 is Poisson.
    adapters: 0 asks the base.
    """

    rate: float
    duration_s: float
    adapters: int
    alpha: float = 1.0
    cv: float = 1.0
    prompt_tokens: Lengths = (8, 512)
    new_tokens: Lengths = (8, 512)
    seed: int = 42

    @property
    def num_requests(self) -> int:
        return int(self.rate * self.duration_s)

    def schedule(self) -> list[Scheduled]:
        """In the order of time. The draws and their order are S-LoRA's `benchmarks/trace.py`."""
        draw, count = numpy.random.RandomState(self.seed), self.num_requests
        adapters = (draw.power(self.alpha, count) * self.adapters).astype(int).tolist()
        prompts = draw.randint(*self.prompt_tokens, size=count).tolist()
        answers = draw.randint(*self.new_tokens, size=count).tolist()
        gaps = draw.gamma(1 / self.cv**2, self.cv**2 / self.rate, count)
        return [
            Scheduled(at_s, adapter if self.adapters else None, prompt, answer)
            for at_s, adapter, prompt, answer in zip(gaps.cumsum().tolist(), adapters, prompts, answers, strict=True)
        ]

    def vary(self, name: Literal["adapters", "alpha", "cv"], value: float) -> Trace:
        """The same with one of what S-LoRA's suite sweeps over."""
        match name:
            case "adapters":
                return replace(self, adapters=int(value))
            case "alpha":
                return replace(self, alpha=value)
            case "cv":
                return replace(self, cv=value)

    def to_json(self) -> dict[str, object]:
        return {"workload": "s-lora", **asdict(self)}


@dataclass(frozen=True, slots=True)
class Burst:
    """Punica's batch: so many requests at once, shared out over adapters by popularity, in random order."""

    popularity: Popularity
    requests: int
    prompt_tokens: Lengths = (8, 512)
    new_tokens: Lengths = (8, 512)
    seed: int = 42

    @property
    def adapters(self) -> int:
        return len(shares(self.popularity, self.requests))

    def schedule(self) -> list[Scheduled]:
        draw = numpy.random.RandomState(self.seed)
        adapters = [index for index, share in enumerate(shares(self.popularity, self.requests)) for _ in range(share)]
        draw.shuffle(adapters)
        prompts = draw.randint(*self.prompt_tokens, size=self.requests).tolist()
        answers = draw.randint(*self.new_tokens, size=self.requests).tolist()
        return [Scheduled(0.0, *each) for each in zip(adapters, prompts, answers, strict=True)]

    def to_json(self) -> dict[str, object]:
        return {"workload": "punica", **asdict(self), "adapters": self.adapters}


def shares(popularity: Popularity, count: int) -> list[int]:
    """How many of `count` requests each adapter gets (Chen et al. 2023, section 7), the most popular first.

    identical: one adapter; distinct: one each; uniform: ceil(sqrt(count)) adapters, alike; skewed: floor(SKEW^k).
    """
    match popularity:
        case "identical":
            return [count]
        case "distinct":
            return [1] * count
        case "uniform":
            adapters = math.ceil(math.sqrt(count))
            return [count // adapters + (index < count % adapters) for index in range(adapters)]
        case "skewed":
            parts: list[int] = []
            while (left := count - sum(parts)) > (part := math.floor(SKEW ** len(parts))):
                parts.append(part)
            return sorted([*parts, left], reverse=True)


def longest(lengths: Lengths) -> int:
    """The most tokens that can be drawn."""
    return lengths[1] - 1


def fitted(prompt_tokens: Lengths, new_tokens: Lengths, context_tokens: int) -> tuple[Lengths, Lengths]:
    """Both, made smaller by one factor so that the longest prompt and answer fit the context together."""
    factor = min(1.0, context_tokens / (longest(prompt_tokens) + longest(new_tokens)))
    return _scaled(prompt_tokens, factor), _scaled(new_tokens, factor)


def _scaled(lengths: Lengths, factor: float) -> Lengths:
    low, high = max(1, int(lengths[0] * factor)), int(longest(lengths) * factor) + 1
    return low, max(low + 1, high)


def prompt_ids(pool: Sequence[int], length: int, draw: numpy.random.RandomState) -> list[int]:
    """A prompt of tokens drawn from the pool: no two begin alike, so that no prefix cache helps."""
    return [pool[index] for index in draw.randint(0, len(pool), size=length)]
