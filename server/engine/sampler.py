"""Logits to tokens: every row by its own parameters and its own generator, whatever shares the batch.

Order, names and meaning follow transformers' logits processors and warpers: bias and penalties, what a constraint
allows, no end before its time; then temperature, top-k, top-p, min-p, typical-p; then one uniform number a row picks
the token from the cumulative distribution.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from weft.server.engine.constraints import constrain, is_only
from weft.server.engine.reports import Report, report
from weft.server.engine.request import Sampling
from weft.server.engine.sequence import Sequence

_SMALLEST_TEMPERATURE = 1e-30
"""Below it float32 has no full precision left; it is as good as greedy long before."""


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


def sample(
    logits: torch.Tensor, sequences: Seq[Sequence], eos_token_ids: frozenset[int], ahead: Seq[int] | None = None
) -> list[Sample]:
    """Choose the next token of each sequence, or with `ahead` the one so many after it.

    logits: [n, vocab], any float dtype, not changed.
    """
    ahead = ahead or [0] * len(sequences)
    raw = logits.float()
    scores = _process(raw, sequences, eos_token_ids)
    tokens = scores.argmax(-1)
    drawn = [i for i, sequence in enumerate(sequences) if sequence.request.sampling.temperature > 0]
    if drawn:
        tokens[drawn] = _draw(
            scores[drawn],
            [sequences[i].request.sampling for i in drawn],
            [sequences[i].uniform(ahead[i]) for i in drawn],
        )
    finite = torch.isfinite(scores.amax(-1)).tolist()
    chosen = tokens.tolist()
    reports = _reports(raw, chosen, sequences)
    return [Sample(token, finite[i], *reports.get(i, ())) for i, token in enumerate(chosen)]


def _process(raw: torch.Tensor, sequences: Seq[Sequence], eos_token_ids: frozenset[int]) -> torch.Tensor:
    """Bias, penalties, constraint and min_tokens; the input itself where no row asks for any."""
    scores = raw
    for i, sequence in enumerate(sequences):
        edits = _edits(raw[i], sequence)
        if edits is not None:
            scores = raw.clone() if scores is raw else scores
            scores[i] = edits
    constrained = [(i, sequence.matcher) for i, sequence in enumerate(sequences) if sequence.matcher is not None]
    if constrained:
        scores = raw.clone() if scores is raw else scores
        constrain(scores, [i for i, _ in constrained], [matcher for _, matcher in constrained])
    for i, sequence in enumerate(sequences):
        if sequence.num_generated < sequence.request.stopping.min_tokens:
            scores = raw.clone() if scores is raw else scores
            _forbid_ends(scores[i], sequence, eos_token_ids)
    return scores


def _forbid_ends(row: torch.Tensor, sequence: Sequence, eos_token_ids: frozenset[int]) -> None:
    """In place; but where a constraint allows nothing else, the end may come."""
    ends = [*(eos_token_ids | sequence.request.stopping.stop_token_ids)]
    if sequence.matcher is None or not is_only(ends, row):
        row[ends] = float("-inf")


def _edits(row: torch.Tensor, sequence: Sequence) -> torch.Tensor | None:
    """One row's logits after its own bias and penalties; None where it has none of them."""
    sampling = sequence.request.sampling
    penalised = sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
    if not (penalised or sampling.logit_bias):
        return None
    row = row.clone()
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), device=row.device)
        row[ids] += torch.tensor(list(sampling.logit_bias.values()), device=row.device)
    if penalised:
        _penalise(row, sequence, sampling)
    return row


def _penalise(row: torch.Tensor, sequence: Sequence, sampling: Sampling) -> None:
    """Repetition penalty over prompt and output (Keskar et al. 2019, CTRL); presence and frequency over the output."""
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(sequence.tokens)), device=row.device)
        logits = row[seen]
        row[seen] = torch.where(logits < 0, logits * sampling.repetition_penalty, logits / sampling.repetition_penalty)
    counts = Counter(sequence.tokens[len(sequence.request.prompt) :])
    if counts:
        ids = torch.tensor(list(counts), device=row.device)
        times = torch.tensor(list(counts.values()), device=row.device, dtype=row.dtype)
        row[ids] -= sampling.presence_penalty + sampling.frequency_penalty * times


def _draw(scores: torch.Tensor, params: Seq[Sampling], uniforms: Seq[float]) -> torch.Tensor:
    """Sample rows [n, vocab] by inverse transform: the first token whose cumulative probability passes a uniform u.

    u comes from the sequence's own generator, one number a token, so the same seed gives the same tokens in any batch.
    """
    peaks = scores.amax(-1, keepdim=True)  # taken off first, so that no temperature is too small to divide by
    scores = (scores - peaks) / _column([max(p.temperature, _SMALLEST_TEMPERATURE) for p in params], scores)
    for wanted, warp in (
        ([p.top_k for p in params], _top_k),
        ([p.top_p if p.top_p < 1 else 0 for p in params], _top_p),
        ([p.min_p for p in params], _min_p),
        ([p.typical_p if p.typical_p < 1 else 0 for p in params], _typical_p),
    ):
        rows = [i for i, value in enumerate(wanted) if value]
        if rows:
            scores = scores.index_copy(
                0,
                torch.tensor(rows, device=scores.device),
                warp(scores[rows], _column([wanted[i] for i in rows], scores)),
            )
    cumulative = scores.double().softmax(-1).cumsum(-1)
    threshold = torch.tensor(uniforms, dtype=torch.float64, device=scores.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_(max=scores.shape[-1] - 1)


def _column(values: Seq[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _top_k(scores: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Keep the k largest scores of each row, ties with the last of them included."""
    index = (k.long() - 1).clamp(max=scores.shape[-1] - 1)
    smallest = scores.sort(dim=-1, descending=True).values.gather(-1, index)
    return scores.masked_fill(scores < smallest, float("-inf"))


def _top_p(scores: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Keep the smallest set of likeliest tokens whose probability reaches p (Holtzman et al. 2020, nucleus)."""
    ascending, order = scores.sort(dim=-1)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - p
    removed[:, -1] = False
    return scores.masked_fill(removed.scatter(-1, order, removed), float("-inf"))


def _min_p(scores: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Keep tokens at least p times as likely as the likeliest (Nguyen et al. 2024)."""
    probabilities = scores.softmax(-1)
    return scores.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), float("-inf"))


def _typical_p(scores: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Keep the tokens whose surprise is nearest to the entropy, up to probability p (Meister et al. 2022)."""
    logprobs = scores.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).nansum(-1, keepdim=True)
    distance, order = (-logprobs - entropy).abs().sort(dim=-1)
    mass = logprobs.gather(-1, order).exp().cumsum(-1)
    last = (mass < p).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    removed = distance > distance.gather(-1, last)
    return scores.masked_fill(removed.scatter(-1, order, removed), float("-inf"))


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
