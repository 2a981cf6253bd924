"""The same engine on a GPU: what it computes on a CPU, it computes there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from encoders import LINEAR, make_encoder
from features import make_all
from harness import Harness
from tiny import linear_names, make_adapter, make_classifier, make_model, save_tokenizer

from weft.server.engine.drawing import draw, truncate
from weft.server.engine.request import Pooling, Request, Sampling, Stopping

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "phi3"])
def test_mixed_batches_give_the_tokens_of_the_cpu(kind: str, tmp_path: Path) -> None:
    base, adapters, greedy = make_mixed(kind, tmp_path)
    requests = [
        replace(request, sampling=Sampling(temperature=float(i % 2), seed=i), stopping=Stopping(32, ignore_eos=True))
        for i, request in enumerate(greedy)
    ]
    on_cpu, on_gpu = (Harness(base, adapters, device=device) for device in ("cpu", "cuda"))
    arrivals = [i % 4 for i in range(len(requests))]
    expected = [answer.ids for answer in on_cpu.run(requests, arrivals)]
    assert [answer.ids for answer in on_gpu.run(requests, arrivals)] == expected


@pytest.mark.parametrize("name", ["llama", "tied llama", "gpt2", "mixtral"])
def test_everything_an_adapter_can_hold_gives_the_logits_of_the_cpu(name: str, tmp_path: Path) -> None:
    _, adapters = make_all(name, tmp_path)
    served = {f"a{i}": path for i, path in enumerate(adapters.values())}
    requests = [Request(each, tuple(range(3, 30)), ((each, 1.0),)) for each in served]
    on_cpu, on_gpu = (
        Harness(tmp_path / "base", served, device=device, adapter_pages=256).logits(requests, 9)
        for device in ("cpu", "cuda")
    )
    for mine, theirs in zip(on_gpu, on_cpu, strict=True):
        assert ((mine.cpu() - theirs).norm() / theirs.norm()).item() < 1e-3


def test_vectors_and_classifications_are_those_of_the_cpu(tmp_path: Path) -> None:
    base, adapters, generations = make_mixed("llama", tmp_path)
    adapters["mood"] = make_classifier(base, tmp_path / "mood", ("bad", "good"), target_modules=linear_names("llama"))
    none = Stopping(max_tokens=0)
    pooled = [
        Request(f"p{i}", tuple(range(3 + i, 40)), (("mood", 1.0),), stopping=none, pooling=pooling, through_head=head)
        for i, (pooling, head) in enumerate(
            [(Pooling.LAST, True), (Pooling.LAST, False), (Pooling.MEAN, False), (Pooling.LAST, True)]
        )
    ]
    on_cpu, on_gpu = (Harness(base, adapters, device=device) for device in ("cpu", "cuda"))
    for mine, theirs in zip(on_gpu.run([*pooled, *generations]), on_cpu.run(pooled), strict=False):
        assert mine.vector is not None
        assert theirs.vector is not None
        assert torch.allclose(mine.vector, theirs.vector, atol=1e-3)


def test_rows_are_drawn_as_on_the_cpu() -> None:
    rows = torch.randn(6, 5000, generator=torch.Generator().manual_seed(0)) * 3
    params = [
        Sampling(1.0),
        Sampling(0.7, top_k=40),
        Sampling(2.0, top_p=0.9),
        Sampling(1.0, min_p=0.05),
        Sampling(1.5, typical_p=0.8),
        Sampling(1.3, top_k=100, top_p=0.95, min_p=0.01, typical_p=0.9),
    ]
    on_cpu, on_gpu = (truncate(each, each.amax(-1), params).cpu().double() for each in (rows, rows.cuda()))
    assert torch.allclose(on_gpu / on_gpu.sum(-1, keepdim=True), on_cpu / on_cpu.sum(-1, keepdim=True), atol=1e-5)
    uniforms = [(i + 0.5) / 6 for i in range(6)]
    drawn = [draw(each, each.amax(-1), params, uniforms).tolist() for each in (rows, rows.cuda())]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text"])
def test_captured_steps_give_the_tokens_of_steps_run_as_they_come(kind: str, tmp_path: Path) -> None:
    base, adapters, requests = make_mixed(kind, tmp_path)
    options = {"device": "cuda", "speculative_tokens": 0}
    arrivals = [i % 4 for i in range(len(requests))]
    captured, plain = (Harness(base, adapters, cuda_graphs=use, **options) for use in (True, False))
    expected = [answer.ids for answer in plain.run(requests, arrivals)]
    assert [answer.ids for answer in captured.run(requests, arrivals)] == expected
    assert captured.engine._model._graphs is not None
    assert not captured.engine._model._graphs._is_off


def test_steps_launched_ahead_give_the_tokens_of_steps_launched_in_turn(tmp_path: Path) -> None:
    base, adapters, greedy = make_mixed("llama", tmp_path)
    requests = [replace(each, sampling=Sampling(float(i % 2), top_k=30, seed=i)) for i, each in enumerate(greedy)]
    arrivals = [i % 4 for i in range(len(requests))]
    in_turn, ahead = (Harness(base, adapters, device="cuda", run_ahead=each) for each in (False, True))
    expected = [answer.ids for answer in in_turn.run(requests, arrivals)]
    assert [answer.ids for answer in ahead.run(requests, arrivals)] == expected


def test_a_decode_step_waits_for_nothing_but_its_tokens(tmp_path: Path) -> None:
    base, adapters, greedy = make_mixed("llama", tmp_path)
    requests = [
        replace(each, sampling=Sampling(float(i % 2), top_k=30, top_p=0.9, seed=i)) for i, each in enumerate(greedy)
    ]
    harness = Harness(base, adapters, device="cuda", speculative_tokens=0)
    answers = [harness.submit(request) for request in requests]
    while not all(answer.ids for answer in answers):
        harness.step()
    harness.step()
    torch.cuda.set_sync_debug_mode("error")  # an event that is waited for is none
    try:
        for _ in range(10):
            harness.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(len(answer.ids) > 10 for answer in answers)


def test_compiled_parts_give_the_tokens_of_their_classes(tmp_path: Path) -> None:
    base, adapters, requests = make_mixed("llama", tmp_path)
    plain, compiled = (Harness(base, adapters, device="cuda", compile=each) for each in (False, True))
    assert compiled.engine._model.fusion is not None
    assert compiled.engine._model.fusion.fused
    expected = [answer.ids for answer in plain.run(requests)]
    assert [answer.ids for answer in compiled.run(requests)] == expected


def test_no_step_takes_memory_from_the_device_after_the_first_ones(tmp_path: Path) -> None:
    base, adapters, requests = make_mixed("llama", tmp_path)
    harness = Harness(base, adapters, device="cuda", speculative_tokens=0)
    harness.run(requests)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["segment.all.allocated"]
    harness.run([replace(request, request_id=f"{request.request_id} again") for request in requests])
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["segment.all.allocated"] == before


def make_mixed(kind: str, folder: Path) -> tuple[Path, dict[str, Path], list[Request]]:
    """A model, adapters of unlike ranks, and greedy requests for each and for the base."""
    model = make_model(kind, folder / "base")
    save_tokenizer(folder / "base")
    adapters = {
        f"r{rank}": make_adapter(model, folder / f"r{rank}", rank, r=rank, target_modules=linear_names(kind))
        for rank in (1, 8, 12, 64)
    }
    requests = [
        Request(
            f"r{i}",
            tuple(range(3 + i, 20 + 3 * i)),
            ((name, 1.0),) if name else (),
            Sampling(seed=i),
            Stopping(max_tokens=24 + i, ignore_eos=True),
        )
        for i, name in enumerate([None, *adapters, None, *adapters])
    ]
    return folder / "base", adapters, requests


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
def test_classifiers_on_an_encoder_give_the_logits_of_the_cpu(kind: str, tmp_path: Path) -> None:
    make_encoder(kind, tmp_path / "base", num_labels=4)
    adapters = {f"a{labels}": tmp_path / f"a{labels}" for labels in (2, 5)}
    for labels, folder in zip((2, 5), adapters.values(), strict=True):
        make_classifier(tmp_path / "base", folder, "abcde"[:labels], labels, target_modules=LINEAR[kind])
    on_cpu, on_gpu = (Harness(tmp_path / "base", adapters, device=each, kv_tokens=None) for each in ("cpu", "cuda"))
    settings = {"stopping": Stopping(0), "pooling": on_cpu.engine.limits.abilities.class_pooling, "through_head": True}
    requests = [
        Request(name, tuple(range(3, 4 + 9 * i)), ((name, 1.0),) if name else (), **settings)
        for i, name in enumerate([*adapters, ""] * 4)
    ]
    expected = [answer.vector for answer in on_cpu.run(requests)]
    for mine, theirs in zip(on_gpu.run(requests), expected, strict=True):
        assert torch.allclose(mine.vector, theirs, atol=1e-3, rtol=1e-3)
