"""Steps that are launched before the tokens they follow are known: the same answers, and nothing left behind."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import Answer, Harness
from tiny import VOCAB, linear_names, make_adapter, make_model, save_tokenizer

from weft.errors import DeadlineExceeded
from weft.server.engine.batch import Batch
from weft.server.engine.constraints import Kind, Spec
from weft.server.engine.decode_attention import attend_gathered
from weft.server.engine.graphs import Means, replay_nothing
from weft.server.engine.request import FinishReason, Request, Sampling, Stopping
from weft.server.engine.sampler import Draw
from weft.server.engine.scheduler import PATIENCE

ADAPTERS = {"small": 4, "odd": 12}
BLOCK = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ahead")
    model = make_model("llama", root / "base", num_hidden_layers=1)
    save_tokenizer(root / "base")
    for seed, (name, rank) in enumerate(ADAPTERS.items()):
        make_adapter(model, root / "adapters" / name, seed, r=rank, target_modules=linear_names("llama"))
    return root


def start(folder: Path, *, run_ahead: bool = True, **engine: object) -> Harness:
    adapters = {name: folder / "adapters" / name for name in ADAPTERS}
    settings = {"block_tokens": BLOCK, "adapter_probe": False, "speculative_tokens": 0, **engine}
    return Harness(folder / "base", adapters, run_ahead=run_ahead, **settings)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Harness:
    return start(folder, run_ahead=False, prefix_cache=False)


def ask(seed: int, adapter: str | None = None, sampling: Sampling | None = None, **stopping: object) -> Request:
    rng = random.Random(seed)
    prompt = tuple(rng.randrange(3, VOCAB) for _ in range(1 + seed % 11))
    how = Stopping(**{"max_tokens": 12, "ignore_eos": True, **stopping})
    return Request(f"r{seed}", prompt, ((adapter, 1.0),) if adapter else (), sampling or Sampling(seed=seed), how)


def told(answer: Answer) -> tuple[object, ...]:
    assert answer.finish is not None
    return answer.ids, answer.text, answer.finish.reason, answer.finish.stop_sequence, answer.finish.completion_tokens


def count_steps(harness: Harness, requests: list[Request]) -> tuple[int, int]:
    """Steps that it took, and how many of them were launched ahead."""
    launched = 0
    for request in requests:
        harness.submit(request)
    steps = 0
    while harness.engine.has_work:
        launched += harness.engine._ahead._next is not None
        harness.step()
        steps += 1
    return steps, launched


def test_all_steps_but_the_first_are_launched_ahead(folder: Path, plain: Harness) -> None:
    requests = [ask(seed, [None, *ADAPTERS][seed % 3], max_tokens=8 + seed) for seed in range(4)]
    assert count_steps(start(folder), requests) == (11, 10)
    assert count_steps(plain, requests) == (11, 0)


def test_the_next_step_is_launched_before_tokens_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness, order = start(folder), []
    forward, read = harness.engine._model.forward, Draw.read

    def launch(batch: Batch) -> torch.Tensor:
        order.append("launch")
        return forward(batch)

    def wait(draw: Draw) -> object:
        order.append("read")
        return read(draw)

    monkeypatch.setattr(harness.engine._model, "forward", launch)
    monkeypatch.setattr(Draw, "read", wait)
    harness.run([ask(1, max_tokens=4)])
    assert order == ["launch", "launch", "read", "launch", "read", "launch", "read", "read"]


def any_request(harness: Harness, rng: random.Random, index: int) -> Request:
    """With whatever a request can ask for that a step must know of the tokens before."""
    sampling = rng.choice(
        [
            Sampling(),
            Sampling(1.0, seed=index),
            Sampling(0.8, top_k=20, top_p=0.9, seed=index),
            Sampling(0.7, repetition_penalty=1.3, frequency_penalty=0.4, seed=index),
        ]
    )
    request = ask(index, rng.choice([None, *ADAPTERS]), sampling, max_tokens=rng.randint(1, 25))
    stopping = replace(
        request.stopping,
        stop_token_ids=frozenset(rng.sample(range(VOCAB), rng.choice([0, 20]))),
        stop_sequences=rng.choice([(), ("a", "e", "t"), ("0", "i", "n", "s")]),
        min_tokens=rng.choice([0, 0, 5]),
        ignore_eos=rng.random() < 0.5,
    )
    stopping = replace(stopping, max_tokens=max(stopping.max_tokens, stopping.min_tokens))
    shared = tuple(range(20, 20 + rng.choice([0, 9, 17])))
    constraint = harness.compiler.compile(Spec(Kind.REGEX, ("[a-z]{1,9}",))) if rng.random() < 0.2 else None
    return replace(
        request,
        prompt=shared + request.prompt,
        stopping=stopping,
        constraint=constraint,
        logprobs=rng.random() < 0.1,
        prompt_logprobs_from=1 if rng.random() < 0.1 else None,
    )


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("speculative_tokens", [0, 4])
def test_whatever_happens_the_answers_are_the_same(
    captured: bool, speculative_tokens: int, folder: Path, plain: Harness
) -> None:
    """Arrivals, ends of every kind, cancels, deadlines and preemptions; each answer is what it is alone."""
    harness = start(folder, kv_tokens=80, max_running_requests=5, speculative_tokens=speculative_tokens)
    if captured:
        harness.engine._model.capture(Means(replay_nothing, attend_gathered, None), 16, 40)
    now_s = 0.0
    harness.engine.clock = lambda: now_s
    rng = random.Random(captured + 2 * speculative_tokens)
    ends: set[object] = set()
    num_ahead = 0
    for _ in range(4):
        requests = [any_request(harness, rng, index) for index in range(14)]
        hurried = [
            replace(request, deadline_s=now_s + rng.randint(3, 30)) if rng.random() < 0.2 else request
            for request in requests
        ]
        answers: dict[int, Answer] = {}
        cancelled: set[int] = set()
        while harness.engine.has_work or len(answers) < len(requests):
            if len(answers) < len(requests) and rng.random() < 0.4:
                answers[len(answers)] = harness.submit(hurried[len(answers)])
                harness.wake()
            if answers and rng.random() < 0.05:
                index = rng.choice(list(answers))
                cancelled |= set() if answers[index].ended else {index}
                harness.engine.cancel(hurried[index])
            if harness.engine.has_work:
                harness.step()
            num_ahead += harness.engine._ahead._next is not None
            now_s += 1.0
        for index, request in enumerate(requests):
            (expected,) = plain.run([request])
            answer = answers[index]
            if index in cancelled or isinstance(answer.error, DeadlineExceeded):
                assert answer.ids == expected.ids[: len(answer.ids)]
            else:
                assert told(answer) == told(expected)
            ends.add(answer.finish.reason if answer.finish else type(answer.error))
    assert ends >= {FinishReason.MAX_TOKENS, FinishReason.STOP_TOKEN, FinishReason.STOP_SEQUENCE, DeadlineExceeded}
    assert harness.engine._scheduler.num_preemptions > 0
    assert num_ahead > 20


def test_what_is_computed_after_the_end_stays_in_no_block(folder: Path) -> None:
    """The token that ends an answer gives values that are not finite, in a block that another sequence gets next."""
    harness, request = start(folder), ask(5, max_tokens=6)
    (first,) = harness.run([request])
    end = next(token for token in reversed(first.ids) if token not in request.prompt)
    model = harness.engine._model
    with torch.no_grad():
        model.model.get_input_embeddings().weight[end] = float("nan")
    (ended,) = harness.run([ask(5, stop_token_ids=frozenset([end]))])
    assert ended.finish is not None
    assert ended.finish.reason is FinishReason.STOP_TOKEN
    assert model.cache is not None
    assert all(tensor.isfinite().all() for tensors in model.cache.layers.values() for tensor in tensors)


def test_a_request_that_comes_back_as_it_was_begins_anew(folder: Path, plain: Harness) -> None:
    harness, request, other = start(folder), ask(7), ask(8)
    harness.submit(other)
    harness.submit(request)
    for _ in range(3):
        harness.step()
    harness.engine.cancel(request)
    again = harness.submit(request)
    harness.finish()
    assert told(again) == told(plain.run([request])[0])


def test_who_comes_is_looked_at_in_the_step_after_the_one_under_way(folder: Path) -> None:
    harness = start(folder)
    harness.submit(ask(1, max_tokens=20))
    for _ in range(3):
        harness.step()
    late = harness.submit(ask(2))
    harness.step()
    assert not late.ids
    harness.step()
    assert len(late.ids) == 1


def test_who_waits_for_a_place_is_looked_at_every_few_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness, looks = start(folder, max_running_requests=1), []
    schedule = harness.engine._scheduler.schedule
    monkeypatch.setattr(harness.engine._scheduler, "schedule", lambda: looks.append(0) or schedule())
    harness.submit(ask(1, max_tokens=21))
    waits = harness.submit(ask(2, max_tokens=1))
    for _ in range(20):
        harness.step()
    assert len(looks) == 20 // (PATIENCE + 1)
    harness.step()
    harness.step()
    assert waits.finish is not None


def test_a_step_that_cannot_be_launched_ahead_is_run_in_its_turn(
    folder: Path, plain: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = start(folder)
    forward = harness.engine._model.forward

    def fail_ahead(batch: Batch) -> torch.Tensor:
        if batch.fed is not None:
            raise RuntimeError("not yet")
        return forward(batch)

    monkeypatch.setattr(harness.engine._model, "forward", fail_ahead)
    requests = [ask(seed, [None, *ADAPTERS][seed % 3]) for seed in range(3)]
    expected = [told(answer) for answer in plain.run(requests)]
    assert [told(answer) for answer in harness.run(requests)] == expected
