"""What the sampler gives for a batch: tokens by each row's own rules and generator, and reports on them."""

from __future__ import annotations

import random

import pytest
import torch

from weft.server.engine import sampler
from weft.server.engine.request import Request, Sampling, Stopping
from weft.server.engine.sampler import sample
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


def test_logit_bias_is_added() -> None:
    row = logits(1)
    assert sample(row, [make(Sampling(logit_bias={9: 100.0}))], EOS)[0].token == 9
    assert sample(row, [make(Sampling(logit_bias={int(row.argmax()): -100.0}))], EOS)[0].token != int(row.argmax())


def test_no_end_before_min_tokens() -> None:
    row = logits(1)
    row[0, 2] = row[0, 30] = 50.0
    stopping = Stopping(min_tokens=4, stop_token_ids=frozenset([30]))
    assert sample(row, [make(stopping=stopping)], EOS)[0].token not in (2, 30)
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


def test_a_batch_that_is_worked_on_in_slices_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = logits(9)

    def rows() -> list[Sequence]:
        how = [Sampling(), Sampling(1.0, seed=1), Sampling(2.0, top_p=0.8, repetition_penalty=1.5, seed=2)]
        return [make(how[i % 3], logprobs=True, top_logprobs=i) for i in range(9)]

    whole = sample(raw, rows(), EOS)
    monkeypatch.setattr(sampler, "_NUMBERS_AT_ONCE", 2 * VOCAB)
    assert sample(raw, rows(), EOS) == whole


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
