"""Last hidden states to one vector a prompt, and through the output heads of adapters.

Terms are added in the order of the tokens, and a head is applied to one vector at a time: what comes out is the same to
the bit on a CPU however its prompt was cut, and whatever was beside it.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from weft.kernels.heads import Head
from weft.kernels.plan import Span
from weft.server.engine.batch import PooledRows
from weft.server.engine.model import PagedModel
from weft.server.engine.request import Pooling
from weft.server.engine.sequence import Sequence
from weft.server.engine.transfer import ToHost


@dataclass(frozen=True, slots=True)
class Pooled:
    """What a step made of one sequence.

    state: what the tokens so far make of the vector, float32 [hidden] on the device: their sum where it is a mean.
    vector: the answer, on the host; None where the prompt is not complete. finite: all of what there is.
    """

    state: torch.Tensor
    vector: torch.Tensor | None
    finite: bool


@torch.inference_mode()
def pool(hidden: torch.Tensor, pooled: Seq[PooledRows], model: PagedModel) -> list[Pooled]:
    """Take in a step's last hidden states, [m, hidden] of any float dtype; changes no sequence."""
    states = [_state(hidden[rows.first_row :][: rows.count].float(), rows) for rows in pooled]
    answers = _answers(states, pooled, model)
    told = [
        state.abs().amax()[None] if answer is None else answer for state, answer in zip(states, answers, strict=True)
    ]
    on_host = torch.split(ToHost(torch.cat(told)).wait(), [len(part) for part in told])
    return [
        Pooled(state, None if answer is None else part.clone(), bool(part.isfinite().all()))
        for state, answer, part in zip(states, answers, on_host, strict=True)
    ]


def _state(rows: torch.Tensor, of: PooledRows) -> torch.Tensor:
    """rows: float32 [count, hidden], those of the step."""
    before = None if of.begins else of.sequence.pooled
    if of.sequence.request.pooling is not Pooling.MEAN:
        return rows[0].clone() if before is None or of.count else before
    total = torch.zeros_like(rows[0]) if before is None else before.clone()
    if rows.device.type != "cpu":
        return total + rows.sum(0)
    for row in rows:
        total += row
    return total


def _answers(states: Seq[torch.Tensor], pooled: Seq[PooledRows], model: PagedModel) -> list[torch.Tensor | None]:
    """Of the sequences whose prompts are complete: the vector, or what their head makes of it."""
    answers: list[torch.Tensor | None] = [None] * len(states)
    by_head: dict[Head, list[int]] = {}
    for index, (state, rows) in enumerate(zip(states, pooled, strict=True)):
        request = rows.sequence.request
        if rows.completes:
            made = state / len(request.prompt) if request.pooling is Pooling.MEAN else state
            if request.through_head:
                made = model.features(made, _span(rows.sequence))
                by_head.setdefault(_head(rows.sequence, model), []).append(index)
            answers[index] = made
    for head, members in by_head.items():
        vectors = [vector for index in members if (vector := answers[index]) is not None]
        for index, logits in zip(members, head(torch.stack(vectors)), strict=True):
            answers[index] = logits
    return answers


def _span(sequence: Sequence) -> Span:
    """A prompt's one vector as a row, by the adapters that it uses."""
    weights = [weight for _, weight in sequence.request.adapters]
    return 1, [(ref.version.paged, weight) for ref, weight in zip(sequence.adapters, weights, strict=True)]


def _head(sequence: Sequence, model: PagedModel) -> Head:
    head = sequence.adapters[0].version.paged.head if sequence.adapters else model.own_head
    assert head is not None, f"{sequence.adapter_label or 'the base'} has no output head"
    return head
