"""Guessing ahead gives the same answers in fewer steps, and gets out of the way where it is wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import Answer, Harness
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCAB, linear_names, make_adapter, make_model, save_tokenizer

from weft.server.engine.lookup import Lookup
from weft.server.engine.request import FinishReason, Request, Sampling, Stopping

ADAPTERS = {"small": 4, "large": 32}
SPOILT = VOCAB - 1
"""A token that no prompt of `ask` holds."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("speculation")
    model = make_model("llama", root / "base", num_hidden_layers=2)
    save_tokenizer(root / "base")
    for seed, (name, rank) in enumerate(ADAPTERS.items()):
        make_adapter(model, root / "adapters" / name, seed, r=rank, target_modules=linear_names("llama"))
    return root


def start(folder: Path, speculative_tokens: int = 4, **engine: object) -> Harness:
    adapters = {name: folder / "adapters" / name for name in ADAPTERS}
    return Harness(folder / "base", adapters, speculative_tokens=speculative_tokens, **engine)


def ask(seed: int, adapter: str | None = None, sampling: Sampling | None = None, **stopping: object) -> Request:
    """A prompt that repeats itself, and an answer that comes from a few tokens only and so does too."""
    rng = random.Random(seed)
    prompt = tuple(rng.randrange(3, SPOILT) for _ in range(5)) * (2 + seed % 3)
    how = Stopping(**{"max_tokens": 50, "ignore_eos": True, **stopping})
    few = replace(sampling or Sampling(), logit_bias=dict.fromkeys(prompt[:3], 30.0))
    return Request(f"r{seed}", prompt, ((adapter, 1.0),) if adapter else (), few, how, logprobs=True)


def sampled(seed: int) -> Sampling:
    return Sampling(temperature=0.4, top_p=0.9, seed=seed)


def steps(harness: Harness, requests: Seq[Request]) -> tuple[list[Answer], int]:
    before = harness.registry.get_sample_value("weft_step_seconds_count") or 0.0
    answers = harness.run(requests)
    return answers, int((harness.registry.get_sample_value("weft_step_seconds_count") or 0.0) - before)


def told(answers: Seq[Answer]) -> list[tuple[list[int], str, object]]:
    return [(answer.ids, answer.text, answer.finish and answer.finish.reason) for answer in answers]


def guessed(harness: Harness, outcome: str) -> float:
    return harness.registry.get_sample_value("weft_speculative_tokens_total", {"outcome": outcome}) or 0.0


def test_the_answer_is_the_same_in_fewer_steps(folder: Path) -> None:
    requests = [ask(i, [None, *ADAPTERS][i % 3], sampled(i) if i % 2 else None) for i in range(6)]
    plain, guessing = start(folder, 0), start(folder)
    for request in requests:
        expected, before = steps(plain, [request])
        made, after = steps(guessing, [request])
        assert told(made) == told(expected)
        assert [token.logprob for token in made[0].tokens] == pytest.approx(
            [token.logprob for token in expected[0].tokens], abs=1e-4
        )
        assert after <= before
    assert guessed(plain, "accepted") == guessed(plain, "rejected") == 0
    assert guessed(guessing, "accepted") > 50
    assert guessed(guessing, "rejected") > 0
    assert guessing.registry.get_sample_value("weft_generation_tokens_total", {"adapter": "small"}) == 100


