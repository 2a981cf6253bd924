"""One step's tokens as a flat ragged row, and where each of them belongs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch

from weft.kernels.plan import Plan, Span, build_plan
from weft.server.engine.request import Pooling
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


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Logit rows from `first_row` on that say how likely the prompt's tokens at `positions` were."""

    sequence: Sequence
    first_row: int
    positions: range


@dataclass(frozen=True, slots=True)
class PooledRows:
    """Rows of last hidden states, `count` from `first_row` on, for one pooled sequence; none in some chunks of CLS.

    begins, completes: whether the prompt's first token is in the step, and its last.
    """

    sequence: Sequence
    first_row: int
    count: int
    begins: bool
    completes: bool


@dataclass(frozen=True, slots=True)
class CheckedRow:
    """The logit row of the last token of a chunk that does not complete its prompt: looked at whether it is finite."""

    sequence: Sequence
    row: int


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Everything the forward pass needs.

    input_ids, positions: int64 [1, T]; slots: int64 [T], the place of each token in the KV cache
    (block * block_tokens + offset); logit_rows: int64 [n], the rows whose logits are wanted; sample_rows: those of
    the n that tokens are sampled from, in order; prompt_rows: those that report on prompts; checked_rows: those that
    say whether a chunk may be published; plan: the adapters' work, None where every row is a base row; logit_plan: the
    same on the logit rows alone, for the head, which has no rank rows; None where no adapter of the step has a patch.
    wants_all: whether the logits of every row are wanted, in order: as a rule, decodes and what is guessed after them.
    hidden_rows: int64 [m], the rows whose last hidden states are wanted, None where nothing is pooled; pooled: whose
    they are. fed: int64 [T] on the model's device, in place of input_ids, where the host does not know the tokens yet.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    logit_rows: torch.Tensor
    sample_rows: tuple[int, ...]
    prompt_rows: tuple[PromptRows, ...]
    checked_rows: tuple[CheckedRow, ...]
    plan: Plan | None
    logit_plan: Plan | None
    chunks: tuple[Chunk, ...]
    decodes: tuple[tuple[int, int, list[int]], ...]
    block_tokens: int
    wants_all: bool
    hidden_rows: torch.Tensor | None = None
    pooled: tuple[PooledRows, ...] = ()
    fed: torch.Tensor | None = None
    _groups: dict[int | None, list[DecodeGroup]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    def to(self, device: torch.device) -> Batch:
        """The same on a device; itself where it is there already."""
        if self.input_ids.device == device and self.fed is None:
            return self
        return replace(
            self,
            input_ids=self.input_ids.to(device) if self.fed is None else self.fed[None],
            fed=None,
            positions=self.positions.to(device),
            slots=self.slots.to(device),
            logit_rows=self.logit_rows.to(device),
            hidden_rows=None if self.hidden_rows is None else self.hidden_rows.to(device),
            plan=self.plan and self.plan.to(device),
            logit_plan=self.logit_plan and self.logit_plan.to(device),
            chunks=tuple(replace(chunk, blocks=chunk.blocks.to(device)) for chunk in self.chunks),
            _groups={},
        )

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


@dataclass(slots=True)
class _LogitRows:
    """The rows whose logits a step wants, as they are laid out."""

    rows: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)
    prompts: list[PromptRows] = field(default_factory=list)
    checked: list[CheckedRow] = field(default_factory=list)

    def add(self, item: Scheduled, at: range, row: int) -> None:
        """Those that the item needs: before each token of its prompt that it reports, and where it samples."""
        reported = item.sequence.unreported(at)
        if reported:
            positions = range(reported.start + 1, reported.stop + 1)
            self.prompts.append(PromptRows(item.sequence, len(self.rows), positions))
            self.add_all(item.sequence, reported, row + reported.start - at.start)
        if item.completes:
            sampled = at[item.num_tokens - 1 :]
            self.sampled += range(len(self.rows), len(self.rows) + len(sampled))
            self.add_all(item.sequence, sampled, row + item.num_tokens - 1)

    def add_check(self, sequence: Sequence, at: range, row: int) -> None:
        """That of the last position of `at`, which is there already where its next token is reported."""
        reported = sequence.unreported(at)
        if not reported or reported.stop < at.stop:
            self.add_all(sequence, at[-1:], row + len(at) - 1)
        self.checked.append(CheckedRow(sequence, len(self.rows) - 1))

    def add_all(self, sequence: Sequence, at: range, row: int) -> None:
        """Those of every position of `at`, of which the first is this row of the step."""
        self.rows += range(row, row + len(at))
        self.spans += _spans(sequence, at)


