"""Several answers to one prompt: each is what a request of its own would have got."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from house import ENDLESS, MAX_QUEUED, MAX_RUNNING, House, generate, refusal, stream

from weft.v1 import inference_pb2 as pb2

PROMPT = {"token_ids": {"ids": [5, 6, 7]}}
LONG = {"max_tokens": 12, "ignore_eos": True}
LAST_SEED = 2**64 - 1


def warm(seed: int | None = None) -> dict[str, Any]:
    return {"temperature": 2.0} if seed is None else {"temperature": 2.0, "seed": seed}


def alone(house: House, seed: int, **fields: Any) -> pb2.GenerateResponse:
    response = house.inference.Generate(generate(sampling=warm(seed), **{"stopping": LONG, **PROMPT, **fields}))
    assert isinstance(response, pb2.GenerateResponse)
    return response


def same(one: pb2.GenerateResponse | pb2.Alternative, other: pb2.GenerateResponse | pb2.Alternative) -> bool:
    fields = ("text", "finish_reason", "stop_sequence")
    return list(one.tokens) == list(other.tokens) and all(getattr(one, f) == getattr(other, f) for f in fields)


@pytest.mark.parametrize("adapter_id", ["", "one"])
@pytest.mark.parametrize(("seed", "seeds"), [(7, (7, 8, 9)), (LAST_SEED, (LAST_SEED, 0, 1))])
def test_each_answer_is_that_of_its_own_seed(house: House, adapter_id: str, seed: int, seeds: tuple[int, ...]) -> None:
    fields = {"adapter_id": adapter_id, "stopping": {**LONG, "stop_sequences": ["a", "e"]}}
    first, *rest = (alone(house, s, **fields) for s in seeds)
    several = alone(house, seed, n=3, **fields)
    assert same(several, first)
    assert len(several.alternatives) == 2
    assert all(same(got, wanted) for got, wanted in zip(several.alternatives, rest, strict=True))
    assert several.adapters == first.adapters
    house.audit()


def test_usage_counts_the_prompt_once_and_all_answers(house: House) -> None:
    response = alone(house, 1, n=12)
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (3, 12 * 12)
    assert response.timing.decode.ToNanoseconds() > 0
    house.audit()


def test_without_a_seed_the_answers_differ(house: House) -> None:
    response = house.inference.Generate(generate(n=4, sampling=warm(), stopping=LONG, **PROMPT))
    texts = [[token.id for token in answer.tokens] for answer in (response, *response.alternatives)]
    assert len({tuple(ids) for ids in texts}) == 4


def test_one_answer_has_no_alternatives(house: House) -> None:
    assert not alone(house, 1, n=1).alternatives


def test_a_stream_says_whose_each_message_is(house: House) -> None:
    request = stream(n=3, sampling=warm(5), stopping=LONG, output={"include_prompt": True}, adapter_id="one", **PROMPT)
    messages = list(house.inference.StreamGenerate(request))
    assert {message.index for message in messages} == {0, 1, 2}
    first, *others = messages
    *before, last = messages
    assert first.adapters
    assert not any(message.adapters for message in others)
    assert last.HasField("usage")
    assert last.HasField("timing")
    assert not any(message.HasField("usage") or message.HasField("timing") for message in before)
    for index in range(3):
        own = [message for message in messages if message.index == index]
        tokens = [token for message in own for token in message.tokens]
        assert [token.id for token in tokens[:3]] == PROMPT["token_ids"]["ids"]
        assert [m.finish_reason for m in own] == [0] * (len(own) - 1) + [pb2.FINISH_REASON_MAX_TOKENS]
        assert tokens[3:] == list(alone(house, 5 + index, adapter_id="one").tokens)


def test_cancelling_ends_all_answers(house: House) -> None:
    stopping = {"max_tokens": ENDLESS, "ignore_eos": True}
    call = house.inference.StreamGenerate(stream(n=MAX_RUNNING, sampling=warm(1), stopping=stopping, **PROMPT))
    seen: set[int] = set()
    while len(seen) < MAX_RUNNING:
        seen.add(next(call).index)
    call.cancel()
    house.audit()


def test_all_are_queued_or_none(house: House) -> None:
    stopping = {"max_tokens": ENDLESS, "ignore_eos": True}
    call = house.inference.StreamGenerate(stream(n=8, sampling=warm(1), stopping=stopping, **PROMPT))
    next(call)
    refused = refusal(lambda: alone(house, 1, n=MAX_RUNNING + MAX_QUEUED - 7))
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    call.cancel()
    house.audit()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 0}, "is 0; must be at least 1 and at most 12"),
        ({"n": -1}, "is -1"),
        ({"n": MAX_RUNNING + MAX_QUEUED + 1}, "is 13; at most 12 can be queued and running at once"),
        ({"n": 2**31 - 1}, "(--max-running-requests, and --max-queued-requests or --max-queued-per-adapter)"),
        ({"n": 2}, "is 2, but temperature is 0: all answers would be the same"),
    ],
)
def test_a_bad_number_of_answers_is_refused(house: House, fields: dict[str, Any], words: str) -> None:
    refused = refusal(lambda: house.inference.Generate(generate(stopping=LONG, **PROMPT, **fields)))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert words in refused.violations["n"]


def test_priorities_and_salts_change_no_answer(house: House) -> None:
    plain = alone(house, 3)
    for fields in ({"priority": 100}, {"priority": -100}, {"cache_salt": "é" * 128}):
        assert same(alone(house, 3, **fields), plain)


def test_usage_says_how_much_of_the_prompt_was_computed_before_under_the_same_salt(house: House) -> None:
    prompt = {"token_ids": {"ids": list(range(5, 105))}}
    request = {**prompt, "stopping": {"max_tokens": 1}, "adapter_id": "two"}

    def cached(salt: str) -> int:
        return int(house.inference.Generate(generate(cache_salt=salt, **request)).usage.cached_prompt_tokens)

    assert [cached("a"), cached("a"), cached("b"), cached("b"), cached("")] == [0, 96, 0, 96, 0]


def test_several_answers_compute_their_prompt_once(house: House) -> None:
    prompt = {"token_ids": {"ids": list(range(105, 205))}}
    before = house.metric("weft_prefix_cache_hits_total") or 0
    assert alone(house, 1, n=4, **prompt).usage.cached_prompt_tokens == 0
    assert (house.metric("weft_prefix_cache_hits_total") or 0) - before == 3 * 96
    house.audit()
