"""Ports that the server listens on: whether they are free, in words, and the one that Prometheus asks."""

from __future__ import annotations

import errno
import socket
import threading
from contextlib import suppress
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, start_http_server

from weft.errors import AddressUnavailable


class MetricsHandler(WSGIRequestHandler):
    """Lets go of clients that connect and then say nothing, each holding a thread, and of those that are gone."""

    timeout = 10

    def handle(self) -> None:
        with suppress(TimeoutError, ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base's
        """Scrapes are not logged."""


def serve_metrics(registry: CollectorRegistry, host: str, port: int) -> tuple[WSGIServer, threading.Thread]:
    """Raises AddressUnavailable."""
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise unavailable("--metrics-port", host, port, error.strerror) from error
    server.RequestHandlerClass = MetricsHandler
    return server, thread


def check_free(option: str, host: str, port: int, host_option: str = "--host") -> None:
    """Raises AddressUnavailable, in words, where gRPC would fill a page."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise AddressUnavailable(f"{host_option} is {host!r}; can't listen there ({error.strerror})") from error
        raise unavailable(option, host, port, error.strerror) from error


def unavailable(option: str, host: str, port: int, reason: str | None) -> AddressUnavailable:
    """What to raise; reason: the system's words."""
    return AddressUnavailable(
        f"{option} is {port}; can't listen on {join_address(host, port)} ({reason or 'in use'}): choose another port, "
        "or 0 for any that is free"
    )


def join_address(host: str, port: int) -> str:
    """As gRPC and URLs write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
