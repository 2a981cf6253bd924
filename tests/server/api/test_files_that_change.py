"""The files of a loaded adapter, spoilt in place: what is served was read, and is not mapped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import grpc
import pytest
from house import generate
from serving import served
from tiny import make_adapter, make_model, save_tokenizer

from weft.server.config import EngineConfig, ModelConfig, ServerConfig
from weft.v1 import inference_pb2_grpc


@pytest.mark.parametrize("size", [0, 100])
def test_truncating_them_changes_nothing_that_is_served(tmp_path: Path, size: int) -> None:
    model = make_model("llama", tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    folder = make_adapter(
        model, tmp_path / "adapters" / "own", target_modules=["q_proj"], modules_to_save=["lm_head", "o_proj"]
    )
    config = ServerConfig(
        ModelConfig(str(tmp_path / "base"), dtype="float32", device="cpu"),
        EngineConfig(max_batch_tokens=64, max_running_requests=4, kv_tokens=1024, adapter_pages=64),
        port=0,
        metrics_port=0,
        adapters=tmp_path / "adapters",
        watch=False,
        drain_grace_s=5.0,
    )
    with served(config) as server, grpc.insecure_channel(server.address) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)

        def tokens(**adapter: str) -> list[int]:
            stopping = {"max_tokens": 16, "ignore_eos": True}
            return [token.id for token in stub.Generate(generate(text="hello", stopping=stopping, **adapter)).tokens]

        before, base = tokens(adapter_id="own"), tokens()
        assert before != base
        os.truncate(folder / "adapter_model.safetensors", size)
        assert (tokens(adapter_id="own"), tokens()) == (before, base)
