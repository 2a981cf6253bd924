"""How likely a prompt was: the same as transformers says, however the prompt is cut up."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from harness import Answer, Harness
from tiny import VOCAB, linear_names, make_adapter, make_model, peft_logits, save_tokenizer
from transformers import PreTrainedModel

from weft.errors import GenerationFailed, InvalidRequest
from weft.server.engine.reports import report
from weft.server.engine.request import FinishReason, Request, Sampling, Stopping

SCORED = Stopping(max_tokens=0)


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return make_model("llama", folder / "base")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prompts")
    save_tokenizer(root / "base")
    model = make_model("llama", root / "base")
    make_adapter(model, root / "adapters" / "one", 1, r=12, target_modules=linear_names("llama"))
    return root


def start(folder: Path, **engine: object) -> Harness:
    return Harness(folder / "base", {"one": folder / "adapters" / "one"}, **engine)


@pytest.fixture
def harness(folder: Path) -> Harness:
    return start(folder)


def ask(length: int, first: int | None = 1, adapter: str = "", seed: int = 0, **request: object) -> Request:
    rng = random.Random(seed)
    prompt = tuple(rng.randrange(3, VOCAB) for _ in range(length))
    settings = {"stopping": Stopping(max_tokens=4, ignore_eos=True), **request}
    return Request(f"r{seed}", prompt, ((adapter, 1.0),) if adapter else (), prompt_logprobs_from=first, **settings)


def expected(model: PreTrainedModel, folder: Path, request: Request) -> torch.Tensor:
    """Log-probabilities [len(prompt) - 1, vocab] of what follows each token of the prompt."""
    adapter = folder / "adapters" / "one" if request.adapters else None
    return peft_logits(model, adapter, [request.prompt])[0][:-1].log_softmax(-1)


def check(answer: Answer, request: Request, logprobs: torch.Tensor) -> None:
    first = request.prompt_logprobs_from
    assert first is not None
    assert [token.id for token in answer.prompt] == list(request.prompt[first:])
    for at, token in enumerate(answer.prompt, first - 1):
        assert token.logprob == pytest.approx(float(logprobs[at, token.id]), abs=1e-4)
        assert token.rank is not None
        others = logprobs[at, torch.arange(VOCAB) != token.id]
        assert int((others > token.logprob + 1e-4).sum()) < token.rank <= int((others > token.logprob - 1e-4).sum()) + 1
        best = logprobs[at].topk(request.top_logprobs).values.tolist()
        assert [top.logprob for top in token.top] == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("adapter", ["", "one"])
@pytest.mark.parametrize("first", [1, 2, 30, 39])
def test_prompts_are_reported_as_transformers_has_them(
    model: PreTrainedModel, folder: Path, harness: Harness, adapter: str, first: int
) -> None:
    request = ask(40, first, adapter, top_logprobs=3)
    (answer,) = harness.run([request])
    check(answer, request, expected(model, folder, request))
    assert answer.ids == harness.run([ask(40, None, adapter)])[0].ids


@pytest.mark.parametrize("settings", [{"max_batch_tokens": 4}, {"max_batch_tokens": 7, "block_tokens": 4}])
def test_prompts_in_chunks_and_beside_others_are_reported_the_same(
    model: PreTrainedModel, folder: Path, settings: dict[str, int]
) -> None:
    requests = [ask(5 + 9 * i, 1 + 3 * i, "one" if i % 2 else "", i) for i in range(4)]
    others = [ask(11, None, seed=9)]
    answers = start(folder, max_running_requests=4, **settings).run([*requests, *others], [0, 1, 2, 3, 1])
    for request, answer in zip(requests, answers, strict=False):
        check(answer, request, expected(model, folder, request))
    assert answers[-1].prompt == []


def test_a_preempted_prompt_is_reported_once(model: PreTrainedModel, folder: Path) -> None:
    requests = [ask(20 + i, 2, seed=i, stopping=Stopping(max_tokens=40, ignore_eos=True)) for i in range(4)]
    tight = start(folder, kv_tokens=120, block_tokens=4, max_batch_tokens=16)
    for request, answer in zip(requests, tight.run(requests), strict=True):
        check(answer, request, expected(model, folder, request))
    assert tight.engine._scheduler.num_preemptions > 0


def test_a_score_computes_the_prompt_and_generates_nothing(
    model: PreTrainedModel, folder: Path, harness: Harness
) -> None:
    requests = [ask(9 + i, 1 + i, stopping=SCORED, seed=i, sampling=Sampling(temperature=i)) for i in range(3)]
    for request, answer in zip(requests, harness.run([*requests, ask(30, None)]), strict=False):
        check(answer, request, expected(model, folder, request))
        assert (answer.ids, answer.text) == ([], "")
        assert answer.finish is not None
        assert answer.finish.reason is FinishReason.MAX_TOKENS
        assert (answer.finish.prompt_tokens, answer.finish.completion_tokens) == (len(request.prompt), 0)
    assert harness.engine._scheduler.pool.num_free == harness.engine._scheduler.pool.capacity


def test_a_score_may_fill_the_context_and_an_answer_may_not(harness: Harness) -> None:
    length = harness.engine.limits.context_length
    assert len(harness.run([ask(length, 1, stopping=SCORED)])[0].prompt) == length - 1
    with pytest.raises(InvalidRequest, match=f"at most {length - 1} fit"):
        harness.engine.check(ask(length))
    with pytest.raises(InvalidRequest, match=f"at most {length} fit"):
        harness.engine.check(ask(length + 1, stopping=SCORED))


def test_what_has_no_tokens_to_report_reports_none(harness: Harness) -> None:
    for request in (ask(1), ask(5, 5), ask(5, 5, stopping=SCORED), ask(1, stopping=SCORED)):
        (answer,) = harness.run([request])
        assert answer.prompt == []
        assert len(answer.ids) == request.stopping.max_tokens


def test_a_time_limit_gives_the_part_that_was_computed(folder: Path) -> None:
    harness = start(folder, max_batch_tokens=8, max_running_requests=8)
    now_s = 0.0
    harness.engine.clock = lambda: now_s
    answer = harness.submit(ask(40, 3, stopping=Stopping(time_limit_s=1.0)))
    harness.step()
    harness.step()
    now_s = 2.0
    harness.step()
    assert [token.id for token in answer.prompt] == list(ask(40).prompt[3:17])


def test_a_step_reports_on_no_more_tokens_than_it_may(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = start(folder)
    harness.engine._scheduler._max_reported = 5
    rows: list[int] = []
    forward = harness.engine._model.forward
    monkeypatch.setattr(
        harness.engine._model, "forward", lambda batch: rows.append(len(batch.logit_rows)) or forward(batch)
    )
    requests = [ask(12 + i, 1 + i, seed=i) for i in range(3)]
    expected = [start(folder).run([request])[0] for request in requests]
    answers = harness.run(requests)
    assert max(rows) <= 5 + len(requests)
    for answer, alone in zip(answers, expected, strict=True):
        assert [token.id for token in answer.prompt] == [token.id for token in alone.prompt]
        assert [token.logprob for token in answer.prompt] == pytest.approx(
            [token.logprob for token in alone.prompt], abs=1e-4
        )
        assert answer.ids == alone.ids


def test_a_prompt_whose_logits_are_not_finite_fails_alone(harness: Harness) -> None:
    (fine,) = harness.run([ask(9, seed=1)])
    ref = harness.store.acquire("one")
    harness.store.release(ref)
    (first, last), *_ = ref.version.paged.runs
    next(iter(harness.store._pool.sites.values())).b[first:last].fill_(float("nan"))
    spoilt, good = harness.run([ask(70, 1, "one", stopping=SCORED), ask(9, seed=1)])
    assert isinstance(spoilt.error, GenerationFailed)
    assert good.ids == fine.ids


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_reports_say_which_rows_are_not_finite(value: float) -> None:
    logits = torch.zeros(3, 8)
    logits[1, 2] = value
    good, bad, low = report(torch.cat([logits, torch.full((1, 8), float("-inf"))])[[0, 1, 3]], [1, 1, 1], 2)
    assert good.logprob == pytest.approx(-2.0794415)
    assert bad.logprob != bad.logprob
    assert low.logprob != low.logprob


def test_reports_of_many_rows_are_made_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    whole = report(logits, list(range(9)), 3)
    monkeypatch.setattr("weft.server.engine.reports._NUMBERS_AT_ONCE", 100)
    assert report(logits, list(range(9)), 3) == whole
