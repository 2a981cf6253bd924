"""`weft health`: whether a server serves, for probes and scripts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import grpc
from grpc_health.v1 import health_pb2 as pb2
from grpc_health.v1 import health_pb2_grpc

from weft.server.cli.client import Endpoint, connected, server_options


@click.command()
@click.option("--service", default="", help="liveness, readiness, startup or a service's full name; else the server.")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(0.001, 3600), default=5.0, show_default=True, help="In seconds."
)
@click.option("--wait", is_flag=True, help="Until it serves, or --timeout is over.")
@server_options
def health(server: Endpoint, service: str, timeout_s: float, wait: bool) -> int:
    """Say whether the server at --address serves. Ends with 0 if it does, with 1 if not or if there is none."""
    with connected(server) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = pb2.HealthCheckRequest(service=service)
        try:
            if wait:
                status = _served(stub.Watch(request, timeout=timeout_s, wait_for_ready=True))
            else:
                status = stub.Check(request, timeout=timeout_s).status
        except grpc.RpcError as error:
            raise _in_words(error, service, timeout_s) from None
    click.echo(pb2.HealthCheckResponse.ServingStatus.Name(status).lower().replace("_", " "))
    return 0 if status == pb2.HealthCheckResponse.SERVING else 1


def _served(watched: Iterator[Any]) -> int:
    """SERVING as soon as that is watched."""
    status: int = pb2.HealthCheckResponse.UNKNOWN
    for response in watched:
        status = response.status
        if status == pb2.HealthCheckResponse.SERVING:
            break
    return status


def _in_words(error: Any, service: str, timeout_s: float) -> Exception:
    """What is worth more words than any RPC's failure has."""
    match error.code():
        case grpc.StatusCode.NOT_FOUND:
            return click.ClickException(
                f"the server has no service {service!r}: ask for liveness, readiness, startup or a full name such as "
                "weft.v1.InferenceService"
            )
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return click.ClickException(f"the server did not answer within {timeout_s:g} s")
        case _:
            return error  # type: ignore[no-any-return]  # the stubs' errors are calls too
