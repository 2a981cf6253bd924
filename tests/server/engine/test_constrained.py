"""The engine with constraints: row by row, whatever shares the batch and however it is scheduled."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Harness
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import linear_names, make_adapter, make_model, save_tokenizer

from weft.errors import InvalidRequest
from weft.server.engine.constraints import (
    MAX_DEBT_S,
    TOKEN_S,
    Compiler,
    Constraint,
    Kind,
    Spec,
    allowed_tokens,
    make_vocabulary,
)
from weft.server.engine.request import FinishReason, Request, Sampling, Stopping

EOS = 2
PROMPT = (5, 90, 33, 7)
HOT = Sampling(temperature=3.0, seed=11)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "maximum": 200, "minimum": 0},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("constrained")
    model = make_model("llama", root / "base")
    save_tokenizer(root / "base")
    make_adapter(model, root / "adapters" / "one", r=8, target_modules=linear_names("llama"))
    return root


def start(folder: Path, **engine: object) -> Harness:
    return Harness(folder / "base", {"one": folder / "adapters" / "one"}, **engine)


@pytest.fixture(scope="module")
def harness(folder: Path) -> Harness:
    return start(folder)


def compiled(harness: Harness, kind: Kind, *texts: str) -> Constraint:
    return harness.compiler.compile(Spec(kind, texts))


def ask(constraint: Constraint | None, sampling: Sampling | None = None, **how: Any) -> Request:
    stopping = Stopping(**{"max_tokens": 30, **how.pop("stopping", {})})
    return Request("r", how.pop("prompt", PROMPT), (), sampling or Sampling(), stopping, constraint=constraint, **how)


def kinds(harness: Harness) -> dict[str, Constraint | None]:
    return {
        "free": None,
        "json": compiled(harness, Kind.JSON_SCHEMA, json.dumps(PERSON)),
        "regex": compiled(harness, Kind.REGEX, "[a-f]{4,40}!"),
        "grammar": compiled(harness, Kind.GRAMMAR, 'start: "(" start ")" | /[0-9]{1,3}/'),
        "choice": compiled(harness, Kind.CHOICE, "yes", "no", "it depends"),
    }


def test_answers_keep_to_their_constraints_and_end_when_they_are_complete(harness: Harness) -> None:
    requests = {
        (name, seed): ask(constraint, Sampling(temperature=1.5, seed=seed), stopping={"max_tokens": 200})
        for name, constraint in kinds(harness).items()
        for seed in range(3)
        if constraint is not None
    }
    answers = dict(zip(requests, harness.run(list(requests.values())), strict=True))
    for (name, _), answer in answers.items():
        assert answer.finish is not None
        if answer.finish.reason is FinishReason.MAX_TOKENS:
            continue
        assert answer.finish.reason is FinishReason.STOP_TOKEN
        match name:
            case "json":
                person = json.loads(answer.text)
                assert set(person) == {"name", "age"}
                assert 0 <= person["age"] <= 200
                assert len(person["name"]) <= 4
            case "regex":
                assert re.fullmatch("[a-f]{4,40}!", answer.text)
            case "grammar":
                assert re.fullmatch(r"\(*[0-9]{1,3}\)*", answer.text)
            case _:
                assert answer.text in {"yes", "no", "it depends"}
    assert sum(answer.finish.reason is FinishReason.STOP_TOKEN for answer in answers.values() if answer.finish) >= 9


@pytest.mark.parametrize(
    "sampling", [Sampling(), HOT, Sampling(temperature=2.0, top_k=5, top_p=0.9, min_p=0.01, seed=3)]
)
def test_tokens_are_the_same_alone_and_in_a_mixed_batch_and_the_others_do_not_notice(
    harness: Harness, sampling: Sampling
) -> None:
    free = [ask(None, sampling, prompt=(8, 9, length)) for length in range(10, 14)]
    undisturbed = [answer.ids for answer in harness.run([replace(request) for request in free])]
    constrained = [ask(constraint, sampling) for constraint in kinds(harness).values()]
    constrained += [replace(request, adapters=(("one", 1.0),)) for request in constrained]
    alone = [harness.run([replace(request)])[0].ids for request in constrained]
    together = [answer.ids for answer in harness.run([*free, *constrained])]
    assert together[: len(free)] == undisturbed
    assert together[len(free) :] == alone


def test_tokens_are_the_same_across_preemptions(folder: Path) -> None:
    ample, tight = start(folder), start(folder, kv_tokens=96)
    requests = [
        [ask(constraint, HOT, prompt=PROMPT * 4) for constraint in kinds(harness).values()]
        for harness in (ample, tight)
    ]
    expected, answers = (
        [answer.ids for answer in harness.run(asked)] for harness, asked in zip((ample, tight), requests, strict=True)
    )
    assert tight.engine._scheduler.num_preemptions > 0
    assert answers == expected


def test_greedy_takes_the_likeliest_token_of_those_allowed_and_reports_it_as_the_model_sees_it(
    harness: Harness,
) -> None:
    constraint = compiled(harness, Kind.REGEX, "[a-f]{12}")
    (answer,) = harness.run([ask(constraint, logprobs=True, top_logprobs=3)])
    assert len(answer.ids) == 12
    whole = ask(None, prompt=(*PROMPT, *answer.ids))
    (logits,) = harness.logits([whole], chunk=64)
    matcher = constraint.matcher()
    for at, token in enumerate(answer.tokens):
        row = logits[len(PROMPT) - 1 + at]
        allowed = allowed_tokens([matcher], len(row), row.device)[0]
        assert token.id == int(row.masked_fill(~allowed, float("-inf")).argmax())
        logprobs = row.log_softmax(-1)
        assert token.logprob == pytest.approx(float(logprobs[token.id]), abs=1e-4)
        assert token.rank == int((logprobs > logprobs[token.id]).sum()) + 1
        assert [top.id for top in token.top] == logprobs.topk(3).indices.tolist()
        matcher.accept(token.id)
    assert not all(token.rank == 1 for token in answer.tokens), "the constraint changed nothing"


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), bias=st.dictionaries(st.integers(3, 258), st.floats(-1000, 1000), max_size=20))
def test_any_draw_with_any_bias_gives_json(harness: Harness, seed: int, bias: dict[int, float]) -> None:
    constraint = compiled(harness, Kind.JSON_SCHEMA, json.dumps(PERSON))
    sampling = Sampling(temperature=50.0, seed=seed, logit_bias=bias, repetition_penalty=1.3)
    (answer,) = harness.run([ask(constraint, sampling, stopping={"max_tokens": 200})])
    assert answer.error is None
    assert answer.finish is not None
    if answer.finish.reason is FinishReason.STOP_TOKEN:
        assert set(json.loads(answer.text)) == {"name", "age"}


def test_the_end_is_a_token_only_where_more_could_follow(harness: Harness) -> None:
    bias = Sampling(logit_bias={EOS: 1000.0})
    fixed, open_ended = compiled(harness, Kind.REGEX, "ab"), compiled(harness, Kind.REGEX, "a+")
    exact, ended = harness.run([ask(fixed, bias), ask(open_ended, bias)])
    assert (exact.text, EOS in exact.ids) == ("ab", False)
    assert (ended.text, ended.ids[-1]) == ("a", EOS)
    for answer in (exact, ended):
        assert answer.finish is not None
        assert answer.finish.reason is FinishReason.STOP_TOKEN
        assert answer.finish.completion_tokens == len(answer.ids) == 2


def test_an_answer_that_is_complete_with_its_last_token_is_not_cut_off(harness: Harness) -> None:
    constraint = compiled(harness, Kind.REGEX, "abc")
    complete, cut = harness.run([ask(constraint, stopping={"max_tokens": count}) for count in (3, 2)])
    assert complete.finish is not None
    assert cut.finish is not None
    assert (complete.text, complete.finish.reason) == ("abc", FinishReason.STOP_TOKEN)
    assert (cut.text, cut.finish.reason) == ("ab", FinishReason.MAX_TOKENS)


def test_min_tokens_keeps_the_end_away_but_for_a_constraint_that_allows_nothing_else(harness: Harness) -> None:
    to_the_end = Sampling(logit_bias={EOS: 1000.0})
    longer, empty = compiled(harness, Kind.REGEX, "a*"), compiled(harness, Kind.REGEX, "")
    stopped = compiled(harness, Kind.REGEX, "ab")
    (letter,) = harness.tokenizer("a", add_special_tokens=False)["input_ids"]
    kept, left, other = harness.run(
        [
            ask(longer, to_the_end, stopping={"min_tokens": 5}),
            ask(empty, to_the_end, stopping={"min_tokens": 5}),
            ask(stopped, stopping={"min_tokens": 5, "stop_token_ids": frozenset({letter})}),
        ]
    )
    assert kept.text == "aaaaa"
    assert (left.text, left.ids) == ("", [EOS])
    assert other.ids == [letter]
    for answer in (kept, left, other):
        assert answer.finish is not None
        assert answer.finish.reason is FinishReason.STOP_TOKEN


def test_stop_sequences_still_end_an_answer(harness: Harness) -> None:
    constraint = compiled(harness, Kind.CHOICE, "one two three")
    (answer,) = harness.run([ask(constraint, stopping={"stop_sequences": (" two",)})])
    assert answer.finish is not None
    assert (answer.text, answer.finish.stop_sequence) == ("one", " two")


def test_a_constraint_that_leads_nowhere_ends_its_own_request_and_says_why(harness: Harness) -> None:
    dead_end = compiled(harness, Kind.GRAMMAR, 'start: "a" b\nb: b "x"')
    failed, fine = harness.run([ask(dead_end), ask(compiled(harness, Kind.CHOICE, "yes"))])
    assert isinstance(failed.error, InvalidRequest)
    assert str(failed.error) == "grammar: can't be followed any further: nothing can follow that would match"
    assert fine.text == "yes"


def test_a_constraint_that_takes_too_much_time_ends_its_own_request_and_says_why(harness: Harness) -> None:
    vocabulary = make_vocabulary(harness.tokenizer, harness.info.vocab_size, [EOS])
    slow = Compiler(vocabulary, clock=count(0.0, 2 * TOKEN_S).__next__)
    failed, fine = harness.run(
        [ask(slow.compile(Spec(Kind.REGEX, ("[a-f]{200}",)))), ask(compiled(harness, Kind.CHOICE, "yes"))]
    )
    assert isinstance(failed.error, InvalidRequest)
    assert str(failed.error).startswith("regex: can't be followed any further: its tokens take too much time")
    assert 0 < len(failed.ids) < MAX_DEBT_S / TOKEN_S
    assert fine.text == "yes"


def test_rows_are_masked_on_their_own(harness: Harness) -> None:
    first = compiled(harness, Kind.REGEX, "a").matcher()
    second = compiled(harness, Kind.REGEX, "[^a]").matcher()
    (letter,) = harness.tokenizer("a", add_special_tokens=False)["input_ids"]
    one, other = allowed_tokens([first, second], harness.info.vocab_size, torch.device("cpu"))
    assert one.nonzero()[:, 0].tolist() == [letter]
    assert not other[letter]
    assert int(other.sum()) > 100
