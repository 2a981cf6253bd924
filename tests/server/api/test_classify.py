"""Classify and Embed: labels and vectors over gRPC, against transformers and peft alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import torch
from house import House, generate, refusal
from tiny import make_classifier, peft_classify, peft_hidden
from transformers import AutoModelForCausalLM

from weft.v1 import adapter_pb2, server_pb2
from weft.v1 import inference_pb2 as pb2

HEADS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "sentiment": (("negative", "positive"), None),
    "topic": (("sport", "money", "music"), "multi_label_classification"),
    "rating": (("stars",), "regression"),
}
TEXT = "é, this is a text that is longer than one chunk of sixty-four tokens is"


@pytest.fixture(scope="module", autouse=True)
def heads(house: House) -> Iterator[None]:
    for seed, (name, (labels, problem_type)) in enumerate(HEADS.items()):
        folder = house.root / "adapters" / name
        make_classifier(house.root / "base", folder, labels, seed, target_modules=["q_proj"], problem_type=problem_type)
        house.create(name, name)
    yield
    for name in HEADS:
        house.delete(name)


@pytest.fixture(autouse=True)
def audited(house: House) -> Iterator[None]:
    yield
    house.audit()


def classify(house: House, **fields: Any) -> pb2.ClassifyResponse:
    response = house.inference.Classify(pb2.ClassifyRequest(**{"text": TEXT, **fields}))
    assert isinstance(response, pb2.ClassifyResponse)
    return response


def embed(house: House, **fields: Any) -> pb2.EmbedResponse:
    response = house.inference.Embed(pb2.EmbedRequest(**{"text": TEXT, **fields}))
    assert isinstance(response, pb2.EmbedResponse)
    return response


def logits(house: House, name: str, ids: list[int]) -> torch.Tensor:
    return peft_classify(house.root / "base", house.root / "adapters" / name, len(HEADS[name][0]), ids)


def hidden(house: House, adapter: str, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(house.root / "base", dtype=torch.float32)
    return peft_hidden(model, house.root / "adapters" / adapter if adapter else None, ids)


@pytest.mark.parametrize("name", HEADS)
def test_each_label_has_its_score(house: House, name: str) -> None:
    response = classify(house, adapter_id=name, request_id="mine")
    ids = house.tokenizer(TEXT)["input_ids"]
    expected = logits(house, name, ids)
    scores, problem_type = {
        "sentiment": (expected.softmax(0), pb2.PROBLEM_TYPE_SINGLE_LABEL),
        "topic": (expected.sigmoid(), pb2.PROBLEM_TYPE_MULTI_LABEL),
        "rating": (expected, pb2.PROBLEM_TYPE_REGRESSION),
    }[name]
    assert response.problem_type == problem_type
    assert [scored.label for scored in response.scores] == [*HEADS[name][0]]
    assert [scored.logit for scored in response.scores] == pytest.approx(expected.tolist(), abs=1e-4)
    assert [scored.score for scored in response.scores] == pytest.approx(scores.tolist(), abs=1e-4)
    assert response.request_id == "mine"
    assert [ref.adapter_id for ref in response.adapters] == [name]
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (len(ids), 0)
    assert response.truncated_tokens == 0


@pytest.mark.parametrize("pooling", [pb2.POOLING_UNSPECIFIED, pb2.POOLING_LAST, pb2.POOLING_MEAN])
@pytest.mark.parametrize("adapter", ["", "one"])
def test_a_vector_is_of_the_last_hidden_states(house: House, adapter: str, pooling: pb2.Pooling) -> None:
    response = embed(house, adapter_id=adapter, pooling=pooling)
    states = hidden(house, adapter, house.tokenizer(TEXT)["input_ids"])
    expected = states.mean(0) if pooling == pb2.POOLING_MEAN else states[-1]
    assert response.pooling == (pooling or pb2.POOLING_LAST)
    assert list(response.values) == pytest.approx((expected / expected.norm()).tolist(), abs=1e-5)
    raw = embed(house, adapter_id=adapter, pooling=pooling, normalize=False)
    assert list(raw.values) == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_mix_of_adapters_embeds(house: House) -> None:
    halves = [{"adapter_id": "one", "weight": 0.5}, {"adapter_id": "one", "weight": 0.5}]
    mixed = embed(house, adapters=halves)
    assert list(mixed.values) == pytest.approx(list(embed(house, adapter_id="one").values), abs=1e-4)
    assert [ref.adapter_id for ref in mixed.adapters] == ["one", "one"]


def test_a_classifiers_adapter_embeds_without_its_head(house: House) -> None:
    vectors = [list(embed(house, adapter_id=adapter).values) for adapter in ("sentiment", "")]
    assert [len(vector) for vector in vectors] == [64, 64]
    assert vectors[0] != vectors[1]


def test_they_share_batches_with_generators_and_nobody_notices(house: House) -> None:
    asked = [
        lambda: classify(house, adapter_id="sentiment").scores,
        lambda: house.inference.Generate(generate(text=TEXT, adapter_id="one", stopping={"max_tokens": 9})).text,
        lambda: embed(house, adapter_id="two", pooling=pb2.POOLING_MEAN).values,
        lambda: classify(house, adapter_id="topic").scores,
    ]
    alone = [ask() for ask in asked]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            wrong = threads.submit(refusal, lambda: classify(house, adapter_id="one"))
            together = list(threads.map(lambda ask: ask(), asked))
            assert together == alone
            assert wrong.result().code is grpc.StatusCode.INVALID_ARGUMENT


def test_token_ids_are_taken_as_they_are(house: House) -> None:
    ids = [9, 80, 200]
    response = classify(house, adapter_id="rating", text=None, token_ids={"ids": ids})
    assert response.scores[0].logit == pytest.approx(float(logits(house, "rating", ids)[0]), abs=1e-4)


def test_a_longer_input_is_cut_where_that_is_asked_for_and_counted(house: House) -> None:
    ids = house.tokenizer(TEXT)["input_ids"]
    for fields in ({}, {"text": None, "token_ids": {"ids": ids}}):
        response = classify(house, adapter_id="rating", truncate=10, **fields)
        assert (response.usage.prompt_tokens, response.truncated_tokens) == (10, len(ids) - 10)
        assert response.scores[0].logit == pytest.approx(float(logits(house, "rating", ids[:10])[0]), abs=1e-4)
    whole = embed(house, truncate=0)
    assert (whole.usage.prompt_tokens, whole.truncated_tokens) == (len(ids), 0)


@pytest.mark.parametrize(
    ("fields", "path", "words"),
    [
        ({"text": ""}, "text", "is empty"),
        ({"text": None}, "input", "is missing"),
        ({"text": None, "token_ids": {"ids": []}}, "token_ids.ids", "is empty"),
        ({"text": None, "token_ids": {"ids": [260]}}, "token_ids.ids[0]", "is 260"),
        ({"text": None, "token_ids": {"ids": [5] * 65537}}, "token_ids.ids", "has 65537 tokens; at most 65536 fit"),
        ({"text": "a" * 4097}, "text", "has 4097 bytes; at most 4096"),
        ({"truncate": -1}, "truncate", "is -1"),
        ({"priority": 101}, "priority", "is 101"),
        ({"cache_salt": "s" * 129}, "cache_salt", "has 129 characters"),
        ({"request_id": "a\nb"}, "request_id", "must be printable"),
    ],
)
def test_what_is_wrong_is_named(house: House, fields: dict[str, Any], path: str, words: str) -> None:
    for ask in (classify, embed):
        refused = refusal(lambda ask=ask: ask(house, **{"adapter_id": "sentiment", **fields}))
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert words in refused.violations[path]


@pytest.mark.parametrize(
    ("pooling", "words"),
    [(pb2.POOLING_CLS, "is POOLING_CLS; this base serves POOLING_LAST, POOLING_MEAN"), (9, "is 9; this base serves")],
)
def test_a_pooling_that_the_base_has_not_is_refused(house: House, pooling: int, words: str) -> None:
    assert words in refusal(lambda: embed(house, pooling=pooling)).violations["pooling"]


def test_an_adapter_is_used_for_what_it_was_made_for(house: House) -> None:
    cases = [
        (lambda: classify(house), "the base has no classification head: name an adapter that has one"),
        (lambda: classify(house, adapter_id="one"), "names one, which has no classification head of its own: use Gen"),
        (
            lambda: house.inference.Generate(generate(text="x", adapter_id="topic")),
            "names topic, a sequence classifier, which gives no tokens: use Classify",
        ),
        (
            lambda: house.inference.Score(pb2.ScoreRequest(text="x", continuations=["y"], adapter_id="topic")),
            "names topic, a sequence classifier, which gives no tokens: use Classify",
        ),
    ]
    for ask, words in cases:
        refused = refusal(ask)
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert words in refused.violations["adapter_id"]


def test_an_adapter_that_is_not_there_is_not_found(house: House) -> None:
    for ask in (classify, embed):
        assert refusal(lambda ask=ask: ask(house, adapter_id="nobody")).code is grpc.StatusCode.NOT_FOUND


def test_the_adapter_service_tells_the_labels(house: House) -> None:
    adapter = house.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name="topic")).adapter
    assert list(adapter.class_labels) == ["sport", "money", "music"]
    assert adapter.problem_type == pb2.PROBLEM_TYPE_MULTI_LABEL
    assert "score" in adapter.modules
    (listed,) = house.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(name_prefix="topic")).adapters
    assert (list(listed.class_labels), listed.problem_type) == ([], adapter.problem_type)
    source = f"file:{house.root}/adapters/topic"
    report = house.adapters.CheckAdapter(adapter_pb2.CheckAdapterRequest(source=source)).report
    kinds = {module.name: module.kind for module in report.modules}
    assert kinds["score"] == "own head: multi_label_classification of 3: sport, money, music"


def test_a_classifier_whose_labels_do_not_fit_is_refused_by_name(house: House) -> None:
    folder = house.root / "adapters" / "topic"
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps({"id2label": {"0": "sport"}}))
    try:
        refused = refusal(lambda: house.create("again", "topic"))
    finally:
        (folder / "config.json").write_text(config)
    assert refused.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "config.json: id2label" in refused.message


def test_the_server_says_that_it_can(house: House) -> None:
    info = house.info.GetServerInfo(server_pb2.GetServerInfoRequest())
    assert {"classify", "embed"} <= {*info.capabilities}
