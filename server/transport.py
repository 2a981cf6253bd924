"""What the server asks of connections: how gRPC treats them, and how many there may be."""

from __future__ import annotations

import resource

MAX_STREAMS = 4096
"""RPCs of one connection at a time; a client holds back more than that by itself."""

MAX_UNSEEN = 1 << 16
"""RPCs that have come and that the event loop has not looked at: gRPC drops some beyond 1,000, without a word."""

LONGEST_UNSEEN_S = 300
"""For which one of them may be so; gRPC's own is 30."""

HANDSHAKE_S = 20
"""For a connection to become one of HTTP/2."""

QUIET_S = 30
"""Without a byte from a client that has requests, after which it is asked for a sign of life."""

ANSWER_S = 20
"""For that sign; else the connection is closed, and its requests are cancelled."""


def grpc_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """Of the server. A port is its own alone, and clients that vanished without a word are found out."""
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.server.max_pending_requests", MAX_UNSEEN),
        ("grpc.server.max_pending_requests_hard_limit", MAX_UNSEEN),
        ("grpc.server_max_unrequested_time_in_server", LONGEST_UNSEEN_S),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_S * 1000),
        ("grpc.keepalive_time_ms", QUIET_S * 1000),
        ("grpc.keepalive_timeout_ms", ANSWER_S * 1000),
    ]


def raise_file_limit() -> None:
    """Allow as many open files as the system lets this process have: every connection is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
