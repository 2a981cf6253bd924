"""How likely tokens are under a model's own distribution: before temperature, penalties and truncation."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch

_NUMBERS_AT_ONCE = 1 << 22
"""Logits that are worked on at a time, so that a long prompt and a large vocabulary take no more memory than this."""


class Report(NamedTuple):
    """A token's log-probability, its rank (1 = likeliest), and the likeliest tokens there, each (id, logprob).

    logprob is NaN where the row's logits are not finite; nothing else means anything then.
    """

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


def report(logits: torch.Tensor, tokens: Seq[int], num_top: int) -> list[Report]:
    """Report on one token a row. logits: [n, vocab], any float dtype; num_top: how many alternatives to list."""
    rows = max(1, _NUMBERS_AT_ONCE // logits.shape[-1])
    return [
        made
        for at in range(0, len(tokens), rows)
        for made in _report(logits[at : at + rows].float(), tokens[at : at + rows], num_top)
    ]


def _report(logits: torch.Tensor, tokens: Seq[int], num_top: int) -> list[Report]:
    total = logits.logsumexp(-1, keepdim=True)
    total = total.masked_fill(~total.isfinite(), float("nan"))
    chosen = logits.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])
    logprobs = (chosen - total).squeeze(-1).tolist()
    ranks = ((logits > chosen).sum(-1) + 1).tolist()
    if num_top == 0:
        return [Report(logprob, rank, ()) for logprob, rank in zip(logprobs, ranks, strict=True)]
    values, ids = logits.topk(min(num_top, logits.shape[-1]), dim=-1)
    top = zip(ids.tolist(), (values - total).tolist(), strict=True)
    return [
        Report(logprob, rank, tuple(zip(*best, strict=True)))
        for logprob, rank, best in zip(logprobs, ranks, top, strict=True)
    ]
