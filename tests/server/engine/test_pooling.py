"""Vectors of prompts: transformers' own, the same to the bit however they are scheduled, and harmless to others."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import Answer, Harness
from tiny import (
    VOCAB,
    linear_names,
    make_adapter,
    make_classifier,
    make_model,
    peft_classify,
    peft_hidden,
    save_tokenizer,
)
from transformers import PreTrainedModel

from weft.errors import DeadlineExceeded, GenerationFailed, InvalidRequest
from weft.server.engine.batch import Batch
from weft.server.engine.model import Outputs
from weft.server.engine.request import FinishReason, Pooling, Request, Stopping

BLOCK = 4
NAMES = (None, "odd", "large")
NO_TOKENS = Stopping(max_tokens=0)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    root = tmp_path_factory.mktemp(request.param)
    model = make_model(request.param, root / "base")
    save_tokenizer(root / "base")
    for seed, (name, rank) in enumerate({"odd": 12, "large": 32}.items()):
        make_adapter(model, root / name, seed, r=rank, target_modules=linear_names(request.param))
    return model, root


def start(base: tuple[PreTrainedModel, Path], **engine: object) -> Harness:
    adapters = {name: base[1] / name for name in NAMES if name}
    return Harness(base[1] / "base", adapters, adapter_probe=False, **{"block_tokens": BLOCK, **engine})


@pytest.fixture(scope="module")
def harness(base: tuple[PreTrainedModel, Path]) -> Harness:
    return start(base)


def prompt(seed: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(3, VOCAB - 1) for _ in range(1 + 7 * seed % 40))


def embed(seed: int, adapter: str | None, pooling: Pooling) -> Request:
    adapters = ((adapter, 1.0),) if adapter else ()
    return Request(f"e{seed}", prompt(seed), adapters, stopping=NO_TOKENS, pooling=pooling)


def generate(seed: int, adapter: str | None) -> Request:
    adapters = ((adapter, 1.0),) if adapter else ()
    return Request(f"g{seed}", prompt(seed), adapters, stopping=Stopping(max_tokens=20, ignore_eos=True))


def embeds() -> list[Request]:
    return [embed(i, NAMES[i % 3], (Pooling.LAST, Pooling.MEAN)[i % 2]) for i in range(12)]


def generates() -> list[Request]:
    return [generate(20 + i, NAMES[i % 3]) for i in range(6)]


def vectors(answers: Sequence[Answer]) -> list[torch.Tensor]:
    assert all(answer.vector is not None for answer in answers)
    return [answer.vector for answer in answers if answer.vector is not None]


def assert_equal(made: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(made, expected, strict=True))


@pytest.fixture(scope="module")
def alone(harness: Harness) -> list[torch.Tensor]:
    return [vectors(harness.run([request]))[0] for request in embeds()]


def test_vectors_are_those_of_transformers_and_peft(
    base: tuple[PreTrainedModel, Path], alone: list[torch.Tensor]
) -> None:
    model, root = base
    for request, made in zip(embeds(), alone, strict=True):
        folder = root / request.adapters[0][0] if request.adapters else None
        hidden = peft_hidden(model, folder, request.prompt)
        expected = hidden[-1] if request.pooling is Pooling.LAST else hidden.mean(0)
        assert torch.allclose(made, expected, atol=1e-4, rtol=1e-4)


def test_they_are_the_same_to_the_bit_mixed_with_generators_in_chunks_of_any_size(
    base: tuple[PreTrainedModel, Path], harness: Harness, alone: list[torch.Tensor]
) -> None:
    requests = [request for pair in zip(embeds(), generates() * 2, strict=True) for request in pair]
    requests = [replace(request, request_id=f"r{i}") for i, request in enumerate(requests)]
    tokens = [harness.run([request])[0].ids for request in requests[1::2]]
    small = [start(base, max_batch_tokens=budget, max_running_requests=4, prefix_cache=False) for budget in (5, 17)]
    for server in (harness, *small, start(base, run_ahead=True)):
        answers = server.run(requests, [i % 5 for i in range(len(requests))])
        assert_equal(vectors(answers[::2]), alone)
        assert [answer.ids for answer in answers[1::2]] == tokens


def test_they_are_the_same_to_the_bit_across_preemptions(
    base: tuple[PreTrainedModel, Path], alone: list[torch.Tensor]
) -> None:
    tight = start(base, kv_tokens=80, max_batch_tokens=8, max_running_requests=8)
    answers = tight.run([*embeds(), *generates()], [*range(12), *[0] * 6])
    assert_equal(vectors(answers[:12]), alone)
    assert tight.engine._scheduler.num_preemptions > 0


def test_the_last_state_reads_the_prefix_cache_and_the_mean_only_fills_it(base: tuple[PreTrainedModel, Path]) -> None:
    server = start(base)
    asked = [embed(5, "odd", pooling) for pooling in (Pooling.MEAN, Pooling.MEAN, Pooling.LAST)]
    first, again, last = (server.run([request])[0] for request in asked)
    cached = [answer.finish.cached_prompt_tokens for answer in (first, again, last) if answer.finish is not None]
    assert cached == [0, 0, (len(asked[0].prompt) - 1) // BLOCK * BLOCK]
    assert_equal(vectors([again]), vectors([first]))
    assert_equal(vectors([last]), vectors(start(base, prefix_cache=False).run([asked[2]])))


def test_no_logits_are_computed_for_them(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, seen = harness.engine._model.forward, []

    def count(batch: Batch) -> Outputs:
        made = forward(batch)
        seen.append(len(made.logits))
        return made

    monkeypatch.setattr(harness.engine._model, "forward", count)
    answers = harness.run([embed(9, None, Pooling.LAST), embed(5, "odd", Pooling.MEAN)])
    assert all(answer.vector is not None and answer.finish is not None for answer in answers)
    assert {answer.finish.reason for answer in answers if answer.finish} == {FinishReason.MAX_TOKENS}
    assert set(seen) == {0}


def test_they_are_measured_as_what_waits_and_gives_no_tokens(base: tuple[PreTrainedModel, Path]) -> None:
    server = start(base)
    server.run([embed(i, "odd", Pooling.MEAN) for i in range(3)])
    named = ("weft_request_queue_seconds", "weft_e2e_request_latency_seconds", "weft_time_to_first_token_seconds")
    counts = [server.registry.get_sample_value(f"{name}_count", {"adapter": "odd"}) for name in named]
    assert counts == [3, 3, None]
    assert server.registry.get_sample_value("weft_request_generation_tokens_count") == 0


def test_what_is_not_finite_ends_its_own_request_only(base: tuple[PreTrainedModel, Path]) -> None:
    server = start(base, max_batch_tokens=16)
    good = [embed(5, "large", Pooling.MEAN), generate(3, None)]
    vector, tokens = (server.run([request])[0] for request in good)
    ref = server.store.acquire("odd")
    for first, last in ref.version.paged.runs:
        for site in server.store._pool.sites.values():
            site.b[first:last].fill_(float("nan"))
    server.store.release(ref)
    spoilt = [embed(9, "odd", Pooling.LAST), embed(5, "odd", Pooling.MEAN)]
    *failed, embedded, generated = server.run([*spoilt, *good])
    assert all(isinstance(answer.error, GenerationFailed) for answer in failed)
    assert all("odd gave numbers that are not finite" in str(answer.error) for answer in failed)
    assert_equal(vectors([embedded]), vectors([vector]))
    assert generated.ids == tokens.ids


def test_a_step_that_one_request_breaks_goes_on_for_the_others(
    base: tuple[PreTrainedModel, Path], harness: Harness, alone: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = harness.engine._model.forward

    def fail(batch: Batch) -> Outputs:
        if VOCAB - 1 in batch.input_ids:
            raise RuntimeError("this one can't be run")
        return forward(batch)

    monkeypatch.setattr(harness.engine._model, "forward", fail)
    doomed = Request("doomed", (VOCAB - 1,), stopping=NO_TOKENS, pooling=Pooling.MEAN)
    guilty, *others = harness.run([doomed, *embeds()])
    assert isinstance(guilty.error, GenerationFailed)
    assert_equal(vectors(others), alone)


def test_deadlines_and_cancels_leave_nothing_behind(base: tuple[PreTrainedModel, Path]) -> None:
    server = start(base, max_batch_tokens=5, max_running_requests=4)
    now_s = [0.0]
    server.engine.clock = lambda: now_s[0]
    late = server.submit(replace(embed(5, "odd", Pooling.MEAN), deadline_s=1.0))
    gone = embed(9, "large", Pooling.LAST)
    server.submit(gone)
    server.step()
    server.engine.cancel(gone)
    now_s[0] = 2.0
    server.step()
    assert isinstance(late.error, DeadlineExceeded)
    assert not server.engine.has_work
    assert all(info.num_in_flight == 0 for info in server.store.list())
    assert server.engine._scheduler.pool.num_free == server.engine._scheduler.pool.capacity


def test_the_first_token_of_a_causal_model_stands_for_nothing(harness: Harness) -> None:
    with pytest.raises(InvalidRequest, match="pooling: is CLS; this base serves LAST, MEAN"):
        harness.submit(embed(5, None, Pooling.CLS))


def test_a_model_that_runs_its_backbone_from_within_pools_what_that_gives(tmp_path: Path) -> None:
    model = make_model("opt", tmp_path / "base", ffn_dim=96, word_embed_proj_dim=64)
    save_tokenizer(tmp_path / "base")
    make_classifier(tmp_path / "base", tmp_path / "mood", ("bad", "good"), target_modules=["q_proj", "fc2"])
    server = Harness(tmp_path / "base", {"mood": tmp_path / "mood"})
    head = replace(embed(5, "mood", Pooling.LAST), through_head=True)
    mean, logits = vectors(server.run([embed(9, None, Pooling.MEAN), head]))
    assert torch.allclose(mean, peft_hidden(model, None, prompt(9)).mean(0), atol=1e-4, rtol=1e-4)
    expected = peft_classify(tmp_path / "base", tmp_path / "mood", 2, prompt(5))
    assert torch.allclose(logits, expected, atol=1e-4, rtol=1e-4)
