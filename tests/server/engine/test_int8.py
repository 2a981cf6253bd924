"""Adapters held in 8 bits: served within their error, which is told, in a quarter of the memory."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from harness import Harness
from safetensors.torch import load_file, save_file
from tiny import linear_names, make_adapter, make_model, peft_logits, save_tokenizer
from transformers import PreTrainedModel

from weft.adapters.records import NewAdapter
from weft.errors import InvalidAdapter
from weft.kernels.plan import PAGE_ROWS
from weft.kernels.site import to_int8
from weft.server.engine import parity
from weft.server.engine.request import Request, Stopping

ADAPTERS = {
    "small": {"r": 4, "lora_alpha": 1, "target_modules": linear_names("llama")},
    "large": {"r": 33, "lora_alpha": 8, "target_modules": linear_names("llama")},
    "dora": {"r": 8, "lora_alpha": 2, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
}
PROMPT = tuple(range(3, 40))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("int8")


@pytest.fixture(scope="module")
def model(root: Path) -> PreTrainedModel:
    model = make_model("llama", root / "base")
    save_tokenizer(root / "base")
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        make_adapter(model, root / name, seed=seed, **config)
    return model


def serve(root: Path, **options: object) -> Harness:
    return Harness(root / "base", {name: root / name for name in ADAPTERS}, **options)


def rounded(folder: Path, into: Path) -> Path:
    """The adapter with each rank row as 8 bits hold it."""
    into.mkdir()
    for file in folder.iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    tensors = load_file(into / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        steps, scale = to_int8(tensor.t() if "lora_B" in name else tensor)
        rows = steps * scale[:, None]
        tensors[name] = (rows.t() if "lora_B" in name else rows).contiguous()
    save_file(tensors, into / "adapter_model.safetensors")
    return into


@pytest.mark.parametrize("name", ["small", "large"])
def test_what_is_served_is_peft_on_rounded_rows(root: Path, model: PreTrainedModel, tmp_path: Path, name: str) -> None:
    harness = serve(root, adapter_dtype="int8")
    (logits,) = harness.logits([Request(name, PROMPT, adapters=((name, 1.0),))], chunk=16)
    (expected,) = peft_logits(model, rounded(root / name, tmp_path / name), [PROMPT])
    assert ((logits - expected).norm() / expected.norm()).item() < 1e-4


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_what_is_served_is_within_8_bits_of_peft(root: Path, model: PreTrainedModel, backend: str) -> None:
    harness = serve(root, adapter_dtype="int8", lora_backend=backend)
    requests = [Request(name, PROMPT, adapters=((name, 1.0),)) for name in ADAPTERS]
    for name, logits in zip(ADAPTERS, harness.logits(requests, chunk=16), strict=True):
        (expected,) = peft_logits(model, root / name, [PROMPT])
        error = ((logits - expected).norm() / expected.norm()).item()
        assert 1e-4 < error < 5e-2, name


def test_the_error_is_reported(root: Path, model: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="weft"):
        harness = serve(root, adapter_dtype="int8")
    told = [record.getMessage() for record in caplog.records if "8-bit rows change its deltas by up to" in record.msg]
    assert len(told) == len(ADAPTERS)
    for name in ADAPTERS:
        error = harness.store.get(name).probe_error
        assert error is not None
        assert 1e-3 < error < 3e-2
    report = harness.store.inspect(f"file:{root / 'small'}")
    assert report.probe_error == harness.store.get("small").probe_error
    assert "rank rows in int8" in harness.info.startup_line


def test_rows_take_a_quarter_of_the_memory(root: Path, model: PreTrainedModel) -> None:
    plain, small = serve(root), serve(root, adapter_dtype="int8")
    widths = 3 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    num_modules = 3 * 7
    assert plain.store.capacity().page_bytes == PAGE_ROWS * widths * 4
    assert small.store.capacity().page_bytes == PAGE_ROWS * (widths + num_modules * 8)
    assert plain.store.get("large").host_bytes == 33 * widths * 4
    assert small.store.get("large").host_bytes == 33 * (widths + num_modules * 8)
    pool = small.store._pool
    assert sum(part[0].nbytes for site in pool.sites.values() for part in site.pools) == pool.page_bytes
    assert {part.dtype for site in pool.sites.values() for part in site.pools[:2]} == {torch.int8}


def test_what_8_bits_can_not_hold_is_refused(
    root: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 64 numbers are never more than 3 % off, wherever their largest is: so a lower limit stands for it."""
    harness = serve(root, adapter_dtype="int8")
    monkeypatch.setattr(parity, "INT8_TOLERANCE", 1e-3)
    with pytest.raises(
        InvalidAdapter, match="8 bits may be too few for it: start the server with --adapter-dtype auto"
    ):
        harness.store.create(NewAdapter("again", f"file:{root / 'small'}"))


def test_an_adapter_that_comes_back_to_the_device_is_the_same(root: Path, model: PreTrainedModel) -> None:
    """5 pages serve one of the large adapter's rank at a time."""
    harness = Harness(
        root / "base", {name: root / name for name in ("small", "large")}, adapter_dtype="int8", adapter_pages=5
    )
    few = Stopping(max_tokens=6, ignore_eos=True)
    ask = lambda name: harness.run([Request(name, PROMPT, ((name, 1.0),), stopping=few)])[0].ids  # noqa: E731
    first = {name: ask(name) for name in ("small", "large")}
    assert {name: ask(name) for name in ("small", "large")} == first
