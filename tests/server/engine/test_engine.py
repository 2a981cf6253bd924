"""The engine on a tiny real model: same tokens however they are scheduled, one exit for every end."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import Harness
from tiny import VOCAB, linear_names, make_adapter, make_model, save_tokenizer

from weft.adapters.residency import AdapterRef
from weft.errors import DeadlineExceeded, GenerationFailed, InvalidRequest
from weft.server.engine.batch import Batch
from weft.server.engine.request import FinishReason, Request, Sampling, Stopping

SPOILT = VOCAB - 1
"""A token that no prompt of `ask` holds."""

ADAPTERS = {"small": 4, "odd": 12, "large": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engine")
    model = make_model("llama", root / "base")
    save_tokenizer(root / "base")
    for seed, (name, rank) in enumerate(ADAPTERS.items()):
        make_adapter(model, root / "adapters" / name, seed, r=rank, target_modules=linear_names("llama"))
    return root


def start(folder: Path, **engine: object) -> Harness:
    return Harness(folder / "base", {name: folder / "adapters" / name for name in ADAPTERS}, **engine)


@pytest.fixture
def harness(folder: Path) -> Harness:
    return start(folder)


def ask(
    length: int, adapter: str | None = None, seed: int = 0, sampling: Sampling | None = None, **how: object
) -> Request:
    rng = random.Random(seed)
    deadline_s = how.pop("deadline_s", None)
    stopping = Stopping(**{"max_tokens": 20, "ignore_eos": True, **how})
    prompt = tuple(rng.randrange(3, SPOILT) for _ in range(length))
    adapters = ((adapter, 1.0),) if adapter else ()
    return Request(f"r{seed}", prompt, adapters, sampling or Sampling(), stopping, deadline_s=deadline_s)


def mixed(count: int = 12, **how: object) -> list[Request]:
    names = [None, *ADAPTERS]
    return [ask(1 + 7 * i % 40, names[i % 4], seed=i, **how) for i in range(count)]


def ids(harness: Harness, requests: list[Request], arrivals: list[int] | None = None) -> list[list[int]]:
    return [answer.ids for answer in harness.run(requests, arrivals)]


def test_greedy_tokens_are_the_same_alone_mixed_and_in_chunks_of_any_size(folder: Path, harness: Harness) -> None:
    requests = mixed()
    alone = [ids(harness, [request])[0] for request in requests]
    assert ids(harness, requests, [i % 5 for i in range(12)]) == alone
    for budget in (4, 5, 17):
        small = start(folder, max_batch_tokens=budget, max_running_requests=4, block_tokens=budget)
        assert ids(small, requests) == alone


def test_greedy_tokens_are_the_same_across_preemptions(folder: Path, harness: Harness) -> None:
    requests = mixed(8, max_tokens=40)
    expected = ids(harness, requests)
    tight = start(folder, kv_tokens=120, block_tokens=4)
    assert ids(tight, requests) == expected
    assert tight.engine._scheduler.num_preemptions > 0


def test_sampled_tokens_are_the_same_alone_mixed_and_preempted(folder: Path, harness: Harness) -> None:
    requests = [
        ask(9 + i, [None, *ADAPTERS][i % 4], i, Sampling(temperature=1.0, top_p=0.95, seed=i), max_tokens=40)
        for i in range(8)
    ]
    alone = [ids(harness, [request])[0] for request in requests]
    assert ids(harness, requests) == alone
    tight = start(folder, kv_tokens=120, block_tokens=4)
    assert ids(tight, requests) == alone
    assert tight.engine._scheduler.num_preemptions > 0


def test_base_rows_are_bit_identical_with_and_without_adapters_beside_them(harness: Harness) -> None:
    lengths = [9, 1, 17, 5]
    beside = [ask(n, name, i) for i, (n, name) in enumerate(zip(lengths, [None, "odd", None, "large"], strict=True))]
    plain = [ask(n, None, i) for i, n in enumerate(lengths)]
    for chunk in (64, 3, 1):
        with_adapters, without = harness.logits(beside, chunk), harness.logits(plain, chunk)
        assert torch.equal(with_adapters[0], without[0])
        assert torch.equal(with_adapters[2], without[2])
        assert not torch.equal(with_adapters[1], without[1])


def test_a_mix_of_adapters_is_their_weighted_sum(harness: Harness) -> None:
    one = ask(9, "odd")
    halves = Request("halves", one.prompt, (("odd", 0.75), ("odd", 0.25)), stopping=one.stopping)
    none = Request("none", one.prompt, (("odd", 1.0), ("odd", -1.0)), stopping=one.stopping)
    whole, split, base, cancelled = harness.logits([one, halves, ask(9), none], 64)
    assert torch.allclose(whole, split, atol=1e-4)
    assert torch.allclose(base, cancelled, atol=1e-4)


@pytest.mark.parametrize(
    ("how", "reason", "count"),
    [
        ({"max_tokens": 5}, FinishReason.MAX_TOKENS, 5),
        ({"max_tokens": 1}, FinishReason.MAX_TOKENS, 1),
        ({"max_tokens": 10_000}, FinishReason.CONTEXT_LENGTH, 256 - 9),
    ],
)
def test_an_answer_ends_where_it_should(
    harness: Harness, how: dict[str, int], reason: FinishReason, count: int
) -> None:
    answer = harness.run([ask(9, **how)])[0]
    assert answer.finish is not None
    assert (answer.finish.reason, len(answer.ids)) == (reason, count)
    assert (answer.finish.prompt_tokens, answer.finish.completion_tokens) == (9, count)


def test_stop_tokens_end_the_answer_and_have_no_text(harness: Harness) -> None:
    tokens = ids(harness, [ask(9, max_tokens=30)])[0]
    stop = tokens[7]
    answer = harness.run([ask(9, max_tokens=30, stop_token_ids=frozenset([stop]))])[0]
    assert answer.ids == tokens[: tokens.index(stop) + 1]
    assert answer.finish is not None
    assert answer.finish.reason is FinishReason.STOP_TOKEN
    assert answer.tokens[-1].text == ""
    longer = harness.run([ask(9, max_tokens=30, min_tokens=9, stop_token_ids=frozenset([stop]))])[0]
    assert len(longer.ids) > 9 or stop not in longer.ids[:9]


def test_the_eos_of_the_model_ends_the_answer_unless_ignored(harness: Harness) -> None:
    bias = Sampling(logit_bias={2: 1000.0})
    answer = harness.run([ask(9, sampling=bias, ignore_eos=False)])[0]
    assert (answer.ids, answer.text) == ([2], "")
    assert len(harness.run([ask(9, sampling=bias, max_tokens=3)])[0].ids) == 3


def test_stop_sequences_cut_the_text(harness: Harness) -> None:
    whole = harness.run([ask(9, max_tokens=60)])[0].text
    stop = whole[10:13]
    cut = harness.run([ask(9, max_tokens=60, stop_sequences=(stop,))])[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish is not None
    assert (cut.finish.reason, cut.finish.stop_sequence) == (FinishReason.STOP_SEQUENCE, stop)
    kept = harness.run([ask(9, max_tokens=60, stop_sequences=(stop,), include_stop_sequence=True)])[0]
    assert kept.text == whole[: whole.index(stop) + len(stop)]


def test_stop_sequences_wait_for_min_tokens(harness: Harness) -> None:
    plain = harness.run([ask(9, max_tokens=60)])[0]
    stop = plain.tokens[2].text
    early = harness.run([ask(9, max_tokens=60, stop_sequences=(stop,))])[0]
    late = harness.run([ask(9, max_tokens=60, stop_sequences=(stop,), min_tokens=10)])[0]
    assert len(early.ids) <= 3
    assert len(late.ids) >= 10


class Clock:
    """Seconds that pass when the test says so."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def held_back(harness: Harness) -> Request:
    """Whose first token is no whole character, so that its text comes at the end of the answer only."""
    requests = (ask(9, seed=seed, max_tokens=1) for seed in range(100))
    return next(request for request in requests if harness.run([request])[0].text == "\ufffd")


