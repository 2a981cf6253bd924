"""GetServerInfo, health and reflection: what a client can find out before it asks for anything."""

from __future__ import annotations

from importlib.metadata import version

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from house import ADAPTER_PAGES, MAX_QUEUED, MAX_RUNNING, House

from weft.v1 import server_pb2 as pb2

SERVICES = ("weft.v1.InferenceService", "weft.v1.AdapterService", "weft.v1.ServerService")


def test_get_server_info(house: House) -> None:
    info = house.info.GetServerInfo(pb2.GetServerInfoRequest())
    assert info.version == version("weft")
    assert (info.model, info.dtype, info.device) == (str(house.root / "base"), "float32", "cpu")
    limits = info.limits
    assert (limits.max_context_tokens, limits.max_prompt_tokens) == (65536, 65535)
    assert (limits.max_running_requests, limits.max_queued_requests) == (MAX_RUNNING, MAX_QUEUED)
    assert (limits.adapter_pages, limits.adapter_page_rank_rows) == (ADAPTER_PAGES, 8)
    assert (limits.max_adapters_per_request, limits.max_stop_sequences) == (8, 64)
    assert (limits.max_top_logprobs, limits.max_logit_bias) == (20, 1024)
    assert (limits.max_queued_tokens, limits.max_queued_requests_per_adapter) == (1 << 20, 64)
    assert limits.max_answers == limits.max_continuations == MAX_RUNNING + MAX_QUEUED
    assert limits.max_constraint_bytes == 65536
    assert limits.max_request_time.ToSeconds() == 600
    assert limits.kv_capacity_tokens >= 65536
    assert "stream" in info.capabilities


@pytest.mark.parametrize("service", ["", *SERVICES])
def test_health_is_serving_overall_and_by_service(house: House, service: str) -> None:
    response = health_pb2_grpc.HealthStub(house.channel).Check(health_pb2.HealthCheckRequest(service=service))
    assert response.status == health_pb2.HealthCheckResponse.SERVING


def test_health_of_a_service_that_is_not_there_is_not_found(house: House) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        health_pb2_grpc.HealthStub(house.channel).Check(health_pb2.HealthCheckRequest(service="weft.v1.Nothing"))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_describes_every_service(house: House) -> None:
    database = ProtoReflectionDescriptorDatabase(house.channel)
    assert set(SERVICES) <= set(database.get_services())
    assert "grpc.health.v1.Health" in database.get_services()
    for service in SERVICES:
        described = database.FindFileContainingSymbol(service)
        assert service.rpartition(".")[2] in {found.name for found in described.service}
