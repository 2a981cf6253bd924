"""What `grpc.health.v1` says: the server as a whole, each service, and the three names that probes ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

LIVENESS = "liveness"
"""Serving from the start until the engine is lost, while loading and draining too: what is not is to be killed."""

READINESS = "readiness"
"""As the overall state: what is not is to be sent nothing."""

STARTUP = "startup"
"""Serving once everything is loaded, and from then on."""

PROBES = (LIVENESS, READINESS, STARTUP)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """One state on every port that it is added to: loading, serving, draining or lost."""

    def __init__(self, services: Iterable[str], tell_ready: Callable[[bool], None]) -> None:
        """services: full names of those that are ready when the server is. tell_ready: called when that changes."""
        self._ready = ("", *services, READINESS)
        self._tell_ready = tell_ready
        self._servicer = health.aio.HealthServicer()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Answer health checks on one more port."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def loading(self) -> None:
        await self._set_ready(_NOT_SERVING)
        await self._set(_NOT_SERVING, STARTUP)
        await self._set(_SERVING, LIVENESS)

    async def serving(self) -> None:
        await self._set(_SERVING, STARTUP)
        await self._set_ready(_SERVING)

    async def draining(self) -> None:
        await self._set_ready(_NOT_SERVING)

    async def lost(self) -> None:
        await self._set_ready(_NOT_SERVING)
        await self._set(_NOT_SERVING, LIVENESS)

    async def _set_ready(self, status: int) -> None:
        self._tell_ready(status == _SERVING)
        await self._set(status, *self._ready)

    async def _set(self, status: int, *names: str) -> None:
        for name in names:
            await self._servicer.set(name, status)
