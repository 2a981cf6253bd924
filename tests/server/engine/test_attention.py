"""Attention in the engine: by the C library or by PyTorch, and the same to the bit in any batch where it is in C."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from harness import Harness
from tiny import make_model, save_tokenizer

from weft.kernels.native import find_native
from weft.server.engine.request import Request

KINDS = ["llama", "mistral", "gemma2", "gpt_oss", "qwen3"]
SETTINGS = {
    "gemma2": {"head_dim": 16, "sliding_window": 12, "attn_logit_softcapping": 5.0},
    "gpt_oss": {"head_dim": 16, "sliding_window": 12, "num_local_experts": 4, "num_experts_per_tok": 2},
}

in_c = pytest.mark.skipif(find_native(1) is None, reason="the C library was not built")


def prompts(*lengths: int) -> list[Request]:
    rng = random.Random(0)
    return [Request(f"r{length}", tuple(rng.randrange(3, 250) for _ in range(length))) for length in lengths]


@in_c
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_attend_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(kind, tmp_path, **SETTINGS.get(kind, {}))
    save_tokenizer(tmp_path)
    requests = prompts(5, 40, 90)
    in_place = Harness(tmp_path).logits(requests, 16)
    monkeypatch.setenv("WEFT_NATIVE", "0")
    gathered = Harness(tmp_path).logits(requests, 16)
    for mine, theirs in zip(in_place, gathered, strict=True):
        assert (mine - theirs).norm() / theirs.norm() < 1e-4


@in_c
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_logits_are_the_same_to_the_bit_alone_and_in_any_batch_and_chunks(
    kind: str, dtype: str, tmp_path: Path
) -> None:
    make_model(kind, tmp_path)
    save_tokenizer(tmp_path)
    harness = Harness(tmp_path, dtype=dtype)
    requests = prompts(1, 7, 30, 64, 99)
    alone = [harness.logits([request], 1000)[0] for request in requests]
    for chunk in (1, 3, 16, 40):
        together = harness.logits(requests, chunk)
        assert all(torch.equal(mine, other) for mine, other in zip(together, alone, strict=True)), chunk
