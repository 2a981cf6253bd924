"""Score, and the log-probabilities of prompts: against transformers and peft alone, and against Generate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
import pytest
import torch
from house import MAX_PROMPT_BYTES, MAX_QUEUED, MAX_RUNNING, House, generate, refusal, stream
from tiny import peft_logits
from transformers import AutoModelForCausalLM

from weft.v1 import inference_pb2 as pb2

PROMPT = "good morning"
CONTINUATIONS = ["!", ", é and more of it", " " * 30]
TOLERANCE = 1e-3


def score(house: House, **fields: Any) -> pb2.ScoreResponse:
    response = house.inference.Score(pb2.ScoreRequest(**fields))
    assert isinstance(response, pb2.ScoreResponse)
    return response


def logprobs(house: House, adapter: str, ids: Sequence[int]) -> torch.Tensor:
    """[len(ids) - 1, vocab]: of the token after each, by transformers and peft."""
    model = AutoModelForCausalLM.from_pretrained(house.root / "base", dtype=torch.float32)
    folder = house.root / "adapters" / adapter if adapter else None
    (logits,) = peft_logits(model, folder, [ids])
    return logits[:-1].log_softmax(-1)


def own(logprobs: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    return logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("adapter", ["", "one"])
def test_a_score_is_the_sum_of_what_each_token_had(house: House, adapter: str) -> None:
    response = score(house, adapter_id=adapter, text=PROMPT, continuations=CONTINUATIONS, request_id="mine")
    prompt = house.tokenizer(PROMPT)["input_ids"]
    for scored, continuation in zip(response.scores, CONTINUATIONS, strict=True):
        ids = house.tokenizer(PROMPT + continuation)["input_ids"]
        expected = own(logprobs(house, adapter, ids), ids)[len(prompt) - 1 :]
        assert scored.num_tokens == len(expected)
        assert scored.logprob == pytest.approx(float(expected.sum()), abs=TOLERANCE * len(expected))
    assert response.request_id == "mine"
    assert [ref.adapter_id for ref in response.adapters] == ([adapter] if adapter else [])
    assert response.usage.completion_tokens == 0
    assert response.usage.prompt_tokens == len(prompt) + sum(scored.num_tokens for scored in response.scores)
    house.audit()


def test_an_answer_scores_as_its_tokens_did(house: House) -> None:
    letters = dict.fromkeys(house.tokenizer("abcdefgh", add_special_tokens=False)["input_ids"], 60.0)
    fields: dict[str, Any] = {"sampling": {"logit_bias": letters}, "stopping": {"max_tokens": 6}}
    answer = house.inference.Generate(generate(text=PROMPT, output={"logprobs": True}, **fields))
    (scored,) = score(house, text=PROMPT, continuations=[answer.text]).scores
    assert scored.num_tokens == 6
    assert scored.logprob == pytest.approx(sum(token.logprob for token in answer.tokens), abs=TOLERANCE)
    assert not scored.is_greedy


def test_a_greedy_answer_scores_as_greedy(house: House) -> None:
    answers = {
        prompt: house.inference.Generate(generate(text=prompt, stopping={"max_tokens": 1})).text
        for prompt in "abcdefghijklmnopqrstuvwxyz"
    }
    prompt, likeliest = next(
        (prompt, text) for prompt, text in answers.items() if text.isascii() and text.isprintable()
    )
    other = "a" if likeliest != "a" else "b"
    scores = score(house, text=prompt, continuations=[likeliest, other, likeliest + other]).scores
    assert [scored.is_greedy for scored in scores[:2]] == [True, False]
    assert scores[0].logprob > scores[1].logprob
    assert scores[0].logprob > scores[2].logprob


def test_ids_and_chats_are_followed_by_the_continuation_by_itself(house: House) -> None:
    ids = house.tokenizer(PROMPT)["input_ids"]
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    laid_out = list(house.inference.Tokenize(pb2.TokenizeRequest(chat=chat)).token_ids)
    for fields, prompt in (({"token_ids": {"ids": ids}}, ids), ({"chat": chat}, laid_out)):
        (scored,) = score(house, continuations=["yes"], **fields).scores
        whole = prompt + house.tokenizer("yes", add_special_tokens=False)["input_ids"]
        assert scored.num_tokens == 3
        assert scored.logprob == pytest.approx(float(own(logprobs(house, "", whole), whole)[-3:].sum()), abs=TOLERANCE)


def test_as_many_continuations_as_fit_are_scored_together(house: House) -> None:
    texts = [f"{i:02}" for i in range(MAX_RUNNING + MAX_QUEUED)]
    together = score(house, text=PROMPT, continuations=texts, adapter_id="two").scores
    for at in (0, 5, len(texts) - 1):
        (alone,) = score(house, text=PROMPT, continuations=[texts[at]], adapter_id="two").scores
        assert together[at].logprob == pytest.approx(alone.logprob, abs=TOLERANCE)
    house.audit()


@pytest.mark.parametrize(
    ("fields", "path", "words"),
    [
        ({"continuations": []}, "continuations", "is empty; give at least one"),
        ({"continuations": ["a", ""]}, "continuations[1]", "is empty; give a text"),
        (
            {"continuations": ["a"] * (MAX_RUNNING + MAX_QUEUED + 1)},
            "continuations",
            "has 13 entries; at most 12 can be",
        ),
        ({"continuations": ["a" * MAX_PROMPT_BYTES, "b"]}, "continuations", "has 4097 bytes; at most 4096"),
        ({"text": "", "continuations": ["a"]}, "text", "is empty"),
        ({"token_ids": {"ids": [260]}}, "token_ids.ids[0]", "is 260"),
        ({"priority": 101}, "priority", "is 101"),
        ({"cache_salt": "s" * 129}, "cache_salt", "has 129 characters"),
        ({"adapter_id": "one", "adapters": [{"adapter_id": "two"}]}, "adapters", "choose one"),
        (
            {"token_ids": {"ids": [5] * 65535}, "continuations": ["abc"]},
            "continuations[0]",
            "with the prompt has 65538",
        ),
        (
            {"token_ids": {"ids": [5] * 65535}, "continuations": ["a", "abc"]},
            "continuations[1]",
            "tokens; at most 65536",
        ),
    ],
)
def test_what_is_wrong_is_named(house: House, fields: dict[str, Any], path: str, words: str) -> None:
    prompt = {} if "token_ids" in fields else {"text": "x"}
    refused = refusal(lambda: score(house, **{**prompt, "continuations": ["a"], **fields}))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert words in refused.violations[path]
    house.audit()


def test_an_adapter_that_is_not_there_is_not_found(house: House) -> None:
    refused = refusal(lambda: score(house, text="x", continuations=["a"], adapter_id="nobody"))
    assert refused.code is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("adapter", ["", "one"])
def test_a_prompt_is_given_with_its_log_probabilities(house: House, adapter: str) -> None:
    text = "é, a prompt that is longer than one chunk of sixty-four tokens is: this is one"
    output = {"include_prompt": True, "prompt_logprobs": True, "top_logprobs": 3}
    stopping = {"max_tokens": 2, "ignore_eos": True}
    answer = house.inference.Generate(generate(text=text, adapter_id=adapter, output=output, stopping=stopping))
    ids = house.tokenizer(text)["input_ids"]
    first, *others = answer.tokens[: len(ids)]
    assert [token.id for token in answer.tokens[: len(ids)]] == ids
    assert not first.HasField("logprob")
    assert not first.HasField("rank")
    assert not first.top
    expected = logprobs(house, adapter, ids)
    for token, all_logprobs in zip(others, expected, strict=True):
        assert token.logprob == pytest.approx(float(all_logprobs[token.id]), abs=TOLERANCE)
        assert token.rank == int((all_logprobs > all_logprobs[token.id]).sum()) + 1
        assert [top.logprob for top in token.top] == pytest.approx(all_logprobs.topk(3).values.tolist(), abs=TOLERANCE)
    assert "".join(token.text for token in (first, *others)) == text
    plain = house.inference.Generate(generate(text=text, adapter_id=adapter, stopping=stopping))
    assert [token.id for token in answer.tokens[len(ids) :]] == [token.id for token in plain.tokens]


def test_every_answer_begins_with_the_prompt_and_its_log_probabilities(house: House) -> None:
    request = stream(
        text=PROMPT,
        n=3,
        sampling={"temperature": 2.0, "seed": 4},
        stopping={"max_tokens": 5, "ignore_eos": True},
        output={"include_prompt": True, "prompt_logprobs": True},
    )
    messages = list(house.inference.StreamGenerate(request))
    num_prompt = len(house.tokenizer(PROMPT)["input_ids"])
    prompts = []
    for index in range(3):
        tokens = [token for message in messages if message.index == index for token in message.tokens]
        assert len(tokens) == num_prompt + 5
        assert not any(token.HasField("logprob") for token in tokens[num_prompt:])
        prompts.append(tokens[:num_prompt])
    assert prompts[0] == prompts[1] == prompts[2]
    assert all(token.HasField("logprob") for token in prompts[0][1:])


def test_a_prompt_of_one_token_has_none_to_report(house: House) -> None:
    output = {"include_prompt": True, "prompt_logprobs": True}
    answer = house.inference.Generate(generate(token_ids={"ids": [5]}, output=output, stopping={"max_tokens": 1}))
    assert len(answer.tokens) == 2
    assert not answer.tokens[0].HasField("logprob")
