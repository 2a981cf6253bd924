"""Adapters that are on disk when a request comes, seen by a client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2 as details_pb2
from house import generate, refusal
from serving import served
from tiny import make_adapter, make_model, save_tokenizer

from weft.server.config import EngineConfig, ModelConfig, ServerConfig
from weft.v1 import adapter_pb2, adapter_pb2_grpc, inference_pb2_grpc


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cold")
    model = make_model("llama", root / "base")
    save_tokenizer(root / "base")
    for seed, name in enumerate(("one", "two", "three")):
        make_adapter(model, root / "adapters" / name, seed, target_modules=["q_proj"])
    return root


@pytest.fixture
def channel(root: Path) -> Iterator[grpc.Channel]:
    """To a server with pages for one adapter, and no copies in host memory."""
    engine = EngineConfig(
        max_batch_tokens=64, max_running_requests=4, kv_tokens=1024, adapter_pages=1, adapter_host_bytes=0
    )
    model = ModelConfig(str(root / "base"), dtype="float32", device="cpu")
    config = ServerConfig(model, engine, port=0, metrics_port=0, adapters=root / "adapters", drain_grace_s=5.0)
    with served(config) as server, grpc.insecure_channel(server.address) as channel:
        yield channel


def ask(channel: grpc.Channel, adapter: str) -> str:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    return str(stub.Generate(generate(adapter_id=adapter, text="hello", stopping={"max_tokens": 5})).adapters[0].digest)


def test_every_adapter_answers_and_says_where_it_is(channel: grpc.Channel) -> None:
    for name in ("one", "two", "three", "one"):
        digest = ask(channel, name)
        listed = adapter_pb2_grpc.AdapterServiceStub(channel).ListAdapters(adapter_pb2.ListAdaptersRequest()).adapters
        states = {adapter.name: (adapter.state, adapter.device_bytes > 0) for adapter in listed}
        assert states.pop(name) == (adapter_pb2.ADAPTER_STATE_DEVICE, True)
        assert set(states.values()) == {(adapter_pb2.ADAPTER_STATE_DISK, False)}
        assert digest == next(adapter.digest for adapter in listed if adapter.name == name)


def test_files_that_are_gone_or_changed_are_told_apart(channel: grpc.Channel, root: Path) -> None:
    path = root / "adapters" / "two" / "adapter_model.safetensors"
    content = path.read_bytes()
    path.unlink()
    ask(channel, "one")
    gone = refusal(lambda: ask(channel, "two"))
    assert gone.code is grpc.StatusCode.UNAVAILABLE
    assert gone.detail(details_pb2.RetryInfo).retry_delay.ToNanoseconds() > 0
    path.write_bytes((root / "adapters" / "three" / path.name).read_bytes())
    changed = refusal(lambda: ask(channel, "two"))
    assert changed.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "have changed since it was loaded: update the adapter" in changed.message
    path.write_bytes(content)
    assert ask(channel, "two")
