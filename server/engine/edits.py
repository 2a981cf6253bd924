"""What a request changes about its own logits before anything is drawn: bias, penalties, no end before its time."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy
import torch
from numpy.typing import NDArray

from weft.server.engine.request import Request, Sampling
from weft.server.engine.transfer import to_device

_FEWEST = 64


class TokenCounts:
    """The distinct tokens of a growing sequence, and how often each is in its answer. Counting one more is O(1)."""

    def __init__(self, prompt: Seq[int]) -> None:
        """prompt: tokens that are there, but not in the answer."""
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._ids: NDArray[numpy.int64] = numpy.array([*self._places, *([0] * _FEWEST)], dtype=numpy.int64)
        self._times: NDArray[numpy.float32] = numpy.zeros(len(self._ids), dtype=numpy.float32)
        self._num_counted = 0

    def catch_up(self, tokens: Seq[int], start: int) -> None:
        """Count the tokens of the answer, which begins at `start`, that were not counted yet."""
        for token in tokens[start + self._num_counted :]:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._ids):
                self._ids = numpy.append(self._ids, numpy.zeros_like(self._ids))
                self._times = numpy.append(self._times, numpy.zeros_like(self._times))
            self._ids[place] = token
            self._times[place] += 1
            self._num_counted += 1

    @property
    def ids(self) -> torch.Tensor:
        """int64, each token once."""
        return torch.from_numpy(self._ids[: len(self._places)])

    @property
    def times(self) -> torch.Tensor:
        """float32, how often the token of the same place is in the answer."""
        return torch.from_numpy(self._times[: len(self._places)])


class RowEdits:
    """One request's changes, laid out as tensors once."""

    def __init__(self, request: Request, eos_token_ids: frozenset[int]) -> None:
        sampling, stopping = request.sampling, request.stopping
        self.min_tokens = stopping.min_tokens
        self.sampling = sampling
        self.bias_ids = torch.tensor(list(sampling.logit_bias), dtype=torch.int64)
        self.biases = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32)
        self.ends = torch.tensor(sorted(eos_token_ids | stopping.stop_token_ids), dtype=torch.int64)
        penalised = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        self.counts: TokenCounts | None = None
        if sampling.repetition_penalty != 1 or penalised:
            self.counts = TokenCounts(request.prompt if sampling.repetition_penalty != 1 else ())

    def touch(self, num_generated: int) -> bool:
        """Whether they change anything for the token that comes after so many."""
        return self.counts is not None or len(self.biases) > 0 or num_generated < self.min_tokens


def add_biases(scores: torch.Tensor, rows: Seq[int], edits: Seq[RowEdits]) -> None:
    """Add each request's biases to its row of scores [n, vocab], in place."""
    at = _flat(scores, rows, [each.bias_ids for each in edits])
    flat = scores.view(-1)
    flat[at] = flat[at] + to_device(torch.cat([each.biases for each in edits]), scores.device)


def penalise(scores: torch.Tensor, rows: Seq[int], counted: Seq[TokenCounts], params: Seq[Sampling]) -> None:
    """Repetition penalty over prompt and answer (Keskar et al. 2019, CTRL); presence and frequency over the answer.

    In place: x / r where x is above 0, else x * r; then - presence - frequency * times, for tokens in the answer.
    """
    at = _flat(scores, rows, [counts.ids for counts in counted])
    times = to_device(torch.cat([counts.times for counts in counted]), scores.device)
    lengths = torch.tensor([len(counts.ids) for counts in counted])
    repetition, presence, frequency = (
        to_device(torch.tensor(values, dtype=torch.float32).repeat_interleave(lengths), scores.device)
        for values in zip(
            *((p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params), strict=True
        )
    )
    flat = scores.view(-1)
    x = flat[at]
    x = torch.where(x < 0, x * repetition, x / repetition)
    flat[at] = x - (presence * (times > 0) + frequency * times)


def forbid_ends(scores: torch.Tensor, rows: Seq[int], edits: Seq[RowEdits]) -> None:
    """Make what would end each row's answer impossible, in place."""
    scores.view(-1)[_flat(scores, rows, [each.ends for each in edits])] = float("-inf")


def _flat(scores: torch.Tensor, rows: Seq[int], ids: Seq[torch.Tensor]) -> torch.Tensor:
    """Where the ids of each row are in the flattened scores."""
    starts = torch.tensor(rows) * scores.shape[-1]
    lengths = torch.tensor([len(each) for each in ids])
    return to_device(torch.cat(list(ids)) + starts.repeat_interleave(lengths), scores.device)
