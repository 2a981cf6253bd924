"""One step's tokens as a flat ragged row, and where each of them belongs."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from weft.kernels.plan import Plan, Span, build_plan
from weft.server.engine.scheduler import Scheduled
from weft.server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Several query rows of one sequence: rows [start, start + num_tokens) attend to the first `context` tokens of it.

    Their own keys are the last num_tokens of the context. blocks: int64 [ceil(context / block_tokens)].
    """

    start: int
    num_tokens: int
    context: int
    blocks: torch.Tensor


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Single query rows of sequences of similar length, attended to together.

    rows: int64 [n], or None for all rows of the step in order. blocks: int64 [n, m], padded with block 0.
    visible: bool [n, 1, 1, m * block_tokens], which of the gathered tokens each row sees.
    """

    rows: torch.Tensor | None
    blocks: torch.Tensor
    visible: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Everything the forward pass needs.

    input_ids, positions: int64 [1, T]; slots: int64 [T], the place of each token in the KV cache
    (block * block_tokens + offset); logit_rows: int64 [n], the rows whose logits are wanted; plan: the adapters' work,
    None where every row is a base row; logit_plan: the same on the logit rows alone, for
    the head, which has no rank rows; None where no adapter of the step has a patch.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    logit_rows: torch.Tensor
    plan: Plan | None
    logit_plan: Plan | None
    chunks: tuple[Chunk, ...]
    decodes: tuple[tuple[int, int, list[int]], ...]
    block_tokens: int
    _groups: dict[int | None, list[DecodeGroup]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    def decode_groups(self, window: int | None) -> list[DecodeGroup]:
        """The decodes for layers that see the last `window` tokens (None: all); made once for all such layers."""
        groups = self._groups.get(window)
        if groups is None:
            groups = self._groups[window] = self._group_decodes(window)
        return groups

    def _group_decodes(self, window: int | None) -> list[DecodeGroup]:
        """Bucket by the power of two above the block count, so that padding at most doubles a row's work."""
        buckets: dict[int, list[tuple[int, list[int], int, int]]] = {}
        for row, context, blocks in self.decodes:
            first_token = max(0, context - window) if window else 0
            skipped = first_token // self.block_tokens
            used = blocks[skipped : -(-context // self.block_tokens)]
            offset = skipped * self.block_tokens
            buckets.setdefault(len(used).bit_length(), []).append((row, used, first_token - offset, context - offset))
        return [self._make_group(members) for members in buckets.values()]

    def _make_group(self, members: Seq[tuple[int, list[int], int, int]]) -> DecodeGroup:
        device = self.input_ids.device
        width = max(len(used) for _, used, _, _ in members)
        rows, tables, starts, ends = [], [], [], []
        for row, used, start, end in members:
            rows.append(row)
            tables.append(used + [0] * (width - len(used)))
            starts.append(start)
            ends.append(end)
        at = torch.arange(width * self.block_tokens, device=device)
        low, high = torch.tensor([starts, ends], device=device)[:, :, None]
        whole = rows == list(range(self.num_tokens))
        return DecodeGroup(
            rows=None if whole else torch.tensor(rows, device=device),
            blocks=torch.tensor(tables, device=device),
            visible=((at >= low) & (at < high))[:, None, None, :],
        )


def build_batch(picked: Seq[Scheduled], block_tokens: int, device: torch.device, *, every_row: bool = False) -> Batch:
    """Lay out the picked tokens in the scheduler's order.

    every_row asks for the logits of each row, not only those that a token is sampled from.
    """
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    logit_rows: list[int] = []
    chunks: list[Chunk] = []
    decodes: list[tuple[int, int, list[int]]] = []
    spans: list[Span] = []
    logit_spans: list[Span] = []
    for item in picked:
        sequence, start = item.sequence, len(ids)
        at = range(sequence.num_computed, sequence.num_computed + item.num_tokens)
        ids += sequence.tokens[at.start : at.stop]
        positions += at
        slots += [sequence.blocks[i // block_tokens] * block_tokens + i % block_tokens for i in at]
        if item.num_tokens == 1:
            decodes.append((start, at.stop, sequence.blocks))
        else:
            used = sequence.blocks[: -(-at.stop // block_tokens)]
            chunks.append(Chunk(start, item.num_tokens, at.stop, torch.tensor(used, device=device)))
        spans += _spans(sequence, at)
        if every_row or item.completes:
            wanted = at if every_row else at[-1:]
            logit_rows += range(len(ids) - len(wanted), len(ids))
            logit_spans += _spans(sequence, wanted)
    plan = build_plan(spans, device)
    return Batch(
        input_ids=torch.tensor([ids], device=device),
        positions=torch.tensor([positions], device=device),
        slots=torch.tensor(slots, device=device),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64, device=device),
        plan=plan,
        logit_plan=build_plan(logit_spans, device) if plan is not None and plan.patches else None,
        chunks=tuple(chunks),
        decodes=tuple(decodes),
        block_tokens=block_tokens,
    )


def _spans(sequence: Sequence, at: range) -> list[Span]:
    """Tokens of a sequence by the adapters they use; an activated LoRA begins at its invocation in the prompt."""
    weights = [weight for _, weight in sequence.request.adapters]
    adapters = [(ref.version.paged, weight) for ref, weight in zip(sequence.adapters, weights, strict=True)]
    starts = [sequence.start_of(adapter.invocation) for adapter, _ in adapters]
    edges = sorted({at.start, at.stop, *(start for start in starts if at.start < start < at.stop)})
    return [
        (stop - first, [adapter for adapter, start in zip(adapters, starts, strict=True) if start <= first])
        for first, stop in pairwise(edges)
    ]
