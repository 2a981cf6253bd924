"""A unary answer is its stream joined, whatever was asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from house import House, generate, stream
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.v1 import inference_pb2 as pb2

MESSAGES = [{"role": "user", "content": "hé"}]
LETTERS = "aeé€"

prompts = st.one_of(
    st.fixed_dictionaries({"text": st.sampled_from(["hello", "é€😀", "<eos>"])}),
    st.fixed_dictionaries({"token_ids": st.just({"ids": [5, 6, 7]})}),
    st.fixed_dictionaries({"chat": st.just({"messages": MESSAGES})}),
)
adapters = st.one_of(
    st.just({}),
    st.just({"adapter_id": "one"}),
    st.just({"adapters": [{"adapter_id": "one", "weight": 0.5}, {"adapter_id": "two"}]}),
)
samplings = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.7, 2.0]), "seed": st.integers(0, 2**64 - 1)},
    optional={
        "top_k": st.integers(0, 300),
        "top_p": st.sampled_from([0.3, 1.0]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "typical_p": st.sampled_from([0.5, 1.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.5]),
        "presence_penalty": st.sampled_from([-1.0, 1.0]),
        "frequency_penalty": st.sampled_from([-1.0, 1.0]),
        # Bytes of characters, so that text is held back, and stop sequences are found.
        "logit_bias": st.just(dict.fromkeys(range(3, 259, 7), 3.0)),
    },
)
stoppings = st.fixed_dictionaries(
    {"max_tokens": st.integers(5, 14)},
    optional={
        "min_tokens": st.integers(0, 5),
        "stop_sequences": st.lists(st.text(LETTERS, min_size=1, max_size=2), max_size=3),
        "stop_token_ids": st.lists(st.integers(0, 259), max_size=8),
        "include_stop_sequence": st.booleans(),
        "ignore_eos": st.booleans(),
    },
)
outputs = st.fixed_dictionaries(
    {"prompt": st.sampled_from([{}, {"include_prompt": True}, {"include_prompt": True, "prompt_logprobs": True}])},
    optional={"top_logprobs": st.integers(0, 3), "logprobs": st.booleans()},
)
constraints = st.sampled_from(
    [{}, {}, {"choice": {"options": ["aé", "b€"]}}, {"regex": "[ab€]{3,9}"}, {"json_schema": '{"type": "integer"}'}]
)
requests = st.fixed_dictionaries(
    {"prompt": prompts, "adapters": adapters, "stopping": stoppings, "output": outputs, "constraint": constraints},
    optional={"sampling": samplings, "priority": st.integers(-100, 100), "n": st.integers(1, 4)},
)


def fields_of(drawn: dict[str, Any]) -> dict[str, Any]:
    fields = {**drawn.pop("prompt"), **drawn.pop("adapters"), **drawn, "request_id": "twin"}
    constraint = fields.pop("constraint")
    if constraint:
        fields["stopping"].pop("ignore_eos", None)
        fields["stopping"].pop("stop_token_ids", None)
    fields.update(constraint)
    fields["output"] = {**fields["output"].pop("prompt"), **fields["output"]}
    if "sampling" not in fields:
        fields.pop("n", None)
    return fields


def comparable(tokens: Iterable[pb2.Token]) -> list[tuple[object, ...]]:
    """Log-probabilities may differ in the last digits: what is cached already changes the shapes of a step."""
    return [
        (
            token.id,
            token.text,
            pytest.approx(token.logprob, abs=1e-4) if token.HasField("logprob") else None,
            token.HasField("rank"),
            len(token.top),
        )
        for token in tokens
    ]


def as_answers(response: pb2.GenerateResponse) -> list[tuple[object, ...]]:
    return [
        (answer.text, comparable(answer.tokens), answer.finish_reason, answer.stop_sequence)
        for answer in (response, *response.alternatives)
    ]


def joined(messages: list[pb2.StreamGenerateResponse], index: int) -> tuple[object, ...]:
    own = [message for message in messages if message.index == index]
    *before, last = own
    assert not any(message.finish_reason or message.stop_sequence for message in before)
    tokens = comparable(token for message in own for token in message.tokens)
    return "".join(message.text for message in own), tokens, last.finish_reason, last.stop_sequence


@settings(max_examples=60, deadline=None)
@given(drawn=requests)
def test_a_unary_answer_is_its_stream_joined(house: House, drawn: dict[str, Any]) -> None:
    fields = fields_of(drawn)
    whole = house.inference.Generate(generate(**fields))
    messages = list(house.inference.StreamGenerate(stream(**fields)))
    answers = as_answers(whole)
    assert answers == [joined(messages, index) for index in range(len(answers))]
    assert whole.adapters == messages[0].adapters
    assert {message.request_id for message in messages} == {whole.request_id}
    usage = messages[-1].usage
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (usage.prompt_tokens, usage.completion_tokens)
