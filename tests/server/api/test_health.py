"""Health: what each name says while the server loads, serves, drains, and when its engine is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import served

from weft.server.api.health import Health
from weft.server.config import EngineConfig, ModelConfig, ServerConfig
from weft.v1 import inference_pb2, inference_pb2_grpc

NAMES = ("", "weft.v1.InferenceService", "readiness", "liveness", "startup")


async def statuses(health: Health) -> Mapping[str, bool]:
    """Whether each name is serving, asked over a port."""
    server = grpc.aio.server()
    health.add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answers = [await stub.Check(health_pb2.HealthCheckRequest(service=name)) for name in NAMES]
    await server.stop(None)
    return {
        name: answer.status == health_pb2.HealthCheckResponse.SERVING
        for name, answer in zip(NAMES, answers, strict=True)
    }


READY = {"": True, "weft.v1.InferenceService": True, "readiness": True}
NOT_READY = dict.fromkeys(READY, False)

STATES: list[tuple[tuple[str, ...], Mapping[str, bool]]] = [
    (("loading",), {**NOT_READY, "liveness": True, "startup": False}),
    (("loading", "draining"), {**NOT_READY, "liveness": True, "startup": False}),
    (("loading", "serving"), {**READY, "liveness": True, "startup": True}),
    (("loading", "serving", "draining"), {**NOT_READY, "liveness": True, "startup": True}),
    (("loading", "serving", "lost"), {**NOT_READY, "liveness": False, "startup": True}),
]


@pytest.mark.parametrize(("states", "wanted"), STATES, ids=[" ".join(states) for states, _ in STATES])
def test_each_probe_asks_for_what_it_acts_on(states: tuple[str, ...], wanted: Mapping[str, bool]) -> None:
    told: list[bool] = []

    async def main() -> Mapping[str, bool]:
        health = Health(["weft.v1.InferenceService"], told.append)
        for state in states:
            await getattr(health, state)()
        return await statuses(health)

    assert asyncio.run(main()) == wanted
    assert told[-1] == wanted["readiness"]


class TestPort:
    @pytest.fixture
    def config(self, folders: Path) -> ServerConfig:
        return ServerConfig(
            model=ModelConfig(str(folders / "base"), dtype="float32", device="cpu"),
            engine=EngineConfig(max_batch_tokens=64, max_running_requests=8, kv_tokens=4096, adapter_pages=16),
            port=0,
            metrics_port=0,
        )

    def test_it_answers_health_and_nothing_else(self, config: ServerConfig) -> None:
        with (
            served(replace(config, health_port=0)) as server,
            grpc.insecure_channel(server.health_address) as channel,
        ):
            health: Any = health_pb2_grpc.HealthStub(channel)
            for name in NAMES:
                status = health.Check(health_pb2.HealthCheckRequest(service=name)).status
                assert status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.RpcError) as refused:
                inference_pb2_grpc.InferenceServiceStub(channel).Tokenize(inference_pb2.TokenizeRequest(text="x"))
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED

    def test_there_is_none_unless_it_is_asked_for(self, config: ServerConfig) -> None:
        with served(config) as server:
            assert server.health_address == ""
