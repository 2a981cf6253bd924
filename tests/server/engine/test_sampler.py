"""The sampler against transformers' own processors and warpers, row by row in a mixed batch."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from weft.server.engine.request import Request, Sampling, Stopping
from weft.server.engine.sampler import _draw, _process, sample
from weft.server.engine.sequence import Sequence
from weft.server.engine.text import OutputText

VOCAB = 50
EOS = frozenset([2])
PROMPT, OUTPUT = (3, 4, 4, 5), [6, 6, 7]


def make(sampling: Sampling | None = None, stopping: Stopping | None = None, **request: object) -> Sequence:
    made = Request("r", PROMPT, sampling=sampling or Sampling(), stopping=stopping or Stopping(), **request)
    sequence = Sequence(made, (), OutputText(lambda ids: ""), random.Random((sampling or Sampling()).seed), 0.0)
    sequence.tokens += OUTPUT
    return sequence


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def allowed(sampling: Sampling, row: torch.Tensor) -> set[int]:
    """The tokens that can be drawn, found by sweeping the uniform number."""
    return set(_draw(row.expand(4000, -1), [sampling] * 4000, [(i + 0.5) / 4000 for i in range(4000)]).tolist())


@pytest.mark.parametrize(
    ("sampling", "warpers"),
    [
        (Sampling(temperature=1.5, top_k=5), [TemperatureLogitsWarper(1.5), TopKLogitsWarper(5)]),
        (Sampling(temperature=2.0, top_k=500), [TemperatureLogitsWarper(2.0)]),
        (Sampling(temperature=2.0, top_p=0.8), [TemperatureLogitsWarper(2.0), TopPLogitsWarper(0.8)]),
        (Sampling(temperature=2.0, min_p=0.05), [TemperatureLogitsWarper(2.0), MinPLogitsWarper(0.05)]),
        (Sampling(temperature=1.7, typical_p=0.7), [TemperatureLogitsWarper(1.7), TypicalLogitsWarper(0.7)]),
        (
            Sampling(temperature=2.5, top_k=20, top_p=0.9, min_p=0.02),
            [TemperatureLogitsWarper(2.5), TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)],
        ),
    ],
)
def test_truncation_keeps_what_transformers_keeps(sampling: Sampling, warpers: list[object]) -> None:
    for seed in range(5):
        row = logits(1, seed)
        kept = LogitsProcessorList(warpers)(torch.tensor([[1]]), row.clone())[0].softmax(-1)
        likely = set((kept > 1 / 2000).nonzero().flatten().tolist())
        possible = set((kept > 0).nonzero().flatten().tolist())
        assert likely <= allowed(sampling, row) <= possible


def test_penalties_equal_transformers_and_the_fields_formula() -> None:
    row = logits(1)
    ids = torch.tensor([list(PROMPT) + OUTPUT])
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, row.clone())
    assert torch.allclose(_process(row, [make(Sampling(repetition_penalty=1.3))], EOS), expected)
    expected = row.clone()
    for token, times in Counter(OUTPUT).items():
        expected[0, token] -= 0.5 + 0.25 * times
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    assert torch.allclose(_process(row, [make(sampling)], EOS), expected)


def test_logit_bias_is_added() -> None:
    row = logits(1)
    assert sample(row, [make(Sampling(logit_bias={9: 100.0}))], EOS)[0].token == 9
    assert sample(row, [make(Sampling(logit_bias={int(row.argmax()): -100.0}))], EOS)[0].token != int(row.argmax())


def test_no_end_before_min_tokens() -> None:
    row = logits(1)
    row[0, 2] = row[0, 30] = 50.0
    stopping = Stopping(min_tokens=4, stop_token_ids=frozenset([30]))
    expected = MinNewTokensLengthLogitsProcessor(0, 4, [2, 30], device="cpu")(torch.zeros(1, 3, dtype=torch.int64), row)
    assert torch.equal(_process(row, [make(stopping=stopping)], EOS), expected)
    assert sample(row, [make(stopping=Stopping(min_tokens=3))], EOS)[0].token in (2, 30)


def test_a_row_samples_the_same_whatever_shares_the_batch() -> None:
    mine = Sampling(temperature=1.0, top_p=0.9, seed=11)
    raw = logits(4)
    alone = sample(raw[2:3], [make(mine)], EOS)[0].token
    others = [
        Sampling(),
        Sampling(temperature=2.0, top_k=3, seed=1),
        mine,
        Sampling(temperature=0.5, min_p=0.2, seed=2),
    ]
    mixed = sample(raw, [make(other) for other in others], EOS)
    assert mixed[2].token == alone
    assert mixed[0].token == int(raw[0].argmax())


def test_draws_follow_the_distribution() -> None:
    row = logits(1)
    sequence = make(Sampling(temperature=1.0, seed=3))
    uniforms = [sequence.uniform(ahead) for ahead in range(20000)]
    drawn = _draw(row.expand(20000, -1), [sequence.request.sampling] * 20000, uniforms)
    counts = torch.bincount(drawn, minlength=VOCAB) / 20000
    assert (counts - row[0].softmax(-1)).abs().max() < 0.015


def draws(seed: int, ahead: int = 1) -> list[int]:
    """Twenty tokens of one sequence, as many at a time as are asked for."""
    sequence, made = make(Sampling(1.0, seed=seed)), []
    while len(made) < 20:
        drawn = sample(logits(1).expand(ahead, -1), [sequence] * ahead, EOS, range(ahead))
        made += [one.token for one in drawn]
        sequence.tokens += made[-ahead:]
    return made[:20]


@pytest.mark.parametrize("seed", [0, 5, 2**64 - 1])
def test_the_same_seed_draws_the_same_and_another_does_not(seed: int) -> None:
    assert draws(seed) == draws(seed) == draws(seed, ahead=3) != draws(seed + 1)


def test_what_was_drawn_ahead_in_vain_is_drawn_again() -> None:
    sequence = make(Sampling(1.0, seed=5))
    made = []
    for taken in (2, 1, 4, 3):
        drawn = sample(logits(1).expand(4, -1), [sequence] * 4, EOS, range(4))
        made += [one.token for one in drawn[:taken]]
        sequence.tokens += made[-taken:]
    assert made == draws(5)[:10]


def test_logprobs_are_of_the_raw_logits() -> None:
    raw = logits(2)
    sampling = Sampling(temperature=3.0, logit_bias={9: 100.0}, seed=1)
    made = sample(raw, [make(sampling, logprobs=True, top_logprobs=3), make()], EOS)
    expected = raw[0].log_softmax(-1)
    assert made[0].logprob == pytest.approx(float(expected[9]))
    assert made[0].rank == int((expected > expected[9]).sum()) + 1
    assert [token for token, _ in made[0].top] == expected.topk(3).indices.tolist()
    assert [logprob for _, logprob in made[0].top] == pytest.approx(expected.topk(3).values.tolist())
    assert (made[1].logprob, made[1].rank, made[1].top) == (None, None, ())


@pytest.mark.parametrize("wanted", [{}, {"logprobs": True}])
def test_rows_that_are_not_finite_say_so_and_their_neighbours_do_not(wanted: dict[str, bool]) -> None:
    raw = logits(3)
    raw[1, 7] = float("nan")
    made = sample(raw, [make(Sampling(t, seed=1), **wanted) for t in (0.0, 1.0, 1.0)], EOS)
    assert [one.finite for one in made] == [True, False, True]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-45])
def test_a_tiny_temperature_is_as_good_as_greedy(temperature: float) -> None:
    raw = logits(1)
    assert sample(raw, [make(Sampling(temperature=temperature, seed=1))], EOS)[0].token == int(raw.argmax())


def test_bias_that_overflows_says_so() -> None:
    made = sample(logits(1), [make(Sampling(temperature=0.5, logit_bias={4: float("inf")}, seed=1))], EOS)
    assert not made[0].finite


def test_half_precision_logits_are_sampled_in_float32() -> None:
    raw = logits(1)
    assert sample(raw.bfloat16(), [make()], EOS)[0].token == int(raw.bfloat16().float().argmax())
