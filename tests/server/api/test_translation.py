"""Every field that can be wrong, over real gRPC: the code, the detail and the field's path."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2 as details_pb2
from house import MAX_PROMPT_BYTES, House, Refusal, generate, refusal, stream

from weft.errors import InvalidRequest
from weft.server.api.translation import MAX_DURATION_S, RequestLimits, to_engine_request, to_score_request
from weft.v1 import inference_pb2 as pb2

VOCAB = 260
NAN, INF = float("nan"), float("inf")
GOOD: dict[str, Any] = {"token_ids": {"ids": [5]}, "stopping": {"max_tokens": 1}}
USER = {"role": "user", "content": "hi"}
VILLAIN = {"role": "villain", "content": "hi"}


def sampling(**fields: Any) -> dict[str, Any]:
    return {"token_ids": {"ids": [5]}, "sampling": fields}


def stopping(**fields: Any) -> dict[str, Any]:
    return {"token_ids": {"ids": [5]}, "stopping": fields}


def terms(*adapters: dict[str, Any]) -> dict[str, Any]:
    return {**GOOD, "adapters": adapters}


def chat(*messages: dict[str, str], **fields: Any) -> dict[str, Any]:
    return {"chat": {"messages": messages, **fields}}


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({}, "prompt", "is missing"),
    ({"text": ""}, "text", "is empty"),
    ({"text": "é" * MAX_PROMPT_BYTES}, "text", f"has {2 * MAX_PROMPT_BYTES} bytes; at most {MAX_PROMPT_BYTES}"),
    ({"token_ids": {}}, "token_ids.ids", "is empty"),
    ({"token_ids": {"ids": [5, VOCAB]}}, "token_ids.ids[1]", f"is {VOCAB}; token ids end at {VOCAB - 1}"),
    (chat(), "chat.messages", "is empty"),
    (chat({"content": "hi"}), "chat.messages[0].role", "is empty"),
    (chat(USER, add_generation_prompt=True, continue_final_message=True), "chat.continue_final_message", "choose one"),
    (chat({**USER, "content": "x" * 5000}), "chat", f"has 5004 bytes; at most {MAX_PROMPT_BYTES}"),
    (chat(VILLAIN), "chat", "villains are not served"),
    (sampling(temperature=-0.1), "sampling.temperature", "is -0.1; must be at least 0 and at most 100"),
    (sampling(temperature=100.1), "sampling.temperature", "at most 100"),
    (sampling(temperature=NAN), "sampling.temperature", "is nan"),
    (sampling(temperature=INF), "sampling.temperature", "is inf"),
    (sampling(top_k=-1), "sampling.top_k", "is -1"),
    (sampling(top_p=0), "sampling.top_p", "is 0; must be above 0 and at most 1"),
    (sampling(top_p=1.01), "sampling.top_p", "is 1.01"),
    (sampling(top_p=NAN), "sampling.top_p", "is nan"),
    (sampling(min_p=-0.01), "sampling.min_p", "is -0.01"),
    (sampling(min_p=1.01), "sampling.min_p", "is 1.01"),
    (sampling(min_p=NAN), "sampling.min_p", "is nan"),
    (sampling(typical_p=0), "sampling.typical_p", "is 0"),
    (sampling(typical_p=1.01), "sampling.typical_p", "is 1.01"),
    (sampling(typical_p=NAN), "sampling.typical_p", "is nan"),
    (sampling(repetition_penalty=0), "sampling.repetition_penalty", "is 0; must be at least 0.001 and at most 1000"),
    (sampling(repetition_penalty=INF), "sampling.repetition_penalty", "is inf; must be finite, at least 0.001"),
    (sampling(repetition_penalty=NAN), "sampling.repetition_penalty", "is nan"),
    (sampling(presence_penalty=-2.1), "sampling.presence_penalty", "is -2.1; must be at least -2 and at most 2"),
    (sampling(presence_penalty=NAN), "sampling.presence_penalty", "is nan"),
    (sampling(frequency_penalty=2.1), "sampling.frequency_penalty", "is 2.1"),
    (sampling(frequency_penalty=NAN), "sampling.frequency_penalty", "is nan"),
    (sampling(logit_bias={VOCAB: 1.0}), f"sampling.logit_bias[{VOCAB}]", f"token ids end at {VOCAB - 1}"),
    (sampling(logit_bias={7: NAN}), "sampling.logit_bias[7]", "is nan"),
    (sampling(logit_bias={7: -INF}), "sampling.logit_bias[7]", "is -inf"),
    (sampling(logit_bias={7: 1000.5}), "sampling.logit_bias[7]", "is 1000.5; must be at least -1000 and at most 1000"),
    (sampling(logit_bias=dict.fromkeys(range(1025), 1.0)), "sampling.logit_bias", "has 1025 entries; at most 1024"),
    (stopping(max_tokens=0), "stopping.max_tokens", "is 0"),
    (stopping(max_tokens=-1), "stopping.max_tokens", "is -1"),
    (stopping(min_tokens=-1), "stopping.min_tokens", "is -1"),
    (stopping(max_tokens=4, min_tokens=5), "stopping.min_tokens", "is 5; must be at most max_tokens, which is 4"),
    (stopping(stop_sequences=["a", ""]), "stopping.stop_sequences[1]", "has 0 characters"),
    (stopping(stop_sequences=["a" * 1025]), "stopping.stop_sequences[0]", "has 1025 characters"),
    (stopping(stop_sequences=["a"] * 65), "stopping.stop_sequences", "has 65 entries; at most 64"),
    (stopping(stop_token_ids=[7, VOCAB]), "stopping.stop_token_ids[1]", f"token ids end at {VOCAB - 1}"),
    (stopping(stop_token_ids=[7] * 65), "stopping.stop_token_ids", "has 65 entries; at most 64"),
    (stopping(time_limit={}), "stopping.time_limit", "is 0 s"),
    (stopping(time_limit={"seconds": -1}), "stopping.time_limit", "is -1 s"),
    (
        stopping(time_limit={"seconds": 2, "nanos": -1}),
        "stopping.time_limit",
        "has 2 seconds and -1 nanos; a Duration's",
    ),
    (stopping(time_limit={"seconds": -1, "nanos": 1}), "stopping.time_limit", "has -1 seconds and 1 nanos"),
    (stopping(time_limit={"seconds": 1, "nanos": 10**9}), "stopping.time_limit.nanos", "is 1000000000; a Duration has"),
    (stopping(time_limit={"nanos": -(10**9)}), "stopping.time_limit.nanos", "is -1000000000"),
    (stopping(time_limit={"seconds": MAX_DURATION_S + 1}), "stopping.time_limit.seconds", "is 315576000001"),
    (stopping(time_limit={"seconds": -(2**63)}), "stopping.time_limit.seconds", "a Duration has at most 315576000000"),
    ({**GOOD, "output": {"top_logprobs": -1}}, "output.top_logprobs", "is -1"),
    ({**GOOD, "output": {"top_logprobs": 21}}, "output.top_logprobs", "is 21; must be at least 0 and at most 20"),
    (terms({"weight": 1.0}), "adapters[0].adapter_id", "is empty"),
    (terms({"adapter_id": "one"}, {"adapter_id": "two", "weight": 0.0}), "adapters[1].weight", "is 0"),
    (terms({"adapter_id": "one", "weight": NAN}), "adapters[0].weight", "is nan"),
    (terms({"adapter_id": "one", "weight": INF}), "adapters[0].weight", "is inf"),
    (terms(*[{"adapter_id": "one"}] * 9), "adapters", "has 9 entries; at most 8"),
    (terms({"adapter_id": "one", "weight": 100.5}), "adapters[0].weight", "is 100.5; must be at least -100"),
    (
        terms({"adapter_id": "a" * 201}),
        "adapters[0].adapter_id",
        "has 201 characters; no adapter's id has",
    ),
    ({**GOOD, "adapter_id": "a" * 201}, "adapter_id", "has 201 characters"),
    (chat(*[{}] * 1025), "chat.messages", "has 1025 entries; at most 1024"),
    (terms(*[{}] * 100_000), "adapters", "has 100000 entries"),
    (stopping(stop_sequences=[""] * 100_000), "stopping.stop_sequences", "has 100000 entries"),
    (stopping(stop_token_ids=[VOCAB] * 100_000), "stopping.stop_token_ids", "has 100000 entries"),
    ({**terms({"adapter_id": "two"}), "adapter_id": "one"}, "adapters", "so is adapter_id"),
    ({**GOOD, "request_id": "r" * 129}, "request_id", "has 129 characters; at most 128"),
    ({**GOOD, "request_id": "a\nb"}, "request_id", "must be printable"),
]

EDGES: list[dict[str, Any]] = [
    sampling(temperature=100, top_p=1, min_p=1, typical_p=1, presence_penalty=-2, frequency_penalty=2),
    sampling(temperature=1, top_k=2**31 - 1, top_p=1e-6, min_p=0, typical_p=1e-6, repetition_penalty=1e-3, seed=0),
    sampling(logit_bias=dict.fromkeys(range(VOCAB), 1.0)),
    sampling(logit_bias={7: 1000, 8: -1000}),
    terms({"adapter_id": "one", "weight": 100}, {"adapter_id": "two", "weight": -100}),
    chat(*[{"role": "u", "content": "x"}] * 1024) | {"stopping": {"max_tokens": 1}},
    stopping(max_tokens=1, min_tokens=1, stop_sequences=["a" * 1024] * 64, stop_token_ids=[VOCAB - 1] * 64),
    stopping(max_tokens=2**31 - 1, time_limit={"nanos": 1}),
    stopping(max_tokens=1, time_limit={"seconds": MAX_DURATION_S, "nanos": 999_999_999}),
    terms(*[{"adapter_id": "one", "weight": -0.1}] * 8),
    {**GOOD, "request_id": "é" * 128, "output": {"top_logprobs": 20}},
    {"text": "x" * MAX_PROMPT_BYTES, "stopping": {"max_tokens": 1}},
    chat(USER, continue_final_message=True, add_generation_prompt=False) | {"stopping": {"max_tokens": 1}},
]


def assert_bad_field(refused: Refusal, path: str, words: str) -> None:
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.reason == "INVALID_REQUEST"
    assert list(refused.violations) == [path]
    assert words in refused.violations[path]
    assert words in refused.message


@pytest.mark.parametrize(("fields", "path", "words"), BAD)
def test_a_bad_field_is_named(house: House, fields: dict[str, Any], path: str, words: str) -> None:
    assert_bad_field(refusal(lambda: house.inference.Generate(generate(**fields))), path, words)


@pytest.mark.parametrize("fields", EDGES)
def test_the_ends_of_the_ranges_are_served(house: House, fields: dict[str, Any]) -> None:
    assert house.inference.Generate(generate(**fields)).finish_reason != pb2.FINISH_REASON_UNSPECIFIED


def test_a_stream_is_refused_in_the_same_words(house: House) -> None:
    fields = sampling(top_p=2.0)
    unary = refusal(lambda: house.inference.Generate(generate(**fields)))
    streamed = refusal(lambda: list(house.inference.StreamGenerate(stream(**fields))))
    assert streamed == unary


def test_every_violation_is_listed_at_once(house: House) -> None:
    bad = generate(
        text="", sampling={"top_p": 2.0, "min_p": -1.0}, stopping={"max_tokens": 0}, request_id="\t", adapters=[{}]
    )
    refused = refusal(lambda: house.inference.Generate(bad))
    assert set(refused.violations) == {
        "text",
        "sampling.top_p",
        "sampling.min_p",
        "stopping.max_tokens",
        "request_id",
        "adapters[0].adapter_id",
    }


def test_hundreds_of_violations_still_fit_in_the_trailers(house: House) -> None:
    refused = refusal(lambda: house.inference.Generate(generate(**chat(*[{}] * 500))))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    last = refused.detail(details_pb2.BadRequest).field_violations[-1]
    assert "more are not listed" in last.description


def test_a_prompt_past_the_context_is_refused_with_the_numbers(house: House) -> None:
    prompt = {"token_ids": {"ids": [5] * 65536}}
    refused = refusal(lambda: house.inference.Generate(generate(**prompt)))
    assert_bad_field(refused, "token_ids.ids", "has 65536 tokens; at most 65535 fit")


def test_a_prompt_too_long_in_tokens_is_reported_at_the_field_that_was_set(house: House) -> None:
    long = "x" * 70_000
    with house.variant(max_prompt_bytes=100_000) as inference:
        for fields, path, num_tokens in (
            ({"text": long}, "text", 70_001),
            (chat({**USER, "content": long}), "chat", 70_020),
        ):
            for call in (
                lambda fields=fields: inference.Generate(generate(**fields)),
                lambda fields=fields: inference.Score(pb2.ScoreRequest(continuations=["a"], **fields)),
            ):
                assert_bad_field(refusal(call), path, f"has {num_tokens} tokens")


@pytest.mark.parametrize(
    ("adapter_id", "metadata"),
    [
        ("one", (("x-gateway-model-name-rewrite", "two"),)),
        ("", (("x-gateway-model-name-rewrite", "one"), ("x-llm-d-model-name-rewrite", "two"))),
        ("", (("x-gateway-model-name-rewrite", "one"), ("x-gateway-model-name-rewrite", "two"))),
        ("one@sha256:00", (("x-gateway-model-name-rewrite", "two"),)),
        ("one@sha256:00", (("x-gateway-model-name-rewrite", "one@sha256:11"),)),
    ],
)
def test_names_of_the_adapter_that_disagree_are_refused(
    house: House, adapter_id: str, metadata: tuple[tuple[str, str], ...]
) -> None:
    request = generate(adapter_id=adapter_id, **GOOD)
    refused = refusal(lambda: house.inference.Generate(request, metadata=metadata))
    assert_bad_field(refused, "adapter_id", "disagree")


@pytest.mark.parametrize("key", ["x-gateway-inference-fairness-id", "x-llm-d-inference-fairness-id"])
def test_the_caller_comes_as_metadata(key: str) -> None:
    def caller(*metadata: tuple[str, str]) -> str:
        limits = RequestLimits(
            vocab_size=VOCAB, context_length=64, max_prompt_bytes=100, max_requests=9, has_chat_template=True
        )
        score = pb2.ScoreRequest(text="x", continuations=["y"])
        callers = {
            to_engine_request(generate(text="x"), metadata, limits, 0.0).caller,
            to_score_request(score, metadata, limits, 0.0).caller,
        }
        return callers.pop()

    assert caller() == caller(("other", "team"), (key, "")) == ""
    assert caller((key, "team a"), ("x-gateway-inference-fairness-id", "team a")) == "team a"
    with pytest.raises(InvalidRequest, match=r"metadata x-.*: names callers that disagree: 'a', 'b'"):
        caller((key, "a"), (key, "b"))
    with pytest.raises(InvalidRequest, match="has 257 characters; at most 256"):
        caller((key, "a" * 257))


def test_metadata_is_exclusive_with_a_mix(house: House) -> None:
    request = generate(**terms({"adapter_id": "two"}))
    metadata = (("x-llm-d-model-name-rewrite", "one"),)
    assert_bad_field(refusal(lambda: house.inference.Generate(request, metadata=metadata)), "adapters", "adapter_id")


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({}, "prompt"),
        ({"text": "x" * 5000}, "text"),
        (chat(), "chat.messages"),
        (chat(VILLAIN), "chat"),
    ],
)
def test_tokenize_checks_its_prompt_too(house: House, fields: dict[str, Any], path: str) -> None:
    refused = refusal(lambda: house.inference.Tokenize(pb2.TokenizeRequest(**fields)))
    assert list(refused.violations) == [path]


def test_detokenize_checks_its_ids(house: House) -> None:
    refused = refusal(lambda: house.inference.Detokenize(pb2.DetokenizeRequest(token_ids=[5, VOCAB])))
    assert_bad_field(refused, "token_ids[1]", f"is {VOCAB}")


def test_chat_is_refused_by_name_where_there_is_no_template(house: House) -> None:
    with house.variant(has_chat_template=False) as inference:
        generated = refusal(lambda: inference.Generate(generate(**chat(USER))))
        tokenized = refusal(lambda: inference.Tokenize(pb2.TokenizeRequest(**chat(USER))))
    assert_bad_field(generated, "chat", "no chat template")
    assert_bad_field(tokenized, "chat", "no chat template")


@pytest.mark.parametrize("adapter_id", ["missing", "one@sha256:" + "0" * 64, "one@", "one@sha256:xyz", "on e, two"])
def test_an_adapter_that_is_not_there_is_not_found(house: House, adapter_id: str) -> None:
    for fields in ({"adapter_id": adapter_id}, {"adapters": [{"adapter_id": "two"}, {"adapter_id": adapter_id}]}):
        request = generate(**GOOD, **fields)
        refused = refusal(lambda request=request: house.inference.Generate(request))
        assert refused.code is grpc.StatusCode.NOT_FOUND
        assert refused.reason == "ADAPTER_NOT_FOUND"
        resource = refused.detail(details_pb2.ResourceInfo)
        assert (resource.resource_type, resource.resource_name) == ("weft.v1.Adapter", adapter_id)
    house.audit()


def test_nothing_refused_holds_anything(house: House) -> None:
    house.audit()


def test_a_prompt_is_not_tokenized_again_and_again_without_a_bound() -> None:
    limits = RequestLimits(
        vocab_size=VOCAB, context_length=64, max_prompt_bytes=100, max_requests=1000, has_chat_template=True
    )
    for count, wanted in ((16, ""), (17, "before each the text: 1700 bytes; at most 1600")):
        request = pb2.ScoreRequest(text="x" * 100, continuations=["y"] * count)
        if wanted:
            with pytest.raises(InvalidRequest, match=wanted):
                to_score_request(request, (), limits, 0.0)
        else:
            assert to_score_request(request, (), limits, 0.0).stopping.max_tokens == 0
