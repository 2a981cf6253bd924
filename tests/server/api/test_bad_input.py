"""Requests that are meant to hurt: each is refused with its field's path, and the batch beside it doesn't notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from house import MAX_PROMPT_BYTES, House, Refusal, generate, refusal, stream

from weft.v1 import inference_pb2 as pb2

VOCAB = 260
PROMPT = {"token_ids": {"ids": [5, 6, 7]}}
BESIDE = {"max_tokens": 60, "ignore_eos": True}
NAN = float("nan")

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a mix and an adapter": ({**PROMPT, "adapter_id": "one", "adapters": [{"adapter_id": "two"}]}, "adapters"),
    "min above max": ({**PROMPT, "stopping": {"min_tokens": 9, "max_tokens": 8}}, "stopping.min_tokens"),
    "prompt log-probabilities of no prompt": (
        {**PROMPT, "output": {"prompt_logprobs": True}},
        "output.prompt_logprobs",
    ),
    "answers that are all the same": ({**PROMPT, "n": 2}, "n"),
    "too many answers": ({**PROMPT, "n": 2**31 - 1, "sampling": {"temperature": 1}}, "n"),
    "repetition": ({**PROMPT, "sampling": {"repetition_penalty": 1e-38}}, "sampling.repetition_penalty"),
    "repetition, huge": ({**PROMPT, "sampling": {"repetition_penalty": 1e38}}, "sampling.repetition_penalty"),
    "presence": ({**PROMPT, "sampling": {"presence_penalty": 2.01}}, "sampling.presence_penalty"),
    "frequency": ({**PROMPT, "sampling": {"frequency_penalty": NAN}}, "sampling.frequency_penalty"),
    "10,000 stop sequences": ({**PROMPT, "stopping": {"stop_sequences": ["x"] * 10_000}}, "stopping.stop_sequences"),
    "a token out of range": ({"token_ids": {"ids": [5, 2**32 - 1]}}, "token_ids.ids[1]"),
    "millions of tokens": ({"token_ids": {"ids": [5] * 2_000_000}}, "token_ids.ids"),
    "a million tokens out of range": ({"token_ids": {"ids": [VOCAB] * 1_000_000}}, "token_ids.ids"),
    "a role as long as a book": ({"chat": {"messages": [{"role": "r" * 1_000_000}]}}, "chat"),
    "a name as long as a book": ({"chat": {"messages": [{"role": "r", "name": "n" * 1_000_000}]}}, "chat"),
    "a text too long": ({"text": "é" * MAX_PROMPT_BYTES}, "text"),
    "priority": ({**PROMPT, "priority": 101}, "priority"),
    "priority, low": ({**PROMPT, "priority": -(2**31)}, "priority"),
    "a salt too long": ({**PROMPT, "cache_salt": "s" * 129}, "cache_salt"),
}


@pytest.fixture(scope="module")
def untouched(house: House) -> list[int]:
    response = house.inference.Generate(generate(adapter_id="one", stopping=BESIDE, **PROMPT))
    return [token.id for token in response.tokens]


def beside(house: House, untouched: list[int], work: Callable[[], Refusal]) -> Refusal:
    """What is refused while another request runs, whose tokens are what they are without."""
    call = house.inference.StreamGenerate(stream(adapter_id="one", stopping=BESIDE, **PROMPT))
    tokens = [token.id for token in next(call).tokens]
    refused = work()
    tokens += [token.id for message in call for token in message.tokens]
    assert tokens == untouched
    return refused


@pytest.mark.parametrize("name", BAD)
def test_it_is_named_and_the_batch_goes_on(house: House, untouched: list[int], name: str) -> None:
    fields, path = BAD[name]
    refused = beside(house, untouched, lambda: refusal(lambda: house.inference.Generate(generate(**fields))))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(refused.violations) == [path]


def test_text_that_is_not_utf_8_is_refused(house: House, untouched: list[int]) -> None:
    raw = pb2.GenerateRequest(text="hello", request_id="mine").SerializeToString().replace(b"hello", b"he\xff\xfeo")
    call = house.channel.unary_unary("/weft.v1.InferenceService/Generate")
    refused = beside(house, untouched, lambda: refusal(lambda: call(raw)))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "UTF-8" in refused.violations["request"]


@pytest.mark.parametrize(
    "fields", [{"token_ids": {"ids": [1]}}, {"token_ids": {"ids": [0, 1, 2, 2]}}, {"text": "<eos>"}]
)
def test_a_prompt_of_only_special_tokens_is_a_prompt(house: House, fields: dict[str, Any]) -> None:
    response = house.inference.Generate(generate(stopping={"max_tokens": 3, "ignore_eos": True}, **fields))
    assert response.usage.completion_tokens == 3


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_every_seed_is_a_seed(house: House, seed: int) -> None:
    request = generate(sampling={"temperature": 1.5, "seed": seed}, stopping={"max_tokens": 8}, **PROMPT)
    first, again = (house.inference.Generate(request) for _ in range(2))
    assert first.tokens == again.tokens


@pytest.mark.parametrize("penalty", [0.001, 1000])
def test_the_ends_of_the_penalties_give_answers(house: House, penalty: float) -> None:
    sampling = {"repetition_penalty": penalty, "presence_penalty": 2, "frequency_penalty": -2}
    for temperature in (0, 1):
        request = generate(sampling={**sampling, "temperature": temperature, "seed": 1}, stopping=BESIDE, **PROMPT)
        assert house.inference.Generate(request).usage.completion_tokens == BESIDE["max_tokens"]


def test_as_many_ids_as_a_context_has_are_text_and_one_more_is_refused(house: House) -> None:
    longest = [5] * 65536
    assert house.inference.Detokenize(pb2.DetokenizeRequest(token_ids=longest)).text
    refused = refusal(lambda: house.inference.Detokenize(pb2.DetokenizeRequest(token_ids=[*longest, 5])))
    assert refused.violations == {"token_ids": "has 65537 entries; at most 65536 are taken"}
