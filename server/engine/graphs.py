"""Decode steps from buffers of fixed places, captured once a number of rows and replayed.

A step whose logits are all wanted and whose adapters are rank rows alone differs from another one of its size only in
numbers that the device can read: token ids, positions, block tables, lengths, and the work list of the adapters. Each
row attends by itself, also where it is one of several that a sequence was guessed ahead by: what those before it wrote
is in the cache by then. So one captured CUDA graph serves all such steps of a size, whatever their adapters; and steps
without adapters have a graph of their own, which does nothing for them. A step of fewer rows is padded with rows that
see nothing and write into a block that nobody reads.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from weft.errors import one_line
from weft.kernels.plan import Plan
from weft.kernels.work_list import Room, WorkList, make_work_list
from weft.server.engine.adapting import Adapting
from weft.server.engine.batch import Batch
from weft.server.engine.decode_attention import DecodeAttention, DecodeRows
from weft.server.engine.decode_buffers import DecodeBuffers
from weft.server.engine.kv_cache import KvCache
from weft.server.engine.step import AttentionOptions, Shared, Step

_log = logging.getLogger(__name__)

_PAIRS_A_ROW = 16
"""Of pages, that there is room for in a captured step, on average: rank 256."""

Run = Callable[[], torch.Tensor]


class Capture(Protocol):
    """Makes of a function one that does the same device work on the same memory, and gives the same tensor."""

    def __call__(self, run: Run) -> Run: ...


def replay_nothing(run: Run) -> Run:
    """Captures nothing: each replay runs the function. For devices without graphs."""
    return run


class CudaCapture:
    """Captures CUDA graphs, which share their memory: the result of one is gone once another is replayed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled, and libraries take their work space
                run()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            made = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return made

        return replay


class DecodeStep:
    """The step that is captured: one query a sequence, from the buffers."""

    def __init__(
        self,
        cache: KvCache,
        slots: torch.Tensor,
        rows: DecodeRows,
        attention: DecodeAttention,
        adapting: Adapting,
        plan: Plan | None,
    ) -> None:
        """plan: one whose work list is the captured one; None without adapters."""
        self._cache = cache
        self._slots = slots
        self._rows = rows
        self._attention = attention
        self._adapting = adapting
        self._plan = plan
        self.shared: Shared = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        keys, values = self._cache.layers[layer]
        keys.index_copy_(0, self._slots, key.transpose(0, 1))
        values.index_copy_(0, self._slots, value.transpose(0, 1))
        return self._attention(query, keys, values, self._rows, options)

    def adapt(self, modules: tuple[str, ...], inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        if self._plan is not None:
            self._adapting.adapt(self._plan, modules, inputs, outputs)


class Work(Protocol):
    """A work list on the device, in the one place where captured steps read it."""

    def load(self, work: WorkList) -> None: ...

    def plan(self, num_tokens: int) -> Plan:
        """One for so many rows, whose work is what was loaded last."""
        ...


Forward = Callable[[Step, torch.Tensor, torch.Tensor], torch.Tensor]
"""A model's pass over a step: from ids and positions, int64 [1, T], to logits [T, vocab]."""


@dataclass(frozen=True, slots=True)
class Means:
    """How a runner does its steps: how they are captured, how they attend, and what holds adapters' work lists.

    make_work: None where the adapters' kernel has no work list, and so can't be captured.
    """

    capture: Capture
    attention: DecodeAttention
    make_work: Callable[[Room, torch.device], Work] | None


class GraphRunner:
    """Runs the decode steps that can be captured; each number of rows of `sizes` when it first comes, or at `warm_up`.

    A model that can't be captured is run without, which is logged once.
    """

    def __init__(
        self, forward: Forward, cache: KvCache, adapting: Adapting, means: Means, max_rows: int, width: int
    ) -> None:
        """width: blocks of the longest context."""
        device = next(iter(cache.layers.values()))[0].device
        self.sizes = sizes_up_to(max_rows)
        self._forward = forward
        self._cache = cache
        self._adapting = adapting
        self._means = means
        self._buffers = DecodeBuffers(max_rows, width, cache, device)
        self._room = Room(
            _PAIRS_A_ROW * max_rows, max_rows, sum(len(group.sites) for group in adapting.groups.values())
        )
        self._work = means.make_work(self._room, device) if means.make_work is not None else None
        self._replays: dict[tuple[int, bool], Run] = {}
        self._taken: Plan | None = None
        self._is_off = False

    def run(self, batch: Batch) -> torch.Tensor | None:
        """Logits [num_tokens, vocab], valid until the next step; None for a step that must be run otherwise."""
        if self._is_off or not batch.wants_all or not batch.num_tokens <= self._buffers.max_rows:
            return None
        if batch.plan is not None and not self._take(batch.plan):
            return None
        self._buffers.load(batch)
        size = self.sizes[bisect_left(self.sizes, batch.num_tokens)]
        replay = self._replay(size, with_adapters=batch.plan is not None)
        return None if replay is None else replay()[: batch.num_tokens]

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture all there will ever be."""
        self._buffers.clear()
        for size in reversed(self.sizes):  # the largest first: the others find their memory in its
            for with_adapters in (False, True) if self._work is not None else (False,):
                self._replay(size, with_adapters=with_adapters)

    def _take(self, plan: Plan) -> bool:
        """Have the captured steps read this plan's work list, if they can do all of it."""
        if plan.patches or self._work is None:
            return False
        if plan is not self._taken:
            work = make_work_list(plan)
            if not self._room.holds(work.room):
                return False
            self._work.load(work)
            self._taken = plan
        return True

    def _replay(self, size: int, *, with_adapters: bool) -> Run | None:
        key = size, with_adapters
        if key not in self._replays and not self._is_off:
            try:
                self._replays[key] = self._means.capture(self._run_of(size, with_adapters=with_adapters))
            except RuntimeError as error:  # whatever a model does that a graph can't hold
                self._is_off = True
                _log.warning("decode steps can't be captured as CUDA graphs and run without: %s", one_line(error))
        return self._replays.get(key)

    def _run_of(self, size: int, *, with_adapters: bool) -> Run:
        parts = self._buffers.parts
        plan = self._work.plan(size) if self._work is not None and with_adapters else None
        step = DecodeStep(
            self._cache,
            parts.slots[:size],
            self._buffers.rows(size),
            self._means.attention,
            self._adapting,
            plan,
        )
        ids, positions = parts.ids[None, :size], parts.positions[None, :size]
        return lambda: self._forward(step, ids, positions)


def sizes_up_to(max_rows: int) -> list[int]:
    """Numbers of rows that steps are padded to: by a fifth at most beyond 8, by one row below."""
    sizes = [1, 2, 3, 4, 5, 6, 7, 8]
    while sizes[-1] < max_rows:
        sizes.append(sizes[-1] + max(4, 1 << (sizes[-1].bit_length() - 3)))
    return [size for size in sizes if size < max_rows] + [max_rows]
