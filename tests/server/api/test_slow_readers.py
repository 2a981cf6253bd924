"""Clients that stop reading, behind HTTP/2's flow control: they hold up neither the engine nor anybody else."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from house import ENDLESS, House, Refusal, generate, refusal, stream

PROMPT = {"token_ids": {"ids": [5, 6, 7]}}
WORDY = {"top_logprobs": 20}
"""A token is half a kilobyte then, so that a stream's window is soon full."""

NUM_TOKENS = 2000
FOR_EVER = {"max_tokens": ENDLESS, "ignore_eos": True}


def test_a_reader_that_pauses_gets_the_same_in_fewer_messages_and_the_engine_does_not_wait(house: House) -> None:
    fields = {
        "adapter_id": "one",
        "stopping": {"max_tokens": NUM_TOKENS, "ignore_eos": True},
        "output": WORDY,
        **PROMPT,
    }
    with house.variant() as inference:
        call = inference.StreamGenerate(stream(**fields))
        first = next(call)
        house.audit()  # all is made, and next to nothing was read
        messages = [first, *call]
    tokens = [token for message in messages for token in message.tokens]
    assert len(tokens) == NUM_TOKENS
    assert len(messages) < NUM_TOKENS / 2
    whole = house.inference.Generate(generate(**fields))
    assert [token.id for token in tokens] == [token.id for token in whole.tokens]
    assert [token.logprob for token in tokens] == pytest.approx([token.logprob for token in whole.tokens], abs=1e-4)
    assert "".join(message.text for message in messages) == whole.text
    assert messages[-1].usage == whole.usage


def read_on(call: Any) -> tuple[int, Refusal]:
    """Tokens that come once it is read again, and how it ends."""
    num_tokens = 0

    def read() -> None:
        nonlocal num_tokens
        for message in call:
            num_tokens += len(message.tokens)

    refused = refusal(read)
    return num_tokens, refused


def test_a_reader_that_stops_for_good_is_ended_and_told_so_when_it_reads_again(house: House) -> None:
    with house.variant(stall_s=0.2) as inference:
        calls = [inference.StreamGenerate(stream(stopping=FOR_EVER, output=WORDY, **PROMPT)) for _ in range(3)]
        for call in calls:
            next(call)
        house.audit()
        for call in calls:
            num_tokens, refused = read_on(call)
            assert 0 < num_tokens < ENDLESS
            assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "READER_STALLED")
            assert refused.message == "nothing of the answer was taken for 0.2 s"


def test_a_reader_that_stops_before_a_large_first_message_is_ended_too(house: House) -> None:
    output = {"prompt_logprobs": True, "top_logprobs": 20, "include_prompt": True}
    request = stream(token_ids={"ids": [5] * 2000}, output=output, stopping=FOR_EVER)
    with house.variant(stall_s=0.2) as inference:
        call = inference.StreamGenerate(request)
        call.initial_metadata()
        house.audit()
        assert read_on(call)[1].reason == "READER_STALLED"


def test_a_reader_that_stops_and_then_goes_leaves_nothing(house: House) -> None:
    with house.variant(stall_s=0.2) as inference:
        call = inference.StreamGenerate(stream(stopping=FOR_EVER, output=WORDY, **PROMPT))
        next(call)
        house.audit()
        call.cancel()
        assert read_on(call)[1].code is grpc.StatusCode.CANCELLED
    house.audit()
