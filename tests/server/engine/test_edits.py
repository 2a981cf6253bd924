"""Bias, penalties and min_tokens against transformers' own processors, row by row in a mixed batch."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from weft.server.engine.edits import TokenCounts
from weft.server.engine.request import Request, Sampling, Stopping
from weft.server.engine.sampler import edit
from weft.server.engine.sequence import Sequence
from weft.server.engine.text import OutputText

VOCAB = 50
EOS = frozenset([2])
PROMPT, OUTPUT = (3, 4, 4, 5), [6, 6, 7]
tokens = st.integers(0, VOCAB - 1)


def make(
    sampling: Sampling | None = None,
    stopping: Stopping | None = None,
    prompt: tuple[int, ...] = PROMPT,
    output: list[int] | None = None,
) -> Sequence:
    request = Request("r", prompt, sampling=sampling or Sampling(), stopping=stopping or Stopping())
    sequence = Sequence(request, (), OutputText(lambda ids: ""), random.Random(0), 0.0)
    sequence.tokens += OUTPUT if output is None else output
    return sequence


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def expected(row: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """transformers' processors, and OpenAI's formula for presence and frequency, which transformers has not."""
    sampling, stopping = sequence.request.sampling, sequence.request.stopping
    ids, row = torch.tensor([sequence.tokens]), row[None].clone()
    if sampling.logit_bias:
        row = SequenceBiasLogitsProcessor([[[token], bias] for token, bias in sampling.logit_bias.items()])(ids, row)
    row = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, row)
    for token, times in Counter(sequence.tokens[len(sequence.request.prompt) :]).items():
        row[0, token] -= sampling.presence_penalty + sampling.frequency_penalty * times
    ends = sorted(EOS | stopping.stop_token_ids)
    at_least = MinNewTokensLengthLogitsProcessor(len(sequence.request.prompt), stopping.min_tokens, ends, device="cpu")
    return at_least(ids, row)[0]


ALONE = [
    make(),
    make(Sampling(repetition_penalty=1.3)),
    make(Sampling(repetition_penalty=0.6)),
    make(Sampling(presence_penalty=0.5)),
    make(Sampling(frequency_penalty=0.25)),
    make(Sampling(frequency_penalty=-2.0, presence_penalty=-1.0)),
    make(Sampling(logit_bias={9: 1000.0, 4: -1000.0, 6: 0.5})),
    make(stopping=Stopping(min_tokens=4)),
    make(stopping=Stopping(min_tokens=3)),
    make(stopping=Stopping(min_tokens=4, stop_token_ids=frozenset([30]))),
    make(Sampling(repetition_penalty=1.2), output=[]),
    make(
        Sampling(repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.1, logit_bias={4: 2.0, 2: 1000.0}),
        Stopping(min_tokens=9),
    ),
]


@pytest.mark.parametrize("sequence", ALONE)
def test_each_processor_gives_what_transformers_gives(sequence: Sequence) -> None:
    row = logits(1)
    assert torch.allclose(edit(row, [sequence], EOS)[0], expected(row[0], sequence))


def test_rows_of_one_batch_are_edited_each_by_its_own() -> None:
    rows = logits(len(ALONE))
    edited = edit(rows, ALONE, EOS)
    for mine, row, sequence in zip(edited, rows, ALONE, strict=True):
        assert torch.allclose(mine, expected(row, sequence))
    assert torch.equal(rows, logits(len(ALONE))), "the raw logits are changed"
    assert torch.equal(edited[0], rows[0])


sequences = st.builds(
    make,
    st.builds(
        Sampling,
        repetition_penalty=st.just(1.0) | st.floats(0.125, 8, width=32),
        presence_penalty=st.just(0.0) | st.floats(-100, 100, width=32),
        frequency_penalty=st.just(0.0) | st.floats(-100, 100, width=32),
        logit_bias=st.dictionaries(tokens, st.floats(-1000, 1000, width=32), max_size=8),
    ),
    st.builds(Stopping, min_tokens=st.integers(0, 12), stop_token_ids=st.frozensets(tokens, max_size=4)),
    st.lists(tokens, min_size=1, max_size=90).map(tuple),
    st.lists(tokens, max_size=12),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(sequences, min_size=1, max_size=5), st.integers(0, 100))
def test_any_mix_of_rows_gives_what_transformers_gives_token_by_token(batch: list[Sequence], seed: int) -> None:
    answers = [sequence.tokens[len(sequence.request.prompt) :] for sequence in batch]
    for sequence in batch:
        del sequence.tokens[len(sequence.request.prompt) :]
    for at in range(13):
        rows = logits(len(batch), seed + at)
        for mine, row, sequence in zip(edit(rows, batch, EOS), rows, batch, strict=True):
            assert torch.allclose(mine, expected(row, sequence), rtol=1e-4, atol=1e-4)
        for sequence, answer in zip(batch, answers, strict=True):
            sequence.tokens += answer[at : at + 1]


def test_no_row_with_edits_costs_no_copy() -> None:
    rows = logits(2)
    assert edit(rows, [make(), make(stopping=Stopping(min_tokens=3))], EOS) is rows


def test_counts_follow_a_growing_answer() -> None:
    rng, answer = random.Random(0), list[int]()
    counts = TokenCounts([1, 2, 2, 900])
    for _ in range(300):
        answer += [rng.randrange(500) for _ in range(rng.randrange(3))]
        counts.catch_up([0, 0, *answer], 2)
        times = dict(zip(counts.ids.tolist(), counts.times.tolist(), strict=True))
        assert times == {1: 0, 2: 0, 900: 0} | Counter(answer)
