"""Generate, StreamGenerate, Tokenize and Detokenize over real gRPC: what goes right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from house import ENDLESS, House, generate, refusal, stream

from weft.v1 import inference_pb2 as pb2

PROMPT = {"token_ids": {"ids": [5, 6, 7]}}
LONG = {"max_tokens": 12, "ignore_eos": True}

REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"text": "hello", "stopping": LONG},
    "adapter": {"text": "hello", "adapter_id": "one", "stopping": LONG},
    "mix": {"text": "hi", "adapters": [{"adapter_id": "one"}, {"adapter_id": "two", "weight": -0.5}], "stopping": LONG},
    "sampled": {"text": "hello", "sampling": {"temperature": 1.5, "top_p": 0.9, "seed": 2**64 - 1}, "stopping": LONG},
    "logprobs": {**PROMPT, "output": {"top_logprobs": 3}, "stopping": LONG},
    "prompt": {"text": "é", "output": {"include_prompt": True}, "stopping": LONG},
    "chat": {"chat": {"messages": [{"role": "user", "content": "hi"}]}, "stopping": LONG},
    "stopped": {**PROMPT, "sampling": {"logit_bias": {68: 90.0}}, "stopping": {"stop_sequences": ["aaa"], **LONG}},
}


def answer(house: House, **fields: Any) -> pb2.GenerateResponse:
    response = house.inference.Generate(generate(**fields))
    assert isinstance(response, pb2.GenerateResponse)
    return response


def pieces(house: House, **fields: Any) -> list[pb2.StreamGenerateResponse]:
    return list(house.inference.StreamGenerate(stream(**fields)))


def ids(responses: Sequence[pb2.GenerateResponse | pb2.StreamGenerateResponse]) -> list[int]:
    return [token.id for response in responses for token in response.tokens]


@pytest.mark.parametrize("name", REQUESTS)
def test_a_unary_answer_is_its_stream_joined(house: House, name: str) -> None:
    fields = {"request_id": "r", **REQUESTS[name]}
    whole = answer(house, cache_salt=f"whole {name}", **fields)  # salts: neither finds what the other computed
    parts = pieces(house, cache_salt=f"in parts {name}", **fields)
    assert whole.text == "".join(part.text for part in parts)
    assert list(whole.tokens) == [token for part in parts for token in part.tokens]
    assert whole.adapters == parts[0].adapters
    assert (whole.finish_reason, whole.stop_sequence) == (parts[-1].finish_reason, parts[-1].stop_sequence)
    assert whole.usage == parts[-1].usage
    house.audit()


def test_a_stream_opens_with_the_adapters_and_closes_with_the_reckoning(house: House) -> None:
    first, *between, last = pieces(house, adapter_id="one", request_id="mine", stopping=LONG, **PROMPT)
    assert [(ref.adapter_id, ref.digest) for ref in first.adapters] == [("one", house.digest("one"))]
    for part in (first, *between):
        assert part.finish_reason == pb2.FINISH_REASON_UNSPECIFIED
        assert not part.HasField("usage")
        assert not part.HasField("timing")
    for part in (*between, last):
        assert not part.adapters
    assert {part.request_id for part in (first, *between, last)} == {"mine"}
    assert last.finish_reason == pb2.FINISH_REASON_MAX_TOKENS
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 12)
    assert last.timing.decode.ToNanoseconds() > 0
    assert len(ids([first, *between, last])) == 12


def test_a_request_without_an_id_gets_one_of_its_own(house: House) -> None:
    drawn = {answer(house, stopping={"max_tokens": 1}, **PROMPT).request_id for _ in range(3)}
    assert len(drawn) == 3
    assert "" not in drawn


def test_the_base_applies_no_adapter(house: House) -> None:
    assert not answer(house, stopping={"max_tokens": 1}, **PROMPT).adapters


def test_what_is_not_set_has_the_documented_default(house: House) -> None:
    explicit = pb2.Sampling(temperature=0, top_k=0, top_p=1, min_p=0, typical_p=1, repetition_penalty=1)
    plain = answer(house, stopping={"ignore_eos": True}, **PROMPT)
    spelled_out = answer(house, stopping={"ignore_eos": True, "max_tokens": 256}, sampling=explicit, **PROMPT)
    assert ids([plain]) == ids([spelled_out])
    assert plain.usage.completion_tokens == 256
    assert not any(token.HasField("logprob") or token.HasField("rank") or token.top for token in plain.tokens)


def test_a_seed_repeats_the_draws(house: House) -> None:
    sampling = {"temperature": 2.0, "seed": 7}
    first, again = (answer(house, sampling=sampling, stopping=LONG, **PROMPT) for _ in range(2))
    other = answer(house, sampling={**sampling, "seed": 8}, stopping=LONG, **PROMPT)
    assert ids([first]) == ids([again]) != ids([other])


@pytest.mark.parametrize(("output", "num_top"), [({"logprobs": True}, 0), ({"top_logprobs": 20}, 20)])
def test_logprobs_are_given_when_asked_for(house: House, output: dict[str, Any], num_top: int) -> None:
    for token in answer(house, output=output, stopping=LONG, **PROMPT).tokens:
        assert token.logprob <= 0
        assert token.rank == 1
        assert len(token.top) == num_top
        if num_top:
            assert (token.top[0].id, token.top[0].logprob) == (token.id, token.logprob)
            assert [top.logprob for top in token.top] == sorted((top.logprob for top in token.top), reverse=True)
            assert sum(math.exp(top.logprob) for top in token.top) <= 1.0001


def test_text_gets_the_tokenizers_special_tokens_and_ids_do_not(house: House) -> None:
    text = answer(house, text="hi", stopping=LONG)
    as_ids = answer(house, token_ids={"ids": house.tokenizer("hi")["input_ids"]}, stopping=LONG)
    assert text.usage.prompt_tokens == 3
    assert ids([text]) == ids([as_ids])


def test_a_stop_sequence_ends_the_text_before_it_or_after_it(house: House) -> None:
    (letter,) = house.tokenizer("a", add_special_tokens=False)["input_ids"]
    fields: dict[str, Any] = {**PROMPT, "sampling": {"logit_bias": {letter: 90.0}}}
    stopping = {"max_tokens": 12, "stop_sequences": ["zz", "aaaa"]}
    without = answer(house, stopping=stopping, **fields)
    assert (without.text, without.stop_sequence) == ("", "aaaa")
    assert without.finish_reason == pb2.FINISH_REASON_STOP_SEQUENCE
    assert ids([without]) == [letter] * 4
    with_it = answer(house, stopping={**stopping, "include_stop_sequence": True}, **fields)
    assert (with_it.text, with_it.stop_sequence) == ("aaaa", "aaaa")


def test_stop_tokens_end_the_answer_but_not_before_min_tokens(house: House) -> None:
    first, second, *_ = ids([answer(house, stopping=LONG, **PROMPT)])
    stopped = answer(house, stopping={**LONG, "stop_token_ids": [first]}, **PROMPT)
    assert stopped.finish_reason == pb2.FINISH_REASON_STOP_TOKEN
    assert ids([stopped]) == [first]
    assert stopped.text == ""
    later = answer(house, stopping={**LONG, "stop_token_ids": [first, second], "min_tokens": 5}, **PROMPT)
    assert later.usage.completion_tokens >= 5


def test_a_time_limit_ends_the_answer_with_what_there_is(house: House) -> None:
    stopping = {"max_tokens": ENDLESS, "ignore_eos": True, "time_limit": {"nanos": 300_000_000}}
    response = answer(house, stopping=stopping, **PROMPT)
    assert response.finish_reason == pb2.FINISH_REASON_TIME_LIMIT
    assert response.usage.completion_tokens == len(response.tokens) < ENDLESS
    house.audit()


@pytest.mark.parametrize("text", ["é€😀", "plain"])
def test_the_prompt_comes_before_the_answer_if_asked_for(house: House, text: str) -> None:
    alone = answer(house, text=text, stopping=LONG)
    parts = pieces(house, text=text, output={"include_prompt": True}, stopping=LONG)
    prompt = house.tokenizer(text)["input_ids"]
    assert "".join(part.text for part in parts) == text + alone.text
    assert ids(parts) == prompt + ids([alone])
    assert parts[0].text.startswith(text)
    assert "".join(token.text for token in parts[0].tokens[: len(prompt)]) == text


def test_a_stream_never_holds_half_a_character(house: House) -> None:
    euro = house.tokenizer("€", add_special_tokens=False)["input_ids"]
    assert len(euro) == 3
    sampling = {"temperature": 1.0, "seed": 3, "logit_bias": dict.fromkeys(euro, 90.0)}
    parts = pieces(house, sampling=sampling, stopping={"max_tokens": 200, "ignore_eos": True}, **PROMPT)
    made = ids(parts)
    text = "".join(part.text for part in parts)
    assert set(made) == set(euro)
    assert text == house.tokenizer.decode(made)
    assert "€" in text
    assert any(part.tokens and not part.text for part in parts), "nothing was ever held back"
    for part in parts:
        assert "€" not in part.text or euro[-1] in [token.id for token in part.tokens], (
            "a character came before its last byte"
        )


def test_chat_is_laid_out_by_the_models_template(house: House) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    for chat, laid_out in (
        ({"messages": messages}, "<user>hi</><assistant>yes</><assistant>"),
        ({"messages": messages, "add_generation_prompt": False}, "<user>hi</><assistant>yes</>"),
        ({"messages": messages, "continue_final_message": True}, "<user>hi</><assistant>yes"),
    ):
        expected = house.tokenizer(laid_out, add_special_tokens=False)["input_ids"]
        assert list(house.inference.Tokenize(pb2.TokenizeRequest(chat=chat)).token_ids) == expected
        by_chat = answer(house, chat=chat, stopping=LONG)
        assert ids([by_chat]) == ids([answer(house, token_ids={"ids": expected}, stopping=LONG)])


def test_tokenize_gives_what_generate_would_take(house: House) -> None:
    def tokens(**fields: Any) -> list[int]:
        return list(house.inference.Tokenize(pb2.TokenizeRequest(**fields)).token_ids)

    assert tokens(text="hé") == house.tokenizer("hé")["input_ids"]
    assert tokens(text="hé", add_special_tokens=False) == house.tokenizer("hé")["input_ids"][1:]
    assert tokens(text="") == [1]


def test_detokenize(house: House) -> None:
    def text(token_ids: Sequence[int], **fields: Any) -> str:
        return str(house.inference.Detokenize(pb2.DetokenizeRequest(token_ids=token_ids, **fields)).text)

    prompt = house.tokenizer("hé")["input_ids"]
    assert text(prompt) == "<bos>hé"
    assert text(prompt, skip_special_tokens=True) == "hé"
    assert text([]) == ""
    assert text([259]) == "", "in the model's vocabulary, but in no text"


def test_two_adapters_at_once_answer_as_each_does_alone(house: House) -> None:
    alone = {name: ids([answer(house, adapter_id=name, stopping=LONG, **PROMPT)]) for name in ("", "one", "two")}
    assert len({tuple(tokens) for tokens in alone.values()}) == 3
    endless = {"max_tokens": ENDLESS, "ignore_eos": True}
    beside = house.inference.StreamGenerate(stream(adapter_id="one", stopping=endless, **PROMPT))
    begun = [next(beside), next(beside)]
    for name, tokens in alone.items():
        assert ids([answer(house, adapter_id=name, stopping=LONG, **PROMPT)]) == tokens
    begun += [next(beside) for _ in range(10)]
    assert ids(begun)[: len(alone["one"])] == alone["one"]  # what piles up comes in one message
    assert (house.metric("weft_step_adapters_max") or 0) >= 2, "no step held both"
    beside.cancel()
    house.audit()


def test_many_at_once_on_threads_answer_as_each_does_alone(house: House) -> None:
    texts = [f"prompt {i} é" for i in range(12)]
    alone = [ids([answer(house, text=text, adapter_id="one", stopping=LONG)]) for text in texts]
    calls = [house.inference.Generate.future(generate(text=t, adapter_id="one", stopping=LONG)) for t in texts]
    assert [ids([call.result()]) for call in calls] == alone
    house.audit()


def test_a_mix_applies_its_adapters_in_the_requests_order(house: House) -> None:
    terms = [{"adapter_id": "two", "weight": 0.5}, {"adapter_id": "one"}]
    response = answer(house, adapters=terms, stopping=LONG, **PROMPT)
    assert [ref.adapter_id for ref in response.adapters] == ["two", "one"]
    alone = answer(house, adapters=[{"adapter_id": "one"}], stopping=LONG, **PROMPT)
    assert ids([alone]) == ids([answer(house, adapter_id="one", stopping=LONG, **PROMPT)]) != ids([response])


def test_an_adapter_that_is_named_twice_counts_with_the_sum_of_its_weights(house: House) -> None:
    terms = [{"adapter_id": "one", "weight": -1.5}, {"adapter_id": f"one@{house.digest('one')}", "weight": 2.5}]
    response = answer(house, adapters=terms, stopping=LONG, **PROMPT)
    assert ids([response]) == ids([answer(house, adapter_id="one", stopping=LONG, **PROMPT)])
    assert [ref.adapter_id for ref in response.adapters] == ["one", "one"]
    none = answer(house, adapters=[{"adapter_id": "one", "weight": w} for w in (1, -1)], stopping=LONG, **PROMPT)
    assert ids([none]) == ids([answer(house, stopping=LONG, **PROMPT)])
    house.audit()


def test_eight_adapters_are_mixed_and_a_ninth_is_refused(house: House) -> None:
    terms = [{"adapter_id": ("one", "two")[i % 2], "weight": (-1) ** i * 0.3} for i in range(8)]
    mixed = answer(house, adapters=terms, stopping=LONG, **PROMPT)
    two = [{"adapter_id": "one", "weight": 1.2}, {"adapter_id": "two", "weight": -1.2}]
    assert ids([mixed]) == ids([answer(house, adapters=two, stopping=LONG, **PROMPT)])
    refused = refusal(lambda: answer(house, adapters=[*terms, {"adapter_id": "one"}], stopping=LONG, **PROMPT))
    assert refused.violations == {"adapters": "has 9 entries; at most 8 are taken"}
    house.audit()


@pytest.mark.parametrize("key", ["x-gateway-model-name-rewrite", "x-llm-d-model-name-rewrite"])
@pytest.mark.parametrize("adapter_id", ["", "one"])
def test_the_adapter_may_come_as_metadata(house: House, key: str, adapter_id: str) -> None:
    request = generate(adapter_id=adapter_id, stopping=LONG, **PROMPT)
    response = house.inference.Generate(request, metadata=((key, "one"),))
    assert [ref.adapter_id for ref in response.adapters] == ["one"]


def test_a_pinned_version_goes_before_its_name(house: House) -> None:
    pinned, stale = f"one@{house.digest('one')}", "one@sha256:" + "0" * 64
    for field, said in ((pinned, "one"), ("one", pinned)):
        request = generate(adapter_id=field, stopping=LONG, **PROMPT)
        response = house.inference.Generate(request, metadata=(("x-gateway-model-name-rewrite", said),))
        assert [ref.digest for ref in response.adapters] == [house.digest("one")]
    request = generate(adapter_id="one", stopping=LONG, **PROMPT)
    metadata = (("x-gateway-model-name-rewrite", stale),)
    assert refusal(lambda: house.inference.Generate(request, metadata=metadata)).code is grpc.StatusCode.NOT_FOUND


def test_a_digest_pins_the_version(house: House) -> None:
    pinned = f"one@{house.digest('one')}"
    response = answer(house, adapter_id=pinned, stopping=LONG, **PROMPT)
    assert ids([response]) == ids([answer(house, adapter_id="one", stopping=LONG, **PROMPT)])
    assert [(ref.adapter_id, ref.digest) for ref in response.adapters] == [("one", house.digest("one"))]