def test_a_stop_sequence_that_the_end_completes_is_the_reason(folder: Path) -> None:
    harness, clock = start(folder), Clock()
    harness.engine.clock = clock
    request = held_back(harness)
    for how, is_late in (({}, False), ({"max_tokens": 9, "time_limit_s": 2.0}, True)):
        stopping = replace(request.stopping, stop_sequences=("\ufffd",), **how)
        answer = harness.submit(replace(request, stopping=stopping))
        harness.step()
        clock.now_s += 3.0
        if is_late:
            harness.step()
        assert answer.finish is not None
        assert (answer.text, len(answer.ids)) == ("", 1)
        assert (answer.finish.reason, answer.finish.stop_sequence) == (FinishReason.STOP_SEQUENCE, "\ufffd")


def test_what_comes_at_the_end_stops_nothing_before_min_tokens(folder: Path) -> None:
    harness, clock = start(folder), Clock()
    harness.engine.clock = clock
    request = held_back(harness)
    stopping = Stopping(max_tokens=9, min_tokens=2, stop_sequences=("\ufffd",), time_limit_s=2.0)
    answer = harness.submit(replace(request, stopping=stopping))
    harness.step()
    clock.now_s += 3.0
    harness.step()
    assert answer.finish is not None
    assert (answer.text, answer.finish.reason, answer.finish.stop_sequence) == ("\ufffd", FinishReason.TIME_LIMIT, "")


