"""Classifiers with heads of their own, in one batch with generators: transformers' and peft's logits."""

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
    make_feature_extractor,
    make_model,
    peft_classify,
    peft_features,
    save_tokenizer,
)
from transformers import PreTrainedModel

from weft.adapters.classes import ProblemType
from weft.adapters.records import AdapterChange
from weft.errors import GenerationFailed
from weft.server.engine.request import Pooling, Request, Stopping

HEADS = {
    "sentiment": (("negative", "positive"), {}),
    "topic": (("sport", "money", "weather", "music", "food"), {"r": 12, "problem_type": "multi_label_classification"}),
    "rating": (("stars",), {"r": 4, "problem_type": "regression"}),
}
BLOCK = 4
Base = tuple[PreTrainedModel, Path]


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    kind, root = request.param, tmp_path_factory.mktemp(request.param)
    model = make_model(kind, root / "base")
    save_tokenizer(root / "base")
    modules = linear_names(kind)
    for seed, (name, (labels, config)) in enumerate(HEADS.items()):
        make_classifier(root / "base", root / name, labels, seed, target_modules=modules, **config)
    make_adapter(model, root / "writer", 7, r=16, target_modules=modules)
    make_feature_extractor(root / "base", root / "searcher", 8, target_modules=modules)
    return model, root


def start(base: Base, **engine: object) -> Harness:
    adapters = {name: base[1] / name for name in (*HEADS, "writer", "searcher")}
    return Harness(base[1] / "base", adapters, **{"block_tokens": BLOCK, **engine})


@pytest.fixture(scope="module")
def harness(base: Base) -> Harness:
    return start(base)


def prompt(seed: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(3, VOCAB) for _ in range(1 + 7 * seed % 40))


def classify(seed: int, adapter: str) -> Request:
    how = {"stopping": Stopping(max_tokens=0), "pooling": Pooling.LAST, "through_head": True}
    return Request(f"c{seed}", prompt(seed), ((adapter, 1.0),), **how)


def generate(seed: int, adapter: str | None) -> Request:
    adapters = ((adapter, 1.0),) if adapter else ()
    return Request(f"g{seed}", prompt(seed), adapters, stopping=Stopping(max_tokens=12, ignore_eos=True))


def classifications() -> list[Request]:
    return [classify(i, name) for i, name in enumerate([*HEADS] * 3)]


def generations() -> list[Request]:
    return [generate(20 + i, (None, "writer")[i % 2]) for i in range(5)]


def logits(answers: Sequence[Answer]) -> list[list[float]]:
    return [answer.vector.tolist() for answer in answers if answer.vector is not None]


@pytest.fixture(scope="module")
def alone(harness: Harness) -> list[list[float]]:
    return [logits(harness.run([request]))[0] for request in classifications()]


def test_logits_are_those_of_transformers_and_peft(base: Base, harness: Harness) -> None:
    _, root = base
    requests = classifications()
    answers = harness.run([*requests, *generations()])
    for request, answer in zip(requests, answers, strict=False):
        name = request.adapters[0][0]
        expected = peft_classify(root / "base", root / name, len(HEADS[name][0]), request.prompt)
        assert answer.vector is not None
        assert torch.allclose(answer.vector, expected, atol=1e-4, rtol=1e-4)


def test_they_are_the_same_to_the_bit_alone_mixed_chunked_and_preempted(
    base: Base, harness: Harness, alone: list[list[float]]
) -> None:
    tokens = [harness.run([request])[0].ids for request in generations()]
    chunked = start(base, max_batch_tokens=5, max_running_requests=4, prefix_cache=False)
    tight = start(base, kv_tokens=80, max_batch_tokens=8, max_running_requests=8)
    for server in (harness, chunked, tight):
        answers = server.run([*generations(), *classifications()], [*[0] * 5, *range(9)])
        assert [answer.ids for answer in answers[:5]] == tokens
        assert logits(answers[5:]) == alone
    assert tight.engine._scheduler.num_preemptions > 0


