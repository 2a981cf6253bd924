"""What memory goes to: arithmetic on what was measured, and that it is measured."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Harness
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model, save_tokenizer

from weft.errors import InvalidConfig
from weft.kernels.native import find_native
from weft.server.config import EngineConfig, ModelConfig
from weft.server.engine.memory import Memory
from weft.server.engine.model import PagedModel, load_model
from weft.server.engine.request import Request
from weft.server.engine.sizing import Trial, adapter_room, describe_pages, fit_kv_tokens, mask_bytes

GIB, MIB = 1 << 30, 1 << 20
CPU = torch.device("cpu")
PLENTY = Memory(64 * GIB, 64 * GIB)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizing")
    make_model("llama", folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> PagedModel:
    return load_model(ModelConfig(str(folder), dtype="float32", device="cpu"))


def room(model: PagedModel, device: Memory = PLENTY, host: Memory = PLENTY, **options: Any) -> tuple[int, int]:
    found = adapter_room(model, EngineConfig(**options), device, host)
    return found.pages, found.host_bytes


def test_adapters_get_what_the_options_say(model: PagedModel) -> None:
    assert room(model, adapter_pages=7, adapter_host_bytes=0) == (7, 0)


def test_adapters_get_a_share_of_what_is_free_else_and_no_more_than_they_need(model: PagedModel) -> None:
    assert room(model) == (256, GIB)
    small = Memory(GIB, 80 * MIB)
    pages, host_bytes = room(model, small, small)
    assert host_bytes == 10 * MIB
    page_bytes = adapter_room(model, EngineConfig(), PLENTY, PLENTY).page_bytes
    assert pages == 20 * MIB // page_bytes < 256
    assert room(model, Memory(GIB, 0), small)[0] == 0


def test_a_page_is_a_rank_row_of_every_module_eight_times(folder: Path, model: PagedModel) -> None:
    harness = Harness(folder)
    assert adapter_room(model, EngineConfig(), PLENTY, PLENTY).page_bytes == harness.store.capacity().page_bytes


def tokens(model: PagedModel, memory: Memory, step_bytes: int = 0, owed_bytes: int = 0, **options: Any) -> int:
    return fit_kv_tokens(model, EngineConfig(**options), memory, step_bytes, owed_bytes)


def test_the_cache_gets_its_share_of_what_is_left(model: PagedModel) -> None:
    options = {"max_batch_tokens": 1 << 16, "max_running_requests": 1 << 16}
    alone = tokens(model, Memory(GIB, 100 * MIB), **options)
    assert tokens(model, Memory(GIB, 100 * MIB), step_bytes=30 * MIB, owed_bytes=20 * MIB, **options) == alone // 2
    assert tokens(model, Memory(GIB, 100 * MIB), memory_share=1, **options) == pytest.approx(2 * alone, abs=1)
    assert tokens(model, Memory(GIB, 100 * MIB), memory_share=0.05, **options) == pytest.approx(alone / 10, abs=1)
    layers = 3
    assert alone * model.token_bytes == pytest.approx(50 * MIB / (1 + 2 / layers), rel=0.01), "and room for copies"


def test_attention_in_place_needs_no_room_for_copies(folder: Path) -> None:
    native = find_native(1)
    if native is None:
        pytest.skip("the C library was not built")
    model = load_model(ModelConfig(str(folder), dtype="float32", device="cpu"), native)
    plenty = {"max_batch_tokens": 1 << 16, "max_running_requests": 1 << 16}
    assert tokens(model, Memory(GIB, 100 * MIB), **plenty) * model.token_bytes == pytest.approx(50 * MIB, rel=0.01)


def test_the_cache_is_no_larger_than_all_running_requests_need(model: PagedModel) -> None:
    assert tokens(model, PLENTY, max_running_requests=4) == 4 * 256
    assert tokens(model, PLENTY, max_running_requests=4, context_length=100) == 400


def test_the_cache_has_the_tokens_that_the_option_says(model: PagedModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert tokens(model, PLENTY, kv_tokens=1000) == 1000
        assert not caplog.messages
        assert tokens(model, Memory(GIB, MIB), step_bytes=MIB, kv_tokens=1000) == 1000
    assert "--kv-tokens is 1000, which takes 0.7 MiB, but 0.0 MiB are left" in caplog.text
    with pytest.raises(
        InvalidConfig, match=r"--kv-tokens is 1000, which takes 0\.7 MiB of this model; there are 0\.5 MiB"
    ):
        tokens(model, Memory(MIB // 2, MIB // 2), kv_tokens=1000)


def test_where_nothing_is_left_the_refusal_says_what_takes_how_much(model: PagedModel) -> None:
    words = "10.0 MiB are free, of which a step takes 4.0 MiB and adapters may take 6.0 MiB: lower --max-batch-tokens"
    with pytest.raises(InvalidConfig, match=words):
        tokens(model, Memory(GIB, 10 * MIB), step_bytes=4 * MIB, owed_bytes=6 * MIB)


@settings(deadline=None)
@given(
    max_batch_tokens=st.integers(1, 1 << 16),
    max_running_requests=st.integers(1, 1 << 12),
    longest=st.integers(1, 1 << 20),
    block_tokens=st.integers(1, 64),
)
def test_a_trial_is_one_step_within_its_budgets(
    max_batch_tokens: int, max_running_requests: int, longest: int, block_tokens: int
) -> None:
    options = EngineConfig(
        max_batch_tokens=max(max_batch_tokens, max_running_requests),
        max_running_requests=max_running_requests,
        block_tokens=block_tokens,
    )
    trial = Trial.of(options, CPU, longest, 100)
    assert all(1 <= 2 * chunk <= max(longest, 2) for chunk in trial.chunks)
    assert sum(trial.chunks) <= options.max_batch_tokens
    assert len(trial.chunks) <= max_running_requests
    assert trial.scale >= 1
    if trial.scale == 1 and longest > 2 * options.max_batch_tokens:
        assert sum(trial.chunks) == options.max_batch_tokens
        assert len(trial.chunks) == max_running_requests
    assert trial.pool(1).capacity >= sum(-(-2 * chunk // block_tokens) for chunk in trial.chunks)
    assert trial.pool(10_000).capacity * block_tokens >= 10_000


def test_a_longer_step_is_reckoned_in_proportion() -> None:
    assert Trial.of(EngineConfig(max_batch_tokens=512), CPU, 4096, 1).scale == 1
    assert Trial.of(EngineConfig(max_batch_tokens=5120), CPU, 4096, 1).scale == 10


def test_the_mask_of_a_chunk_is_a_boolean_and_a_number_for_each_pair() -> None:
    assert mask_bytes(512, 2048, 4) == 512 * 2048 * 5


def test_pages_are_told_as_adapters() -> None:
    assert describe_pages(17) == "17 adapter pages (adapters at once: 17 of rank 8, 8 of rank 16, 2 of rank 64)"


def test_the_start_says_what_fits_and_what_a_step_takes(folder: Path) -> None:
    harness = Harness(folder, adapter_pages=16, kv_tokens=2048)
    line = harness.info.startup_line
    assert "fits 2,048 tokens of KV cache (1.5 MiB)" in line
    assert "16 adapter pages (adapters at once: 16 of rank 8, 8 of rank 16, 2 of rank 64) of 8 rank rows" in line
    assert re.search(r"a step takes up to \d+\.\d MiB$", line)


def test_without_options_the_cache_holds_a_context_for_every_running_request(folder: Path) -> None:
    harness = Harness(folder, kv_tokens=None, adapter_pages=None, max_running_requests=3)
    assert (harness.info.kv_tokens, harness.info.adapter_pages) == (3 * 256, 256)


def test_the_dry_run_leaves_a_cache_and_a_pool_that_are_as_new(folder: Path) -> None:
    harness = Harness(folder)
    harness.engine.check_pools()
    pool = harness.engine._scheduler.pool
    assert pool.num_free == pool.capacity
    cache = harness.engine._model.cache
    assert cache is not None
    assert not any(bool(tensor.any()) for tensors in cache.layers.values() for tensor in tensors)
    (answer,) = harness.run([Request("r", (5, 6, 7))])
    assert answer.error is None


def test_the_dry_run_sees_what_a_larger_step_takes(tmp_path: Path) -> None:
    make_model("llama", tmp_path, intermediate_size=16384, max_position_embeddings=2048)
    save_tokenizer(tmp_path)

    def step_mib(max_batch_tokens: int) -> float:
        line = Harness(tmp_path, max_batch_tokens=max_batch_tokens).info.startup_line
        (found,) = re.findall(r"a step takes up to (\d+\.\d) MiB$", line)
        return float(found)

    assert step_mib(512) > 512 * 16384 * 4 / MIB, "the inner layer's activations, at the least"
    assert step_mib(16) < 0.5 * step_mib(512)