def test_deadlines_end_running_and_queued_requests_with_an_error(folder: Path) -> None:
    harness, clock = start(folder, max_running_requests=1), Clock()
    harness.engine.clock = clock
    running, queued, patient = (harness.submit(ask(9, "odd", i, deadline_s=d)) for i, d in enumerate((5.0, 5.0, None)))
    harness.step()
    assert len(running.ids) == 1
    clock.now_s = 6.0
    harness.step()
    assert isinstance(running.error, DeadlineExceeded)
    assert isinstance(queued.error, DeadlineExceeded)
    while harness.engine.has_work:
        harness.step()
    assert patient.finish is not None
    assert harness.store.get("odd").num_in_flight == 0


def test_a_time_limit_ends_with_what_there_is(folder: Path) -> None:
    harness, clock = start(folder, max_running_requests=1), Clock()
    harness.engine.clock = clock
    running, queued = (harness.submit(ask(9, "odd", i, time_limit_s=2.0)) for i in range(2))
    harness.step()
    clock.now_s = 3.0
    harness.step()
    for answer, count in ((running, 1), (queued, 0)):
        assert answer.finish is not None
        assert (answer.finish.reason, len(answer.ids)) == (FinishReason.TIME_LIMIT, count)
    harness.store.check()
    assert harness.store.get("odd").num_in_flight == 0


def test_a_request_that_came_before_it_was_submitted_has_waited_since(folder: Path) -> None:
    harness, clock = start(folder), Clock()
    harness.engine.clock = clock
    clock.now_s = 3.0
    late = harness.submit(replace(ask(9, "odd", time_limit_s=2.0), arrived_s=1.0))
    in_time = harness.submit(replace(ask(9, "odd", max_tokens=1, time_limit_s=2.5), arrived_s=1.0))
    harness.finish()
    assert late.finish is not None
    assert (late.finish.reason, late.ids) == (FinishReason.TIME_LIMIT, [])
    assert in_time.finish is not None
    assert (in_time.finish.reason, in_time.finish.queue_s) == (FinishReason.MAX_TOKENS, 2.0)


def test_a_cancel_storm_leaves_nothing_behind_and_disturbs_nobody(folder: Path) -> None:
    harness, rng = start(folder, kv_tokens=400, block_tokens=4), random.Random(3)
    survivors = mixed(6, max_tokens=30)
    expected = ids(harness, survivors)
    doomed = [ask(rng.randint(1, 40), rng.choice([None, *ADAPTERS]), 100 + i) for i in range(60)]
    answers = [harness.submit(request) for request in survivors]
    for request in doomed:
        harness.submit(request)
        harness.step()
        if rng.random() < 0.8:
            harness.engine.cancel(rng.choice(doomed[: doomed.index(request) + 1]))
            harness.engine.check_pools()
    for request in doomed:
        harness.engine.cancel(request)
    while harness.engine.has_work:
        harness.step()
    assert [answer.ids for answer in answers] == expected
    assert all(info.num_in_flight == 0 for info in harness.store.list())
    assert harness.engine._scheduler.pool.num_free == harness.engine._scheduler.pool.capacity
    harness.store.check()