def test_mixed_batches_and_preemptions_give_the_same(folder: Path) -> None:
    requests = [ask(i, [None, *ADAPTERS][i % 3], sampled(i) if i % 2 else None) for i in range(8)]
    expected = told(start(folder, 0).run(requests))
    roomy, tight = start(folder), start(folder, kv_tokens=140, block_tokens=4)
    assert told(roomy.run(requests, [i // 2 for i in range(8)])) == expected
    assert told(tight.run(requests)) == expected
    assert tight.engine._scheduler.num_preemptions > 0
    assert guessed(roomy, "accepted") > 0


@pytest.mark.parametrize("block_tokens", [1, 3, 16])
def test_answers_end_where_they_do_without_guesses(folder: Path, block_tokens: int) -> None:
    plain, guessing = start(folder, 0), start(folder, block_tokens=block_tokens)
    whole = plain.run([ask(1)])[0]
    ways: list[dict[str, object]] = [
        *({"max_tokens": count} for count in (1, 2, 3, 7)),
        {"stop_token_ids": frozenset(whole.ids[20:21])},
        {"stop_sequences": (whole.text[15:18],)},
        {"stop_sequences": (whole.text[15:18],), "min_tokens": 30},
        {"max_tokens": 10_000},
    ]
    for way in ways:
        expected, made = told(plain.run([ask(1, **way)])), told(guessing.run([ask(1, **way)]))
        assert made == expected
    assert made[0][2] is FinishReason.CONTEXT_LENGTH
    assert guessing.engine._scheduler.pool.num_free == guessing.engine._scheduler.pool.capacity


def test_what_depends_on_more_than_the_logits_is_not_guessed(folder: Path) -> None:
    harness = start(folder)
    for request in (
        ask(1, sampling=Sampling(repetition_penalty=1.1)),
        ask(1, sampling=Sampling(presence_penalty=0.1)),
        ask(1, sampling=Sampling(frequency_penalty=0.1)),
        ask(1, min_tokens=50),
    ):
        assert told(harness.run([request])) == told(start(folder, 0).run([request]))
    assert guessed(harness, "accepted") + guessed(harness, "rejected") == 0


def test_a_step_that_is_not_small_holds_no_guesses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = start(folder, speculative_tokens=8, max_batch_tokens=64)
    sizes = []
    extend = harness.engine._speculation.extend

    def look(picked):
        extended = extend(picked)
        own = sum(item.num_tokens for item in extended)
        sizes.append((own, sum(len(item.drafts) for item in extended)))
        return extended

    monkeypatch.setattr(harness.engine._speculation, "extend", look)
    harness.run([ask(i) for i in range(12)])
    assert all(drafts == 0 or own + drafts <= 16 for own, drafts in sizes)
    assert any(drafts for _, drafts in sizes)
    assert any(own > 16 for own, _ in sizes)


def test_guesses_take_only_blocks_that_nobody_needs(folder: Path) -> None:
    request = ask(2, max_tokens=30)
    length = len(request.prompt) + 30
    harness = start(folder, kv_tokens=length, block_tokens=1, context_length=length)
    assert told(harness.run([request])) == told(start(folder, 0).run([request]))
    assert guessed(harness, "accepted") > 0
    assert harness.engine._scheduler.num_preemptions == 0


def test_a_guess_that_gives_no_finite_values_costs_the_answer_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = told(start(folder, 0).run([ask(1), ask(2, "small")]))
    harness = start(folder, block_tokens=4, kv_tokens=256)
    embedding = harness.engine._model.model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight[SPOILT] = float("nan")
    monkeypatch.setattr(Lookup, "_last_match", lambda self: self._num_tokens - 2)
    monkeypatch.setattr("weft.server.engine.lookup.numpy.resize", lambda following, n: torch.full((n,), SPOILT))
    assert told(harness.run([ask(1), ask(2, "small")])) == expected
    monkeypatch.undo()
    assert told(harness.run([ask(1), ask(2, "small")])) == expected, "values that are not finite stayed in a block"


def test_a_lookup_finds_what_followed_the_longest_match_last() -> None:
    lookup = Lookup()
    assert lookup.draft([7, 8, 9, 1, 8, 9, 2, 7, 8, 9], 2) == (1, 8)
    assert Lookup().draft([8, 9, 1, 8, 9, 2, 8, 9], 2) == (2, 8)
    assert Lookup().draft([1, 2, 3, 4], 4) == ()
    assert Lookup().draft([5, 1, 2, 5], 4) == (), "one token alone says too little"
    assert Lookup().draft([6, 6, 6], 4) == (6, 6, 6, 6)
    assert Lookup().draft([3, 4, 3, 4, 3], 4) == (4, 3, 4, 3)
    assert Lookup().draft([3], 4) == Lookup().draft([3, 3, 3], 0) == ()


def test_a_lookup_guesses_less_often_the_more_it_fails() -> None:
    lookup, tokens = Lookup(), [6] * 10
    pauses = []
    for _ in range(8):
        pause = 0
        while not lookup.draft(tokens, 4):
            pause += 1
        pauses.append(pause)
        lookup.learn(4, 0)
    assert pauses == [0, 1, 3, 7, 15, 31, 63, 63]
    while not lookup.draft(tokens, 4):
        pass
    lookup.learn(1, 1)
    assert len(lookup.draft(tokens, 8)) == 2
    lookup.learn(2, 2)
    assert len(lookup.draft(tokens, 8)) == 4
    lookup.stop()
    assert lookup.draft(tokens, 8) == ()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=600), st.integers(1, 8))
def test_guesses_are_what_followed_before(tokens: list[int], most: int) -> None:
    lookup = Lookup()
    for end in range(max(1, len(tokens) - 4), len(tokens) + 1):
        drafts = lookup.draft(tokens[:end], most)
        assert len(drafts) <= most
        matches = [
            (size, at)
            for size in (4, 3, 2)
            for at in range(end - size)
            if tokens[at : at + size] == tokens[end - size : end]
        ]
        if not matches:
            assert drafts == ()
        else:
            size, at = max(matches)
            assert drafts[0] == tokens[at + size]
