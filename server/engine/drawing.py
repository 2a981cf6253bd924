"""Logits to draws: temperature, truncation, and one uniform number a row.

Names and meaning follow transformers' warpers, in their order: temperature, top-k, top-p, min-p, typical-p. None of
them needs a vocabulary in order, only the place where to cut it. Where several tokens are exactly as likely as the last
one that is kept, all of them are.

A row is z = (logits - the largest) / temperature, and weights = exp(z): 1 for the likeliest token, 0 for what is cut.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TypeVar

import torch

from weft.server.engine.request import Sampling
from weft.server.engine.selecting import largest, reach
from weft.server.engine.transfer import to_device

_SMALLEST_TEMPERATURE = 1e-30
"""Below it float32 has no full precision left; it is as good as greedy long before."""

_CANDIDATES = 1024
"""Likeliest tokens among which top-p looks for its end first; it has to go beyond only on flat distributions."""

_BLOCK = 256
"""Neighbouring tokens that are summed up first: a draw looks for the block, then for the token in it."""

_BELOW_ONE = 1.0 - 2.0**-53


def argmax(scores: torch.Tensor) -> torch.Tensor:
    """The first largest of each row [n, vocab], or the first NaN."""
    if scores.device.type == "cpu":  # numpy's is several times faster there
        return torch.from_numpy(scores.numpy().argmax(-1))
    return scores.argmax(-1)


def draw(scores: torch.Tensor, peaks: torch.Tensor, params: Seq[Sampling], uniforms: Seq[float]) -> torch.Tensor:
    """Draw a token a row by inverse transform: the first whose cumulative probability passes the row's uniform.

    scores: float32 [n, vocab]; peaks: the largest of each row; uniforms: in [0, 1). Returns int64 [n]. A row's token
    depends on nothing but the row.
    """
    weights = truncate(scores, peaks, params)
    n = len(weights)
    blocks = weights.view(n, -1, _BLOCK)
    uniform = to_device(torch.tensor(uniforms, dtype=torch.float64), scores.device)[:, None]
    block, rest = _pick(blocks.sum(-1).double(), uniform)
    inside = blocks[torch.arange(n, device=scores.device), block.squeeze(-1)]
    token, _ = _pick(inside.double(), rest)
    return (block * _BLOCK + token).squeeze(-1).clamp_(max=scores.shape[-1] - 1)


def truncate(scores: torch.Tensor, peaks: torch.Tensor, params: Seq[Sampling]) -> torch.Tensor:
    """The weights of rows [n, vocab] after temperature and truncation, 0 where cut; padded with 0 to whole blocks."""
    temperature = _column([max(p.temperature, _SMALLEST_TEMPERATURE) for p in params], scores)
    z = (scores - peaks[:, None]).div_(temperature)  # taken off first, so that no temperature is too small
    vocab = z.shape[-1]
    padded = z.new_zeros(len(params), -(-vocab // _BLOCK) * _BLOCK)
    weights = padded[:, :vocab]
    torch.exp(z, out=weights)
    lowest = z.new_full((len(params), 1), float("-inf"))
    rows, k = _rows_with([p.top_k if p.top_k < vocab else 0 for p in params], z.device)
    if k:
        lowest[rows] = _top_k(z[rows], k)
        _keep(weights, z, lowest)
    rows, nucleus = _rows_with([p.top_p if p.top_p < 1 else 0.0 for p in params], z.device)
    if nucleus:
        within = all(0 < p.top_k <= _CANDIDATES for p in params if p.top_p < 1)
        lowest[rows] = _top_p(z[rows], weights[rows], lowest[rows], _column(nucleus, z), is_within_candidates=within)
        _keep(weights, z, lowest)
    if any(p.min_p for p in params):
        _keep(weights, weights, _column([p.min_p for p in params], z))
    rows, typical = _rows_with([p.typical_p if p.typical_p < 1 else 0.0 for p in params], z.device)
    if typical:
        weights[rows] = _typical_p(z[rows], weights[rows], _column(typical, z))
    return padded


Number = TypeVar("Number", int, float)


def _rows_with(values: Seq[Number], device: torch.device) -> tuple[torch.Tensor | slice, list[Number]]:
    """The rows whose value is not 0, and their values; a slice where it is all of them, since that copies nothing."""
    rows = [i for i, value in enumerate(values) if value]
    index = slice(None) if len(rows) in (0, len(values)) else to_device(torch.tensor(rows), device)
    return index, [values[i] for i in rows]


def _keep(weights: torch.Tensor, values: torch.Tensor, lowest: torch.Tensor) -> None:
    """Cut the weights whose value is below the row's lowest, in place. The product is much faster than a mask."""
    weights.mul_(torch.ge(values, lowest, out=torch.empty_like(values)))


def _top_k(z: torch.Tensor, k: Seq[int]) -> torch.Tensor:
    """The k-th largest of each row, [n, 1]."""
    return largest(z, max(k)).gather(-1, to_device(torch.tensor(k), z.device)[:, None] - 1)


def _top_p(
    z: torch.Tensor, weights: torch.Tensor, lowest: torch.Tensor, p: torch.Tensor, *, is_within_candidates: bool
) -> torch.Tensor:
    """The smallest z of the fewest tokens whose probability reaches p, [n, 1] (Holtzman et al. 2020, nucleus).

    is_within_candidates: whether none can be beyond, by top-k; else a device is asked, and waited for.
    """
    wanted = _share(weights, p)
    candidates = largest(z, _CANDIDATES)
    mass = candidates.exp() * (candidates >= lowest)
    upto = mass.cumsum(-1, dtype=torch.float64)
    last = (upto < wanted).sum(-1, keepdim=True).clamp_(max=candidates.shape[-1] - 1)
    ends = torch.maximum(candidates.gather(-1, last), lowest)
    if is_within_candidates:
        return ends
    beyond = (upto[:, -1] < wanted[:, 0]).nonzero().flatten()
    if len(beyond):
        ends[beyond] = -reach(z[beyond].abs(), weights[beyond], wanted[beyond])
    return torch.maximum(ends, lowest)


def _typical_p(z: torch.Tensor, weights: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The weights of the tokens whose surprise is nearest to the entropy, up to mass p (Meister et al. 2022)."""
    mass = _mass(weights)
    surprise = mass.log().float() - z
    entropy = (weights.double() * surprise.clamp(max=1e4)).sum(-1, keepdim=True) / mass
    distance = (surprise - entropy.float()).abs_()
    return weights * (distance <= reach(distance, weights, _share(weights, p)))


def _share(weights: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """So much of the sum of each row, float64 [n, 1], and more than nothing."""
    return (p.double() * _mass(weights)).clamp_(min=1e-300)


def _mass(weights: torch.Tensor) -> torch.Tensor:
    """The sum of each row as float64 [n, 1]."""
    return weights.sum(-1, keepdim=True, dtype=torch.float64)


def _pick(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the weights float64 [n, m] a uniform number [n, 1] falls on, and how far in: both [n, 1].

    Never one that is 0, as long as not all are.
    """
    upto = weights.cumsum(-1)
    total = upto[:, -1:]
    at = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(upto, at, right=True).clamp_(max=weights.shape[-1] - 1)
    own = weights.gather(-1, index)
    before = upto.gather(-1, index) - own
    return index, ((at - before) / own).clamp_(0.0, _BELOW_ONE)


def _column(values: Seq[float], like: torch.Tensor) -> torch.Tensor:
    return to_device(torch.tensor(values, dtype=like.dtype), like.device)[:, None]