def test_half_precision_gives_the_same_to_the_bit_alone_and_mixed(base: Base) -> None:
    server = start(base, dtype="bfloat16")
    mixed = logits(server.run([*generations(), *classifications()])[5:])
    assert mixed == [logits(server.run([request]))[0] for request in classifications()]


def test_padding_that_ends_a_prompt_is_not_what_the_head_sees(base: Base, harness: Harness) -> None:
    _, root = base
    for ids in ((9, 80, 200, 0, 0), (0, 9, 0, 80), (0, 0), tuple(range(3, 3 + 2 * BLOCK)) + (0,) * BLOCK):
        (answer,) = harness.run([replace(classify(1, "sentiment"), prompt=ids)])
        assert answer.vector is not None
        assert torch.allclose(
            answer.vector, peft_classify(root / "base", root / "sentiment", 2, ids), atol=1e-4, rtol=1e-4
        )
        assert answer.finish is not None
        assert (answer.finish.prompt_tokens, answer.finish.completion_tokens) == (len(ids), 0)


def test_a_prefix_that_was_computed_before_is_not_computed_again(harness: Harness) -> None:
    request = classify(5, "topic")
    first, again = (harness.run([request])[0] for _ in range(2))
    assert logits([first]) == logits([again])
    assert again.finish is not None
    assert again.finish.cached_prompt_tokens == (len(request.prompt) - 1) // BLOCK * BLOCK


def test_heads_come_and_go_with_their_adapters(base: Base, alone: list[list[float]]) -> None:
    pages = start(base).store.get("topic").num_pages
    small = start(base, adapter_pages=pages + 1)
    assert logits(small.run(classifications())) == alone
    assert small.registry.get_sample_value("weft_adapter_evictions_total", {"tier": "device"}) > 0


def test_a_name_moves_to_another_head_in_one_step(base: Base) -> None:
    server = start(base, max_batch_tokens=4, max_running_requests=4)
    before = server.submit(classify(5, "sentiment"))
    server.step()
    server.store.update("sentiment", AdapterChange(source=f"file:{base[1] / 'topic'}"))
    after = server.submit(classify(5, "sentiment"))
    server.finish()
    assert [len(vector) for vector in logits([before, after])] == [2, 5]


def test_what_an_adapter_tells_apart_is_known_of_it(harness: Harness) -> None:
    known = {info.name: info.classes for info in harness.store.list()}
    assert {name: classes.labels for name, classes in known.items() if classes} == {
        name: labels for name, (labels, _) in HEADS.items()
    }
    assert known["rating"] is not None
    assert known["rating"].problem_type is ProblemType.REGRESSION
    assert known["writer"] is known["searcher"] is None


def test_a_head_that_gives_no_finite_logits_fails_its_own_request(base: Base, alone: list[list[float]]) -> None:
    server = start(base)
    ref = server.store.acquire("rating")
    head = ref.version.paged.head
    server.store.release(ref)
    assert head is not None
    head.weight.fill_(float("inf"))
    answers = server.run(classifications())
    failed = answers[2::3]
    assert all(isinstance(answer.error, GenerationFailed) for answer in failed)
    assert logits(answers) == [each for i, each in enumerate(alone) if i % 3 != 2]


def test_adapters_of_the_backbone_alone_embed_as_transformers_and_peft_do(base: Base, harness: Harness) -> None:
    _, root = base
    request = Request("e", prompt(5), (("searcher", 1.0),), stopping=Stopping(max_tokens=0), pooling=Pooling.MEAN)
    (answer,) = harness.run([request])
    expected = peft_features(root / "base", root / "searcher", request.prompt).mean(0)
    assert answer.vector is not None
    assert torch.allclose(answer.vector, expected, atol=1e-4, rtol=1e-4)
    assert harness.run([generate(3, "searcher")])[0].ids != harness.run([generate(3, None)])[0].ids
