"""Whose turn it is: callers share the engine evenly, and each caller's adapters share what it gets by their weights.

Virtual token counters, as in Sheng et al. 2024, "Fairness in Serving Large Language Models": every share counts what it
was served, and the one that was served least goes first. One that had nothing queued is lifted to the least of those
that have, so that nobody saves up turns. Plain Python: it knows counts, not tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from typing import Generic, TypeVar

from weft.server.engine.sequence import Sequence

PROMPT_COST = 1.0
OUTPUT_COST = 2.0
"""What a token counts; one that is generated takes a step, one of a prompt shares it with many."""

PRIORITY_TOKENS = 1024.0
"""How far ahead of its turn one step of priority puts a request, in what its adapter is served meanwhile."""

MAX_IDLE = 1024
"""Shares of one level that are remembered while nobody asks for them; the ones that are least ahead go first."""

_Entry = tuple[float, int, Sequence]
"""A waiting request: its turn within its flow, a number that no other has, and itself."""


@dataclass(slots=True, eq=False)
class _Share(ABC):
    """served: what it got, in virtual tokens; num_members: requests that wait or run."""

    served: float = 0.0
    num_members: int = 0
    weight: float = 1.0

    @property
    @abstractmethod
    def can_go(self) -> bool:
        """Whether something of it waits that does not wait for an adapter."""


_S = TypeVar("_S", bound=_Share)


class _Level(Generic[_S]):
    """Shares side by side. Those that are idle are kept only while they are ahead of some that are not."""

    def __init__(self, make: Callable[[str], _S]) -> None:
        self._make = make
        self._idle: dict[str, _S] = {}
        self.active: dict[str, _S] = {}
        self.left_last: _S | None = None
        """Whose request was the last to leave the queue in order to run."""

    @property
    def num_known(self) -> int:
        return len(self.active) + len(self._idle)

    def join(self, name: str) -> _S:
        """One more request of this share."""
        share = self.active.get(name)
        if share is None:
            share = self.active[name] = self._idle.pop(name, None) or self._make(name)
        share.num_members += 1
        return share

    def leave(self, name: str) -> None:
        """One request less."""
        share = self.active[name]
        share.num_members -= 1
        if share.num_members:
            return
        del self.active[name]
        if not self.active:  # nobody is left to be ahead of
            self._idle.clear()
            self.left_last = None
        elif share.served > self._least():
            self._idle[name] = share
            if len(self._idle) > MAX_IDLE:
                self._forget()

    def lift(self, share: _S) -> None:
        """Let one that has nothing queued, and is about to, begin beside the least of those that have.

        Those that merely run, or wait for an adapter, may be far behind: beside them it would get a lead over the rest.
        """
        queued = min((other.served for other in self.active.values() if other.can_go), default=None)
        if queued is None and self.left_last is not None:
            queued = self.left_last.served
        share.served = max(share.served, queued or 0.0)

    def _least(self) -> float:
        """Nobody is lifted to less."""
        last = [] if self.left_last is None else [self.left_last.served]
        return min((*last, *(share.served for share in self.active.values())), default=0.0)

    def _forget(self) -> None:
        """Drop who is no longer ahead, and then who is least ahead until half the room is free."""
        least = self._least()
        ahead = sorted((item for item in self._idle.items() if item[1].served > least), key=lambda item: item[1].served)
        self._idle = dict(ahead[-(MAX_IDLE // 2) :])


@dataclass(slots=True, eq=False)
class _Flow(_Share):
    """The requests of one caller to one adapter (or mix, or the base). priority_tokens: see `FairQueue`.

    priorities: how many wait with each; is_held_up: its adapter is not there.
    """

    priority_tokens: float = PRIORITY_TOKENS
    waiting: list[_Entry] = field(default_factory=list)
    priorities: Counter[int] = field(default_factory=Counter)
    is_held_up: bool = False

    @property
    def can_go(self) -> bool:
        return bool(self.waiting) and not self.is_held_up

    def turn_at(self, priority: int) -> float:
        """Where the flow stands among the caller's while it has this priority."""
        return self.served - priority * self.priority_tokens

    def turn(self, passed: Counter[int] | None = None) -> float:
        """Where it stands by the highest priority of those that wait, but for so many of each that were passed by."""
        left = self.priorities if passed is None else self.priorities - passed
        return self.turn_at(max(left))


@dataclass(slots=True, eq=False)
class _Caller(_Share):
    flows: _Level[_Flow] = field(kw_only=True)

    @property
    def can_go(self) -> bool:
        return any(flow.can_go for flow in _flows(self))


@dataclass(slots=True, eq=False)
class _Place:
    """Where a request belongs, its entry in the flow whenever it waits, and how many of its tokens were charged."""

    caller: _Caller
    flow: _Flow
    entry: _Entry
    waits: bool = False
    num_charged: int = 0


