"""What begins alike is computed once, and no token is other than it would have been."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from harness import Answer, Harness
from tiny import VOCAB, linear_names, make_adapter, make_model, save_tokenizer

from weft.adapters.records import AdapterChange
from weft.errors import GenerationFailed, InvalidRequest
from weft.server.engine.batch import Batch, build_batch
from weft.server.engine.request import Request, Sampling, Stopping
from weft.server.engine.scheduler import Scheduled
from weft.server.engine.sequence import Sequence
from weft.server.engine.text import OutputText

BLOCK = 4
INVOCATION = (11, 12)
CONTENTS = {
    "a": {"r": 8, "target_modules": linear_names("llama")},
    "b": {"r": 12, "target_modules": ["q_proj", "v_proj"]},
    "activated": {"r": 8, "target_modules": linear_names("llama"), "alora_invocation_tokens": list(INVOCATION)},
}
Mix = tuple[tuple[str, float], ...]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prefixes")
    model = make_model("llama", root / "base")
    save_tokenizer(root / "base")
    for seed, (name, config) in enumerate(CONTENTS.items()):
        make_adapter(model, root / "adapters" / name, seed, **config)
    return root


def start(folder: Path, **engine: object) -> Harness:
    adapters = {name: folder / "adapters" / name for name in CONTENTS}
    return Harness(folder / "base", adapters, **{"block_tokens": BLOCK, **engine})


@pytest.fixture
def harness(folder: Path) -> Harness:
    return start(folder)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Harness:
    """Without a prefix cache: what is right."""
    return start(folder, prefix_cache=False)


def tokens(count: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(20, VOCAB) for _ in range(count))


def ask(prompt: tuple[int, ...], mix: Mix = (), max_tokens: int = 8, **fields: object) -> Request:
    return Request("r", prompt, mix, stopping=Stopping(max_tokens=max_tokens, ignore_eos=True), **fields)


def cached(answer: Answer) -> int:
    assert answer.finish is not None
    return answer.finish.cached_prompt_tokens


def run(harness: Harness, *requests: Request) -> list[int]:
    """How many tokens of each prompt were cached, each asked after the end of the one before."""
    return [cached(harness.run([request])[0]) for request in requests]


def computed(harness: Harness) -> int:
    return int(harness.registry.get_sample_value("weft_computed_tokens_total", {"phase": "prefill"}) or 0)


@pytest.mark.parametrize(("length", "hit"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (40, 36), (41, 40)])
def test_all_full_blocks_but_the_last_token_are_found_again(harness: Harness, length: int, hit: int) -> None:
    first, second = (harness.run([ask(tokens(length))])[0] for _ in range(2))
    assert (cached(first), cached(second)) == (0, hit)
    assert first.ids == second.ids


def test_a_prompt_that_begins_alike_is_found_as_far_as_it_does(harness: Harness, plain: Harness) -> None:
    whole = tokens(30)
    request = ask(whole[:18] + tokens(12, 1))
    assert run(harness, ask(whole)) == [0]
    answer = harness.run([request])[0]
    assert cached(answer) == 16
    assert answer.ids == plain.run([request])[0].ids


def test_a_conversation_finds_its_earlier_turns_answers_included(harness: Harness, plain: Harness) -> None:
    prompt, expected = tokens(17), 0
    for turn in range(4):
        request = ask(prompt, (("a", 1.0),))
        answer = harness.run([request])[0]
        assert cached(answer) == expected
        assert answer.ids == plain.run([request])[0].ids
        computed_before = len(prompt) + len(answer.ids) - 1
        prompt += (*answer.ids, *tokens(5, turn))
        expected = computed_before // BLOCK * BLOCK


MIXES: list[Mix] = [
    (),
    (("a", 1.0),),
    (("a", 0.5),),
    (("b", 1.0),),
    (("a", 1.0), ("b", 1.0)),
    (("b", 1.0), ("a", 1.0)),
    (("a", 0.5), ("a", 0.5)),
]


def test_every_mix_of_adapters_has_prefixes_of_its_own(harness: Harness, plain: Harness) -> None:
    requests = [ask(tokens(21), mix) for mix in MIXES]
    assert run(harness, *requests) == [0] * len(MIXES)
    answers = harness.run(requests)
    assert [cached(answer) for answer in answers] == [20] * len(MIXES)
    assert [answer.ids for answer in answers] == [plain.run([request])[0].ids for request in requests]


def test_a_name_that_moves_to_new_content_finds_nothing_of_the_old(folder: Path, plain: Harness) -> None:
    harness = start(folder)
    prompt = tokens(21)
    expected = {name: plain.run([ask(prompt, ((name, 1.0),))])[0].ids for name in ("a", "b")}
    assert run(harness, ask(prompt, (("a", 1.0),)), ask(prompt, (("a", 1.0),))) == [0, 20]
    harness.store.update("a", AdapterChange(source=f"file:{folder / 'adapters' / 'b'}"))
    moved = harness.run([ask(prompt, (("a", 1.0),))])[0]
    assert (cached(moved), moved.ids) == (0, expected["b"])
    assert run(harness, ask(prompt, (("b", 1.0),))) == [20], "one content under two names"
    harness.store.update("a", AdapterChange(source=f"file:{folder / 'adapters' / 'a'}"))
    back = harness.run([ask(prompt, (("a", 1.0),))])[0]
    assert (cached(back), back.ids) == (20, expected["a"])


@pytest.mark.parametrize("at", [8, 9, 10, 11])
def test_an_activated_lora_shares_what_comes_before_its_invocation(folder: Path, plain: Harness, at: int) -> None:
    harness = start(folder)
    prompt = tokens(at) + INVOCATION + tokens(9, 1)
    active = ask(prompt, (("activated", 1.0),))
    expected = plain.run([active])[0].ids
    assert run(harness, ask(prompt)) == [0]
    answer = harness.run([active])[0]
    assert (cached(answer), answer.ids) == (8, expected), "the base's blocks before the invocation, no more"
    assert run(harness, active) == [(len(prompt) - 1) // BLOCK * BLOCK]
    elsewhere = ask(prompt[:at] + prompt[at + 2 :], (("activated", 1.0),))
    assert harness.run([elsewhere])[0].ids == plain.run([elsewhere])[0].ids


@pytest.mark.parametrize("after", [INVOCATION[1:], tokens(12, 1) + INVOCATION])
def test_where_an_activated_lora_begins_is_not_said_by_a_blocks_tokens_alone(
    folder: Path, plain: Harness, after: tuple[int, ...]
) -> None:
    """The last occurrence counts, and it may end, or be, in what follows."""
    harness, mix = start(folder), (("activated", 1.0),)
    before = tokens(4) + INVOCATION + (20, INVOCATION[0])
    once, twice = ask(before + tokens(14, 2), mix), ask(before + after + tokens(3, 3), mix)
    assert run(harness, once) == [0]
    answer = harness.run([twice])[0]
    assert cached(answer) == 4
    assert answer.ids == plain.run([twice])[0].ids


def test_prefixes_are_shared_only_between_equal_salts(harness: Harness) -> None:
    salts = ["", "x", "y", "x", "", "y"]
    assert run(harness, *(ask(tokens(21), cache_salt=salt) for salt in salts)) == [0, 0, 0, 20, 20, 20]


def test_nothing_is_skipped_whose_log_probabilities_are_wanted(harness: Harness) -> None:
    prompt = tokens(21)
    assert run(harness, ask(prompt)) == [0]
    assert run(harness, *(ask(prompt, prompt_logprobs_from=at) for at in (1, 12, 13, 20, 21))) == [0, 8, 12, 16, 20]


def test_many_that_come_at_once_and_begin_alike_compute_it_once(harness: Harness, plain: Harness) -> None:
    system = tokens(40)
    requests = [ask(system + tokens(3 + i, i), (("a", 1.0),) if i % 2 else ()) for i in range(12)]
    before = computed(harness)
    answers = harness.run(requests)
    assert sorted(map(cached, answers)) == [0, 0] + [40] * 10
    assert computed(harness) - before == sum(len(request.prompt) for request in requests) - 400
    assert [answer.ids for answer in answers] == [plain.run([request])[0].ids for request in requests]


def test_those_that_wait_for_one_that_is_cancelled_go_on(folder: Path) -> None:
    harness = start(folder, max_batch_tokens=16)
    request, *others = [ask(tokens(41)) for _ in range(4)]
    harness.submit(request)
    answers = [harness.submit(other) for other in others]
    harness.step()
    harness.engine.cancel(request)
    harness.finish()
    assert [cached(answer) for answer in answers] == [16, 40, 40], "its first chunk was there already"


def test_who_begins_like_a_long_prompt_waits_for_no_more_than_what_both_need(folder: Path, plain: Harness) -> None:
    harness = start(folder, max_batch_tokens=16)
    system = tokens(20)
    long, short = ask(system + tokens(180, 1)), ask(system + tokens(3, 2), max_tokens=1, caller="another")
    first, second = harness.submit(long), harness.submit(short)
    for _ in range(4):
        harness.step()
    assert (cached(second), second.ids) == (20, plain.run([short])[0].ids)
    assert not first.ids
    harness.finish()
    assert first.ids == plain.run([long])[0].ids


def test_a_chunk_that_gives_no_finite_logits_ends_its_request_at_once(folder: Path) -> None:
    harness = start(folder, max_batch_tokens=16)
    ref = harness.store.acquire("a")
    ((first, last),) = ref.version.paged.runs
    harness.store.release(ref)
    for site in harness.store._pool.sites.values():
        site.b[first:last].fill_(float("nan"))
    spoilt = harness.submit(ask(tokens(100), (("a", 1.0),)))
    harness.step()
    assert isinstance(spoilt.error, GenerationFailed)
    assert harness.engine._scheduler.pool.num_published == 0


@pytest.mark.parametrize("reported_from", [None, 1, 17, 33])
def test_rows_that_check_chunks_stand_in_for_no_others(
    folder: Path, plain: Harness, monkeypatch: pytest.MonkeyPatch, reported_from: int | None
) -> None:
    """One row more for a chunk that fills a block, none where a report has it; what is told stays the same."""
    harness = start(folder, max_batch_tokens=16)
    batches: list[Batch] = []
    forward = harness.engine._model.forward
    monkeypatch.setattr(harness.engine._model, "forward", lambda batch: batches.append(batch) or forward(batch))
    request = ask(tokens(42), (("a", 1.0),), prompt_logprobs_from=reported_from, logprobs=True)
    answer, expected = harness.run([request])[0], plain.run([request])[0]
    chunks = [[batch.logit_rows.tolist()[checked.row] for checked in batch.checked_rows] for batch in batches[:3]]
    assert chunks == [[15], [15], []]
    rows = {None: [1, 1, 1], 1: [16, 16, 10], 17: [1, 16, 10], 33: [1, 1, 10]}[reported_from]
    assert [len(batch.logit_rows) for batch in batches[:3]] == rows
    assert answer.ids == expected.ids
    for told, right in ((answer.tokens, expected.tokens), (answer.prompt, expected.prompt)):
        assert [token.id for token in told] == [token.id for token in right]
        assert [token.logprob for token in told] == pytest.approx([token.logprob for token in right], abs=1e-4)


def test_no_row_is_looked_at_for_a_chunk_that_fills_no_block_or_without_the_cache(folder: Path) -> None:
    for enabled, size, count in ((True, 3, 0), (True, 4, 1), (False, 4, 0)):
        harness = start(folder, prefix_cache=enabled)
        sequence = Sequence(ask(tokens(9)), (), OutputText(lambda ids: ""), random.Random(0), 0.0)
        sequence.blocks = [1, 2, 3]
        batch = build_batch([Scheduled(sequence, size)], BLOCK, harness.engine._model.device, check_chunks=enabled)
        assert len(batch.checked_rows) == len(batch.logit_rows) == count


@pytest.mark.parametrize("kv_tokens", [96, 160])
def test_tokens_are_the_same_under_eviction_and_preemption(folder: Path, plain: Harness, kv_tokens: int) -> None:
    tight = start(folder, kv_tokens=kv_tokens, max_running_requests=6)
    rng = random.Random(5)
    requests = []
    for i in range(40):
        mix = rng.choice(MIXES)
        shared = tokens(rng.randrange(0, 30), rng.randrange(2))
        sampling = Sampling(temperature=1.0, seed=i) if i % 3 == 0 else Sampling()
        prompt = shared + tokens(rng.randrange(1, 9), i)
        requests.append(ask(prompt, mix, rng.randrange(1, 30), sampling=sampling, priority=i % 3))
    answers = tight.run(requests, [i // 2 for i in range(40)])
    assert [answer.ids for answer in answers] == [plain.run([request])[0].ids for request in requests]
    assert tight.engine._scheduler.num_preemptions > 0
    assert sum(map(cached, answers)) > 0
    pool = tight.engine._scheduler.pool
    assert pool.num_free == pool.capacity


def test_a_preempted_request_finds_what_it_had_computed(folder: Path) -> None:
    requests = [ask(tokens(20, i), (), 30) for i in range(3)]
    counts = {}
    for enabled in (False, True):
        tight = start(folder, kv_tokens=112, prefix_cache=enabled)
        tight.run(requests)
        assert tight.engine._scheduler.num_preemptions > 0
        counts[enabled] = computed(tight)
    assert counts[True] < counts[False]


def test_what_gave_no_finite_logits_is_never_found(folder: Path, plain: Harness) -> None:
    harness = start(folder)
    prompt, mix = tokens(21), (("a", 1.0),)
    ref = harness.store.acquire("a")
    ((first, last),) = ref.version.paged.runs
    harness.store.release(ref)
    kept = {name: site.b[first:last].clone() for name, site in harness.store._pool.sites.items()}
    for site in harness.store._pool.sites.values():
        site.b[first:last].fill_(float("nan"))
    assert isinstance(harness.run([ask(prompt, mix)])[0].error, GenerationFailed)
    assert harness.engine._scheduler.pool.num_published == 0
    for name, site in harness.store._pool.sites.items():
        site.b[first:last].copy_(kept[name])
    answer = harness.run([ask(prompt, mix)])[0]
    assert (cached(answer), answer.ids) == (0, plain.run([ask(prompt, mix)])[0].ids)


def test_a_request_that_is_cancelled_wipes_nothing_that_others_use(harness: Harness) -> None:
    prompt = tokens(30)
    expected = harness.run([ask(prompt, (), 20)])[0].ids
    doomed, other = ask(prompt, (), 20), ask(prompt, (), 20)
    harness.submit(doomed)
    answer = harness.submit(other)
    for _ in range(3):
        harness.step()
    harness.engine.cancel(doomed)
    harness.finish()
    assert (cached(answer), answer.ids) == (28, expected)


def test_without_it_nothing_is_found_or_counted(plain: Harness) -> None:
    assert run(plain, ask(tokens(21)), ask(tokens(21))) == [0, 0]
    assert plain.registry.get_sample_value("weft_prefix_cache_queries_total") == 0


def test_metrics_count_tokens_looked_up_and_found(harness: Harness) -> None:
    run(harness, ask(tokens(21)), ask(tokens(21)), ask(tokens(9)))
    value = harness.registry.get_sample_value
    for name, labels in (("weft_prefix_cache", {}), ("vllm:prefix_cache", {"model_name": ""})):
        assert value(f"{name}_queries_total", labels) == 21 + 21 + 9
        assert value(f"{name}_hits_total", labels) == 20 + 8


def test_a_prompt_that_the_cache_can_never_hold_is_refused_with_the_numbers(folder: Path) -> None:
    harness = start(folder, kv_tokens=48)
    with pytest.raises(InvalidRequest, match="has 48 tokens; at most 47 fit in the KV cache: see --kv-tokens"):
        harness.engine.check(ask(tokens(48)))
    answer = harness.run([ask(tokens(47), (), 5)])[0]
    assert len(answer.ids) == 1