@dataclass(slots=True)
class _HiddenRows:
    """The rows whose last hidden states a step wants, as they are laid out."""

    rows: list[int] = field(default_factory=list)
    pooled: list[PooledRows] = field(default_factory=list)

    def add(self, item: Scheduled, at: range, row: int) -> None:
        """Those that count: all of them, or the last one of the chunk, or the first one of the prompt."""
        rows = range(row, row + len(at))
        match item.sequence.request.pooling:
            case Pooling.LAST:
                rows = rows[-1:]
            case Pooling.CLS:
                rows = rows[: at.start == 0]
        first = len(self.rows)
        self.pooled.append(PooledRows(item.sequence, first, len(rows), at.start == 0, item.completes))
        self.rows += rows


def build_batch(
    picked: Seq[Scheduled],
    block_tokens: int,
    device: torch.device,
    *,
    check_chunks: bool = False,
    every_row: bool = False,
    make_plan: Callable[[Iterable[Span], torch.device], Plan | None] = build_plan,
) -> Batch:
    """Lay out the picked tokens in the scheduler's order, each sequence's drafts after its own.

    check_chunks asks for a row of each chunk that fills a block and does not complete its prompt. every_row asks for
    the logits of each row, not only those that a token is sampled from or a prompt is reported by. make_plan: for the
    rows of the step; of one that was laid out alike it may give the same.
    """
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    chunks: list[Chunk] = []
    decodes: list[tuple[int, int, list[int]]] = []
    spans: list[Span] = []
    wanted, hidden = _LogitRows(), _HiddenRows()
    for item in picked:
        sequence, start = item.sequence, len(ids)
        end = sequence.num_computed + item.num_tokens
        at = range(sequence.num_computed, end + len(item.drafts))
        ids += sequence.tokens[at.start : end]
        ids += item.drafts
        positions += at
        slots += [sequence.blocks[i // block_tokens] * block_tokens + i % block_tokens for i in at]
        if len(at) == 1:
            decodes.append((start, at.stop, sequence.blocks))
        else:
            used = sequence.blocks[: -(-at.stop // block_tokens)]
            chunks.append(Chunk(start, len(at), at.stop, torch.tensor(used, device=device)))
        spans += _spans(sequence, at)
        if every_row:
            wanted.add_all(sequence, at, start)
        elif sequence.request.pooling is not None:
            hidden.add(item, at, start)
        else:
            wanted.add(item, at, start)
            if check_chunks and not item.completes and end // block_tokens > sequence.num_published:
                wanted.add_check(sequence, at, start)
    plan = make_plan(spans, device)
    return Batch(
        input_ids=torch.tensor([ids], device=device),
        positions=torch.tensor([positions], device=device),
        slots=torch.tensor(slots, device=device),
        logit_rows=torch.tensor(wanted.rows, dtype=torch.int64, device=device),
        sample_rows=tuple(wanted.sampled),
        prompt_rows=tuple(wanted.prompts),
        checked_rows=tuple(wanted.checked),
        plan=plan,
        logit_plan=build_plan(wanted.spans, device) if plan is not None and plan.patches else None,
        chunks=tuple(chunks),
        decodes=tuple(decodes),
        block_tokens=block_tokens,
        wants_all=wanted.rows == list(range(len(ids))),
        hidden_rows=torch.tensor(hidden.rows, dtype=torch.int64, device=device) if hidden.pooled else None,
        pooled=tuple(hidden.pooled),
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
