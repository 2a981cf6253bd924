"""A server of an encoder: labels and vectors over gRPC, and a clear word for what it can't give."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from encoders import LINEAR, POSITIONS, hidden_of, make_encoder, own_logits
from grpc_health.v1 import health_pb2, health_pb2_grpc
from house import Refusal, refusal
from serving import served
from stubs import Stubs
from tiny import make_classifier, peft_classify
from transformers import AutoTokenizer, PreTrainedModel

from weft.server.config import EngineConfig, ModelConfig, ServerConfig
from weft.v1 import adapter_pb2, server_pb2
from weft.v1 import inference_pb2 as pb2

LABELS = {"mood": ("bad", "good"), "topic": ("sport", "money", "music", "film", "law")}
TEXTS = ("a", "a match that was lost in the last minute", "rates rise", "x" * 100)


@dataclass(frozen=True)
class Place(Stubs):
    """What is served, and stubs to ask for it."""

    root: Path
    model: PreTrainedModel

    def ids(self, text: str) -> list[int]:
        ids: list[int] = AutoTokenizer.from_pretrained(self.root / "base")(text)["input_ids"]
        return ids

    def classify(self, text: str, name: str = "") -> pb2.ClassifyResponse:
        response = self.inference.Classify(pb2.ClassifyRequest(text=text, adapter_id=name))
        assert isinstance(response, pb2.ClassifyResponse)
        return response

    def embed(self, **fields: Any) -> pb2.EmbedResponse:
        response = self.inference.Embed(pb2.EmbedRequest(**fields))
        assert isinstance(response, pb2.EmbedResponse)
        return response


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("encoder")
    settings = {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "problem_type": "multi_label_classification"}
    model = make_encoder("bert", root / "base", **settings)
    for seed, (name, labels) in enumerate(LABELS.items()):
        make_classifier(root / "base", root / "adapters" / name, labels, seed, target_modules=LINEAR["bert"])
    config = ServerConfig(
        model=ModelConfig(str(root / "base")),
        engine=EngineConfig(max_batch_tokens=64, adapter_pages=32),
        adapters=root / "adapters",
        port=0,
        metrics_port=0,
    )
    with served(config) as server, grpc.insecure_channel(server.address) as channel:
        yield Place(channel, root, model)


def test_classifiers_of_all_label_counts_share_batches_with_vectors(place: Place) -> None:
    asked = [(text, name) for text in TEXTS for name in LABELS]
    with ThreadPoolExecutor(len(asked)) as threads:
        vectors = [threads.submit(place.embed, text=text, normalize=False) for text in TEXTS]
        answers = list(threads.map(lambda each: place.classify(*each), asked))
    for (text, name), answer in zip(asked, answers, strict=True):
        expected = peft_classify(
            place.root / "base", place.root / "adapters" / name, len(LABELS[name]), place.ids(text)
        )
        assert [each.label for each in answer.scores] == [*LABELS[name]]
        assert [each.logit for each in answer.scores] == pytest.approx(expected.tolist(), abs=1e-4)
        assert [each.score for each in answer.scores] == pytest.approx(expected.softmax(0).tolist(), abs=1e-4)
        assert [ref.adapter_id for ref in answer.adapters] == [name]
    for text, vector in zip(TEXTS, vectors, strict=True):
        expected = hidden_of(place.model, place.ids(text)).mean(0)
        assert list(vector.result().values) == pytest.approx(expected.tolist(), abs=1e-4)


def test_the_checkpoints_own_classifier_answers_without_an_adapter(place: Place) -> None:
    answer, expected = place.classify(TEXTS[1]), own_logits(place.model, place.ids(TEXTS[1]))
    assert [each.label for each in answer.scores] == ["no", "maybe", "yes"]
    assert [each.score for each in answer.scores] == pytest.approx(expected.sigmoid().tolist(), abs=1e-4)
    assert answer.problem_type == pb2.PROBLEM_TYPE_MULTI_LABEL
    assert not answer.adapters


def test_every_pooling_is_there(place: Place) -> None:
    hidden = hidden_of(place.model, place.ids(TEXTS[1]))
    expected = {pb2.POOLING_MEAN: hidden.mean(0), pb2.POOLING_CLS: hidden[0], pb2.POOLING_LAST: hidden[-1]}
    for pooling, vector in expected.items():
        answer = place.embed(text=TEXTS[1], pooling=pooling)
        assert list(answer.values) == pytest.approx((vector / vector.norm()).tolist(), abs=1e-4)
    assert place.embed(text=TEXTS[1]).pooling == pb2.POOLING_MEAN


def test_tokens_are_refused_in_one_clear_line(place: Place) -> None:
    def check(refused: Refusal) -> None:
        assert refused.code is grpc.StatusCode.FAILED_PRECONDITION
        assert refused.message == "the base is an encoder, which gives no text and no scores: ask for Classify or Embed"

    check(refusal(lambda: place.inference.Generate(pb2.GenerateRequest(text="a"))))
    check(refusal(lambda: list(place.inference.StreamGenerate(pb2.StreamGenerateRequest(text="a")))))
    check(refusal(lambda: place.inference.Score(pb2.ScoreRequest(text="a", continuations=["b"]))))


def test_a_text_that_is_too_long_is_refused_or_cut(place: Place) -> None:
    text = "y" * 200
    assert f"at most {POSITIONS} fit" in refusal(lambda: place.classify(text, "mood")).message
    asked = pb2.ClassifyRequest(text=text, adapter_id="mood", truncate=0)
    answer = place.inference.Classify(asked)
    assert answer.usage.prompt_tokens == POSITIONS
    assert answer.truncated_tokens == len(place.ids(text)) - POSITIONS


def test_the_server_says_what_it_is(place: Place) -> None:
    info = place.info.GetServerInfo(server_pb2.GetServerInfoRequest())
    assert {"classify", "embed", "adapters"} <= {*info.capabilities}
    assert not {"generate", "stream", "score", "json-schema"} & {*info.capabilities}
    limits = info.limits
    assert (limits.max_context_tokens, limits.max_prompt_tokens) == (POSITIONS, POSITIONS)
    assert (limits.max_batch_tokens, limits.kv_capacity_tokens) == (POSITIONS, 0)
    place.classify(TEXTS[0], "mood")
    plan = place.adapters.PlanCapacity(adapter_pb2.PlanCapacityRequest())
    assert (plan.kv_tokens_total, plan.kv_tokens_free) == (0, 0)
    health = health_pb2_grpc.HealthStub(place.channel).Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.SERVING
