"""Logits to tokens: every row by its own parameters and its own generator, whatever shares the batch.

Order, names and meaning follow transformers' logits processors and warpers: bias, penalties, what a constraint allows,
no end before its time; then temperature, top-k, top-p, min-p, typical-p, and one uniform number a row.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from weft.server.engine.constraints import constrain, is_only
from weft.server.engine.drawing import argmax, draw
from weft.server.engine.edits import RowEdits, add_biases, forbid_ends, penalise
from weft.server.engine.reports import Report, report
from weft.server.engine.sequence import Sequence
from weft.server.engine.transfer import ToHost, to_device

_NUMBERS_AT_ONCE = 1 << 20
"""Logits that are worked on at a time, so that what is made of them stays in the processor's cache. On a GPU: all."""

_ROWS_AT_ONCE = 64
"""For small vocabularies: what is made of a row has a size of its own, too."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A row's next token. logprob and rank (1 = likeliest) are under the raw logits; top lists (id, logprob).

    All three are empty unless asked for. finite is False where the row's logits hold NaN, or no finite maximum after
    bias, penalties and constraint: the token means nothing then.
    """

    token: int
    finite: bool
    logprob: float | None = None
    rank: int | None = None
    top: tuple[tuple[int, float], ...] = ()


class Draw:
    """Tokens that are chosen on the device, and on their way to the host.

    raw: float32 [n, vocab], of a row a sequence; must stay as they are until `read` where a request wants logprobs.
    tokens: int64 [n]; peaks: the largest of each row's scores.
    """

    def __init__(self, raw: torch.Tensor, tokens: torch.Tensor, peaks: torch.Tensor, sequences: Seq[Sequence]) -> None:
        self.tokens = tokens
        self._chosen = ToHost(torch.stack([tokens, torch.isfinite(peaks).to(tokens.dtype)]))
        self._sequences = sequences
        self._raw = raw if any(sequence.request.logprobs for sequence in sequences) else None

    def read(self) -> list[Sample]:
        """Waits for the device: nothing else in a decode step does."""
        chosen, finite = self._chosen.wait().tolist()
        reports = _reports(self._raw, chosen, self._sequences) if self._raw is not None else {}
        return [Sample(token, finite[i] == 1, *reports.get(i, ())) for i, token in enumerate(chosen)]


def sample(
    logits: torch.Tensor, sequences: Seq[Sequence], eos_token_ids: frozenset[int], ahead: Seq[int] | None = None
) -> list[Sample]:
    """As `choose`, read at once."""
    return [made for part in choose(logits, sequences, eos_token_ids, ahead) for made in part.read()]


@torch.inference_mode()
def choose(
    logits: torch.Tensor, sequences: Seq[Sequence], eos_token_ids: frozenset[int], ahead: Seq[int] | None = None
) -> list[Draw]:
    """Choose the next token of each sequence, or with `ahead` the one so many after it; in order, some at a time.

    logits: [n, vocab], any float dtype, not changed. Penalties and min_tokens count what the sequence holds: those of
    a row ahead must need neither.
    """
    ahead = ahead or [0] * len(sequences)
    rows = len(sequences)
    if logits.device.type == "cpu":
        rows = min(max(1, _NUMBERS_AT_ONCE // logits.shape[-1]), _ROWS_AT_ONCE)
    return [
        _choose(logits[at : at + rows].float(), sequences[at : at + rows], eos_token_ids, ahead[at : at + rows])
        for at in range(0, len(sequences), rows or 1)
    ]


@torch.inference_mode()
def are_finite(logits: torch.Tensor) -> list[bool]:
    """Of each row, what `Sample.finite` says before any edit. logits: [n, vocab], any float dtype."""
    return torch.isfinite(logits.amax(-1)).tolist() if len(logits) else []


def _choose(raw: torch.Tensor, sequences: Seq[Sequence], eos_token_ids: frozenset[int], ahead: Seq[int]) -> Draw:
    scores = edit(raw, sequences, eos_token_ids)
    tokens = argmax(scores)
    peaks = scores.gather(-1, tokens[:, None]).squeeze(-1)
    drawn = [i for i, sequence in enumerate(sequences) if sequence.request.sampling.temperature > 0]
    if drawn:
        rows = slice(None) if len(drawn) == len(sequences) else to_device(torch.tensor(drawn), raw.device)
        params = [sequences[i].request.sampling for i in drawn]
        uniforms = [sequences[i].uniform(ahead[i]) for i in drawn]
        tokens[rows] = draw(scores[rows], peaks[rows], params, uniforms)
    return Draw(raw, tokens, peaks, sequences)


def edit(raw: torch.Tensor, sequences: Seq[Sequence], eos_token_ids: frozenset[int]) -> torch.Tensor:
    """Bias, penalties, constraint and min_tokens of each row; the input itself where no row asks for any.

    raw: float32 [n, vocab]. Where a constraint allows nothing else, the end may come before min_tokens.
    """
    rows = [
        i
        for i, sequence in enumerate(sequences)
        if sequence.matcher is not None or _edits(sequence, eos_token_ids).touch(sequence.num_generated)
    ]
    if not rows:
        return raw
    scores = raw.clone()
    edits = {i: _edits(sequences[i], eos_token_ids) for i in rows}
    biased = [i for i in rows if len(edits[i].biases)]
    if biased:
        add_biases(scores, biased, [edits[i] for i in biased])
    penalised = [(i, counts) for i in rows if (counts := edits[i].counts) is not None]
    if penalised:
        for i, counts in penalised:
            counts.catch_up(sequences[i].tokens, len(sequences[i].request.prompt))
        params = [edits[i].sampling for i, _ in penalised]
        penalise(scores, [i for i, _ in penalised], [counts for _, counts in penalised], params)
    constrained = {i: matcher for i in rows if (matcher := sequences[i].matcher) is not None}
    if constrained:
        constrain(scores, list(constrained), list(constrained.values()))
    unfinished = [
        i
        for i in rows
        if sequences[i].num_generated < edits[i].min_tokens
        and not (i in constrained and is_only(edits[i].ends, scores[i]))
    ]
    if unfinished:
        forbid_ends(scores, unfinished, [edits[i] for i in unfinished])
    return scores


def _edits(sequence: Sequence, eos_token_ids: frozenset[int]) -> RowEdits:
    """Made at a sequence's first row."""
    if sequence.edits is None:
        sequence.edits = RowEdits(sequence.request, eos_token_ids)
    return sequence.edits


def _reports(raw: torch.Tensor, tokens: Seq[int], sequences: Seq[Sequence]) -> dict[int, Report]:
    """Log-probability, rank and top list of the rows that asked for them, under the raw logits."""
    rows = [i for i, sequence in enumerate(sequences) if sequence.request.logprobs]
    if not rows:
        return {}
    widest = max(sequences[i].request.top_logprobs for i in rows)
    made = report(raw if len(rows) == len(sequences) else raw[rows], [tokens[i] for i in rows], widest)
    return {
        row: one._replace(top=one.top[: sequences[row].request.top_logprobs])
        for row, one in zip(rows, made, strict=True)
    }