def test_an_adapter_deleted_in_flight_serves_its_request_to_the_end(harness: Harness) -> None:
    expected = ids(harness, [ask(9, "odd")])[0]
    answer = harness.submit(ask(9, "odd"))
    harness.step()
    harness.store.delete("odd")
    while harness.engine.has_work:
        harness.step()
    assert answer.ids == expected
    harness.store.check()
    assert harness.store.num_pages[0] == 1 + 4


@pytest.mark.parametrize("error", [RuntimeError("out of something"), MemoryError(), torch.OutOfMemoryError("of it")])
def test_a_failing_step_ends_its_requests_and_the_next_ones_run(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(batch: object) -> torch.Tensor:
        raise error

    expected = ids(harness, [ask(9, "odd")])[0]
    with monkeypatch.context() as patch:
        patch.setattr(harness.engine._model, "forward", fail)
        doomed = harness.run([ask(9, "odd"), ask(3)])
    assert all(isinstance(answer.error, GenerationFailed) for answer in doomed)
    assert harness.store.get("odd").num_in_flight == 0
    assert ids(harness, [ask(9, "odd")])[0] == expected


def test_a_step_that_one_request_breaks_goes_on_for_the_others(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    requests = mixed(6)
    expected = ids(harness, requests)
    forward = harness.engine._model.forward

    def fail_on_the_spoilt(batch: Batch) -> torch.Tensor:
        if SPOILT in batch.input_ids:
            raise RuntimeError("this one can't be run")
        return forward(batch)

    monkeypatch.setattr(harness.engine._model, "forward", fail_on_the_spoilt)
    spoilt = Request("spoilt", (SPOILT, SPOILT), (("odd", 1.0),))
    *others, guilty = harness.run([*requests, spoilt], [0, 0, 1, 1, 2, 2, 2])
    assert [answer.ids for answer in others] == expected
    assert isinstance(guilty.error, GenerationFailed)
    (line,) = [vars(record) for record in caplog.records if record.levelname == "ERROR"]
    assert line["request_id"] == "spoilt"
    assert line["adapters"] == (f"odd@{harness.store.get('odd').digest}",)


def test_logits_that_are_not_finite_end_their_own_request_only(harness: Harness) -> None:
    expected = ids(harness, [ask(9, "small", 1), ask(9, None, 2)])
    (name, site), *_ = harness.store._pool.sites.items()
    (first, last), *_ = ref_runs(harness, "odd")
    site.b[first:last].fill_(float("nan"))
    spoilt, good, base = harness.run([ask(30, "odd", 0), ask(9, "small", 1), ask(9, None, 2)])
    assert isinstance(spoilt.error, GenerationFailed)
    assert "odd" in str(spoilt.error)
    assert [good.ids, base.ids] == expected
    assert ids(harness, [ask(9, "small", 1), ask(9, None, 2)]) == expected, f"{name} left NaN in a block"


def test_what_a_preempted_request_computed_reaches_nobody_else(folder: Path) -> None:
    harness = start(folder, kv_tokens=80, max_batch_tokens=4, max_running_requests=4, block_tokens=4)
    base = [ask(9, None, i, max_tokens=30) for i in range(3)]
    expected = ids(harness, base)
    for site in harness.store._pool.sites.values():
        (first, last), *_ = ref_runs(harness, "odd")
        site.b[first:last].fill_(float("nan"))
    *innocent, _ = harness.run([*base, ask(60, "odd", 9, max_tokens=5)], [0, 0, 6, 1])
    assert [answer.ids for answer in innocent] == expected
    assert harness.engine._scheduler.num_preemptions > 0


def ref_runs(harness: Harness, name: str) -> tuple[tuple[int, int], ...]:
    ref: AdapterRef = harness.store.acquire(name)
    harness.store.release(ref)
    return ref.version.paged.runs


@pytest.mark.parametrize(
    ("prompt", "words"),
    [((), "is empty"), ((1,) * 256, "has 256 tokens; at most 255 fit"), ((1, VOCAB), "token id 260")],
)
def test_prompts_that_cannot_run_are_refused_with_the_numbers(
    harness: Harness, prompt: tuple[int, ...], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        harness.engine.check(Request("r", prompt))


def test_metrics_count_what_happened(harness: Harness) -> None:
    harness.run(mixed(8, max_tokens=5))
    value = harness.registry.get_sample_value
    assert value("weft_generation_tokens_total", {"adapter": "odd"}) == 10
    assert value("vllm:num_requests_running", {"model_name": ""}) == 0
