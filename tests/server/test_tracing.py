"""Where traces go: what is asked for, what is missing, and a real receiver on loopback."""

from __future__ import annotations

import asyncio
import queue
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2
from serving import served
from tiny import make_adapter, make_model, save_tokenizer

from weft.errors import InvalidConfig
from weft.server import tracing
from weft.server.config import EngineConfig, ModelConfig, ServerConfig
from weft.server.tracing import check_endpoint, open_tracing
from weft.v1 import adapter_pb2, adapter_pb2_grpc, inference_pb2, inference_pb2_grpc


@pytest.mark.parametrize(
    "endpoint", ["localhost:4317", "grpc://localhost:4317", "http://", "http://host:4317/v1/traces", "http://a b:1"]
)
def test_what_is_no_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(InvalidConfig, match=r"--otlp-endpoint is .*must be http://HOST:PORT"):
        check_endpoint(endpoint)


@pytest.mark.parametrize("endpoint", [None, "http://localhost:4317", "https://collector.example/", "http://[::1]:4317"])
def test_what_is_one_is_taken(endpoint: str | None) -> None:
    check_endpoint(endpoint)


def test_without_the_extra_the_option_says_what_to_install() -> None:
    program = """
import sys
sys.modules["opentelemetry.sdk"] = sys.modules["opentelemetry.exporter"] = None
from weft.server.cli import main
sys.exit(main(["serve", "--model", "none", "--otlp-endpoint", "http://localhost:4317"]))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr == (
        "weft: --otlp-endpoint is 'http://localhost:4317', but OpenTelemetry's SDK is not installed: "
        "pip install 'weft[otel]'\n"
    )


def test_without_the_extra_the_environment_alone_warns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracing, "_has_sdk", lambda: False)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4317")
    opened = open_tracing(None, "1")
    assert opened.tracer is None
    assert caplog.messages == ["OTEL_EXPORTER_OTLP_ENDPOINT is set, but nothing is traced: pip install 'weft[otel]'"]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_SERVICE_NAME": "mine"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:1", "OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:1", "OTEL_SDK_DISABLED": "true"},
    ],
)
def test_nothing_is_traced_unless_asked_for(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert open_tracing(None, "1").tracer is None


def test_nothing_of_the_sdk_is_loaded_unless_asked_for() -> None:
    program = """
import sys
from weft.server.tracing import check_endpoint, open_tracing
check_endpoint(None)
open_tracing(None, "1")
assert not [name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))]
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@dataclass(frozen=True)
class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP gRPC receiver; what came to it."""

    address: str
    batches: queue.SimpleQueue[trace_pb2.ResourceSpans]

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        for batch in request.resource_spans:
            self.batches.put(batch)
        return trace_service_pb2.ExportTraceServiceResponse()

    def all(self) -> list[trace_pb2.ResourceSpans]:
        return [self.batches.get_nowait() for _ in range(self.batches.qsize())]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = grpc.server(ThreadPoolExecutor(1))
    receiver = Receiver(f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", queue.SimpleQueue())
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    server.start()
    yield receiver
    server.stop(None).wait()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ServerConfig:
    root = tmp_path_factory.mktemp("tracing")
    model = make_model("llama", root / "base")
    save_tokenizer(root / "base")
    make_adapter(model, root / "adapters" / "one", target_modules=["q_proj"])
    return ServerConfig(
        model=ModelConfig(str(root / "base"), dtype="float32", device="cpu"),
        engine=EngineConfig(max_batch_tokens=64, max_running_requests=8, kv_tokens=4096, adapter_pages=16),
        port=0,
        metrics_port=0,
        source_roots=(root / "adapters",),
    )


def value(attributes: Any, key: str) -> str:
    return str(next((found.value.string_value for found in attributes if found.key == key), ""))


def test_a_servers_spans_reach_a_receiver_before_it_ends(
    config: ServerConfig, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    (root,) = config.source_roots
    with (
        served(replace(config, otlp_endpoint=receiver.address)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        adapters: Any = adapter_pb2_grpc.AdapterServiceStub(channel)
        adapter = {"name": "one", "source": f"file:{Path(root) / 'one'}"}
        loaded = adapters.CreateAdapter(adapter_pb2.CreateAdapterRequest(adapter=adapter, wait=True)).adapter
        inference: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        inference.Generate(
            inference_pb2.GenerateRequest(
                text="hello", adapter_id="one", stopping={"max_tokens": 2, "ignore_eos": True}
            )
        )
    batches = receiver.all()
    resource = batches[0].resource.attributes
    assert value(resource, "service.name") == "weft"
    assert value(resource, "deployment.environment.name") == "test"
    spans = {span.name: span for batch in batches for scope in batch.scope_spans for span in scope.spans}
    assert set(spans) == {
        "weft.v1.AdapterService/CreateAdapter",
        "load adapter",
        "text_completion one",
        "queue",
        "prefill",
        "decode",
    }
    load, asked = spans["load adapter"], spans["weft.v1.AdapterService/CreateAdapter"]
    assert load.parent_span_id == asked.span_id
    assert value(load.attributes, "weft.adapter.digest") == loaded.digest
    assert spans["decode"].parent_span_id == spans["text_completion one"].span_id


def test_the_environment_alone_is_enough(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.address)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    opened = open_tracing(None, "1")
    assert opened.tracer is not None
    opened.tracer.start_span("told").end()
    opened.close()
    (batch,) = receiver.all()
    assert value(batch.resource.attributes, "service.name") == "mine"


def test_a_receiver_that_is_not_there_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "CLOSING_S", 0.0)

    async def main() -> None:
        opened = open_tracing("http://127.0.0.1:1", "1")
        assert opened.tracer is not None
        opened.tracer.start_span("lost").end()
        await asyncio.wait_for(asyncio.to_thread(opened.close), 30)

    asyncio.run(main())