class FairQueue:
    """The requests that wait, and who was served how much. Also knows those that run: they are charged for.

    Within a flow requests go in the order of arrival, but that each step of priority is a head start of so many
    tokens of what the flow is served: enough to pass by others, never to hold them up for ever. The highest priority of
    those that wait is the flow's head start among the caller's.
    """

    def __init__(self, weights: Mapping[str, float] | None = None, priority_tokens: float = PRIORITY_TOKENS) -> None:
        """weights by adapter, else 1: a token of an adapter of weight 2 counts half. A mix has the least of its own."""
        self._priority_tokens = priority_tokens
        self._weights = dict(weights or {})
        self._callers: _Level[_Caller] = _Level(lambda _: _Caller(flows=_Level(self._make_flow)))
        self._places: dict[Sequence, _Place] = {}
        self._num_waiting = 0
        self._num_added = 0
        self._held_up: list[_Flow] = []

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """All that wait, in no order."""
        return (sequence for sequence, place in self._places.items() if place.waits)

    def adapters(self) -> set[str]:
        """Names of the adapters that requests wait for."""
        callers = self._callers.active.values()
        labels = {label for caller in callers for label, flow in caller.flows.active.items() if flow.waiting}
        return {name for label in labels for name in label.split("+") if name}

    def append(self, sequence: Sequence) -> None:
        """Add one that has just come."""
        caller = self._callers.join(sequence.request.caller)
        flow = caller.flows.join(sequence.adapter_label)
        self._lift(caller, flow)
        self._num_added += 1
        entry = (flow.turn_at(sequence.request.priority), self._num_added, sequence)
        place = self._places[sequence] = _Place(caller, flow, entry)
        self._wait(place)

    def put_back(self, sequence: Sequence) -> None:
        """Let one that ran wait again, where it stood in its flow: by its arrival and its priority."""
        place = self._places[sequence]
        self._lift(place.caller, place.flow)
        self._wait(place)

    def remove(self, sequence: Sequence) -> None:
        """Take one out that is going to run."""
        place = self._places[sequence]
        self._take_out(place)
        self._callers.left_last = place.caller
        place.caller.flows.left_last = place.flow

    def leave(self, sequence: Sequence) -> None:
        """Forget one that has ended, whether it waits or runs."""
        self.charge(sequence, 0)
        place = self._places[sequence]
        if place.waits:
            self._take_out(place)
        del self._places[sequence]
        place.caller.flows.leave(sequence.adapter_label)
        self._callers.leave(sequence.request.caller)

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """Charge for the next `num_tokens` of a sequence, which a step is about to compute, and for what it generated.

        Each token is charged once: what comes from a cache, and what is computed again, costs nothing.
        """
        place = self._places[sequence]
        cost = _cost(place, sequence, num_tokens) / place.flow.weight
        place.flow.served += cost
        place.caller.served += cost

    def turn_of(self, sequence: Sequence) -> tuple[float, float]:
        """Where a request stands: the smaller goes first. One that waits stands where its flow does.

        One that runs goes on by its own priority: it gains nothing by those of its flow that wait.
        """
        place = self._places[sequence]
        turn = place.flow.turn() if place.waits else place.flow.turn_at(sequence.request.priority)
        return place.caller.served, turn

    def hold_up(self, sequences: Seq[Sequence]) -> None:
        """Only the flows of these wait for adapters now: whoever comes is not put beside them, as they fall behind."""
        for flow in self._held_up:
            flow.is_held_up = False
        self._held_up = [self._places[sequence].flow for sequence in sequences]
        for flow in self._held_up:
            flow.is_held_up = True

    def crowding_out(self, sequence: Sequence, running: Seq[Sequence]) -> Iterator[Sequence]:
        """Who may give way to one that waits, in turn: each time the youngest of the share that holds the most by then.

        running is given in order of age. Ends where that share would then hold less than the one that the sequence adds
        to, or would have the earlier turn, so that its request would come back at once.
        """
        place = self._places[sequence]
        callers: Counter[_Caller] = Counter()
        flows: dict[_Caller, Counter[_Flow]] = {place.caller: Counter()}
        members: dict[_Flow, list[Sequence]] = {}
        for other in running:
            theirs = self._places[other]
            callers[theirs.caller] += 1
            flows.setdefault(theirs.caller, Counter())[theirs.flow] += 1
            members.setdefault(theirs.flow, []).append(other)
        while True:
            caller = _largest(callers, place.caller)
            flow = _largest(flows[caller], place.flow)
            if flow is place.flow:
                return
            victim = members[flow].pop()
            best = max((victim.request.priority, *flow.priorities))
            if self.turn_of(sequence) >= (caller.served, flow.turn_at(best)):
                return
            yield victim
            callers[caller] -= 1
            flows[caller][flow] -= 1

    def in_turn(self) -> Iterator[Sequence]:
        """All that wait, the next one first.

        The one that came last may be taken out and charged for before the next is asked for; others must stay.
        """
        return self._walk(lambda sequence: 0.0)

    def forecast(self) -> Iterator[Sequence]:
        """All that wait, in the order in which they will be served if nobody comes and every prompt fits."""
        return self._walk(lambda sequence: sequence.num_pending * PROMPT_COST / self._places[sequence].flow.weight)

    def check(self) -> None:
        """Audit the counts. Raises AssertionError."""
        waiting = sum(len(flow.waiting) for caller in self._callers.active.values() for flow in _flows(caller))
        assert waiting == self._num_waiting == sum(1 for _ in self), "a waiting request is lost"
        members = sum(flow.num_members for caller in self._callers.active.values() for flow in _flows(caller))
        assert members == len(self._places), "a flow counts requests that are gone"
        for caller in self._callers.active.values():
            for flow in _flows(caller):
                priorities = Counter(entry[2].request.priority for entry in flow.waiting)
                assert flow.priorities == priorities, "a flow counts priorities of none that wait"
        assert self._places or not self._callers.num_known, "an idle queue remembers somebody"

    def _make_flow(self, label: str) -> _Flow:
        weight = min(self._weights.get(name, 1.0) for name in label.split("+"))
        return _Flow(weight=weight, priority_tokens=self._priority_tokens)

    def _lift(self, caller: _Caller, flow: _Flow) -> None:
        """Before a request of theirs waits."""
        if not any(other.waiting for other in _flows(caller)):
            self._callers.lift(caller)
        if not flow.waiting:
            caller.flows.lift(flow)

    def _wait(self, place: _Place) -> None:
        place.waits = True
        insort(place.flow.waiting, place.entry)
        place.flow.priorities[place.entry[2].request.priority] += 1
        self._num_waiting += 1

    def _take_out(self, place: _Place) -> None:
        assert place.waits, "it does not wait"
        place.waits = False
        del place.flow.waiting[bisect_left(place.flow.waiting, place.entry)]
        place.flow.priorities -= Counter((place.entry[2].request.priority,))
        self._num_waiting -= 1

    def _walk(self, cost: Callable[[Sequence], float]) -> Iterator[Sequence]:
        """All that wait, in turn, where each that stays adds its cost to its flow and its caller for the rest."""
        more: dict[_Share, float] = {}
        passed: dict[_Flow, Counter[int]] = {}
        callers = []
        for caller in self._callers.active.values():
            waiting = [flow for flow in _flows(caller) if flow.waiting]
            flows = [(flow.turn(), flow.waiting[0][1], flow, 0) for flow in waiting]
            if flows:
                heapify(flows)
                callers.append((caller.served, flows[0][1], caller, flows))
        heapify(callers)
        while callers:
            _, _, caller, flows = callers[0]
            _, _, flow, at = flows[0]
            entry = flow.waiting[at]
            yield entry[2]
            if at < len(flow.waiting) and flow.waiting[at] is entry:
                at += 1
                passed.setdefault(flow, Counter())[entry[2].request.priority] += 1
                for share in (flow, caller):
                    more[share] = more.get(share, 0.0) + cost(entry[2])
            if at < len(flow.waiting):
                entry = flow.waiting[at]
                heapreplace(flows, (flow.turn(passed.get(flow)) + more.get(flow, 0.0), entry[1], flow, at))
            else:
                heappop(flows)
            if flows:
                heapreplace(callers, (caller.served + more.get(caller, 0.0), flows[0][1], caller, flows))
            else:
                heappop(callers)


def _flows(caller: _Caller) -> Iterator[_Flow]:
    return iter(caller.flows.active.values())


def _cost(place: _Place, sequence: Sequence, num_tokens: int) -> float:
    """What is not charged yet of the tokens up to those of the next step, in virtual tokens; notes them as charged."""
    length = len(sequence.request.prompt)
    if sequence.num_generated:
        start, reach = max(place.num_charged, length), len(sequence.tokens)
    else:
        start, reach = max(place.num_charged, sequence.num_computed), sequence.num_computed + num_tokens
    if reach <= start:
        return 0.0
    place.num_charged = reach
    num_prompt = max(0, min(reach, length) - start)
    return PROMPT_COST * num_prompt + OUTPUT_COST * (reach - start - num_prompt)


def _largest(counts: Counter[_S], own: _S) -> _S:
    """The share that holds the most for its weight; its own where none would hold more than it with one moved there."""
    largest = max(counts, key=lambda share: counts[share] / share.weight, default=own)
    is_larger = (counts[largest] - 1) / largest.weight >= (counts[own] + 1) / own.weight
    return largest if is_larger else own
