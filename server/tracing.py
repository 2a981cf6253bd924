"""Traces by OpenTelemetry. A leaf. The SDK and its exporter are the extra `otel`: without them nothing is traced."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass

from opentelemetry.trace import Tracer, TracerProvider

from weft.errors import InvalidConfig

SERVICE = "weft"
INSTALL = "pip install 'weft[otel]'"

CLOSING_S = 3.0
"""How long the last spans may take to be sent at the end."""

_ENDPOINT = re.compile(r"https?://[^/\s:@]+(:\d{1,5})?/?|https?://\[[0-9A-Fa-f:.]+\](:\d{1,5})?/?")
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tracing:
    """tracer: None where nothing is traced. close: send what is left, for a while."""

    tracer: Tracer | None = None
    close: Callable[[], object] = lambda: None


def check_endpoint(endpoint: str | None) -> None:
    """Raises InvalidConfig for what is no OTLP endpoint, and where the extra is not installed."""
    if endpoint is None:
        return
    if _ENDPOINT.fullmatch(endpoint) is None:
        raise InvalidConfig(
            f"--otlp-endpoint is {endpoint!r}; must be http://HOST:PORT, or https:// for TLS, of an OTLP gRPC receiver"
        )
    if not _has_sdk():
        raise InvalidConfig(f"--otlp-endpoint is {endpoint!r}, but OpenTelemetry's SDK is not installed: {INSTALL}")


def open_tracing(endpoint: str | None, version: str, provider: TracerProvider | None = None) -> Tracing:
    """To an OTLP gRPC endpoint, or one that OpenTelemetry's own variables name; every other setting is the SDK's too.

    provider: what makes the spans, in place of the SDK's own; it is not closed.
    """
    if provider is not None:
        return Tracing(provider.get_tracer(SERVICE, version))
    named = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), None)
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return Tracing()
    if endpoint is None and (named is None or os.environ.get("OTEL_TRACES_EXPORTER") == "none"):
        return Tracing()
    if not _has_sdk():
        _log.warning("OTEL_EXPORTER_OTLP_ENDPOINT is set, but nothing is traced: %s", INSTALL)
        return Tracing()
    return _open(endpoint, version)


def _has_sdk() -> bool:
    try:
        import opentelemetry.exporter.otlp.proto.grpc.trace_exporter  # noqa: PLC0415
        import opentelemetry.sdk.trace  # noqa: F401, PLC0415
    except ImportError:
        return False
    return True


def _open(endpoint: str | None, version: str) -> Tracing:
    # Half a second to import, for those who trace.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider as SdkTracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    resource = Resource.create({"service.version": version})
    if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": SERVICE}))
    exporter = OTLPSpanExporter(endpoint=endpoint)
    provider = SdkTracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))

    def close() -> None:
        """A receiver that does not answer is given up: the SDK alone would try for half a minute."""
        give_up = threading.Timer(CLOSING_S, exporter.shutdown)
        give_up.start()
        provider.shutdown()
        give_up.cancel()

    return Tracing(provider.get_tracer(SERVICE, version), close)
